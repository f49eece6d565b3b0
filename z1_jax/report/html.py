"""The pieces of a self-contained HTML page: sections, cards, tables, numbers as text, and the style sheet."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Sequence
from typing import Any

_UNITS = "%|points|point|s|min|h|ms|MB|GB|px|Hz|steps|step|minutes|seconds|CI"
_BEFORE_UNIT = re.compile(rf"(?<=[\d%])[ ](?=(?:{_UNITS})(?![\w]))")
_AROUND_SIGN = re.compile(r"\b(p) ([=<]) (\d)")

STYLE = """
:root { color-scheme: light dark; --bg: #f6f7f9; --card: #fff; --ink: #17191c; --soft: #5c636b; --line: #dfe3e8;
  --s0: #2a6fd0; --s1: #d9661a; --s2: #16916b; --s3: #7a5fd0; --s4: #8b929a; --hit: #17191c14; }
@media (prefers-color-scheme: dark) { :root { --bg: #121417; --card: #1c1f24; --ink: #e9ebee; --soft: #a1a8b1;
  --line: #33383f; --s0: #6ea8f7; --s1: #f2965a; --s2: #46c49c; --s3: #ab9af6; --s4: #868d96; --hit: #ffffff1a; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--bg); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 24px 16px 64px; }
header { margin: 16px 0 8px; }
h1 { font-size: clamp(22px, 4.5vw, 34px); line-height: 1.25; margin: 0; text-wrap: balance; }
h2 { font-size: 20px; margin: 40px 0 12px; }
h3 { font-size: 15px; margin: 0 0 4px; }
.task, .note, .legend, figcaption { color: var(--soft); font-size: 14px; margin: 0; }
.grid { display: grid; gap: 16px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 340px), 1fr)); }
.split { display: grid; gap: 16px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 380px), 1fr));
  align-items: start; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 14px; }
.card > p { margin: 0 0 6px; }
code { font: 13px/1.5 ui-monospace, monospace; overflow-wrap: anywhere; }
code span { display: inline-block; max-width: 100%; }
.table { overflow-x: auto; margin-bottom: 12px; }
table { border-collapse: collapse; font-size: 15px; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 500; color: var(--soft); }
th, td { padding: 6px 18px 6px 0; border-bottom: 1px solid var(--line); vertical-align: top; overflow-wrap: anywhere; }
td:first-child { min-width: 110px; }
.numbers :is(th, td):not(:first-child) { white-space: nowrap; overflow-wrap: normal; }
details summary { cursor: pointer; color: var(--soft); }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 10px; }
figure { margin: 0; }
figure img { width: 100%; border-radius: 6px; image-rendering: pixelated; display: block; background: var(--line); }
figcaption b { color: var(--ink); white-space: nowrap; }
svg { width: 100%; height: auto; display: block; }
svg text { fill: var(--soft); font-size: 14px; }
svg text.label { fill: var(--ink); font-size: 14px; }
svg line.grid { stroke: var(--line); stroke-width: 1; }
svg path.line { fill: none; stroke: var(--c); stroke-width: 2; stroke-linejoin: round; }
svg path.faint { fill: none; stroke: var(--c); stroke-width: 1.2; opacity: .5; }
svg path.area { fill: var(--c); stroke: var(--card); stroke-width: .8; }
svg circle { fill: var(--c); stroke: var(--card); stroke-width: 1.5; }
svg line.whisker { stroke: var(--c); stroke-width: 4; stroke-linecap: round; opacity: .5; }
svg .hit { fill: transparent; }
svg .hit:hover { fill: var(--hit); }
.c0 { --c: var(--s0); } .c1 { --c: var(--s1); } .c2 { --c: var(--s2); } .c3 { --c: var(--s3); } .c4 { --c: var(--s4); }
.key { margin-right: 14px; white-space: nowrap; }
.key::before { content: ""; display: inline-block; width: 12px; height: 4px; border-radius: 2px; margin-right: 6px;
  vertical-align: middle; background: var(--c); }
.key.faint::before { opacity: .5; }
.key.dots::before { height: 8px; width: 8px; border-radius: 50%; }
@media print { .hit { display: none; } details { display: block; } }
"""


def section(title: str, content: str) -> str:
    return f"<section><h2>{text(title)}</h2>{content}</section>"


def card(title: str, chart: str, legend: Sequence[tuple[str, int, str]], note: str = "") -> str:
    keys = "".join(f'<span class="key {style} c{colour}">{text(name)}</span>' for name, colour, style in legend)
    keys = f'<p class="legend">{keys}</p>' if len(legend) > 1 else ""
    remark = f'<p class="note">{text(note)}</p>' if note else ""
    return f'<div class="card"><h3>{text(title)}</h3>{keys}{chart}{remark}</div>'


def table(rows: Sequence[Sequence[str]], head: Sequence[str] = (), kind: str = "") -> str:
    """A table. `kind` "numbers": what stands right of the first column is not broken."""
    if not rows:
        return ""
    top = "<tr>" + "".join(f"<th>{text(cell)}</th>" for cell in head) + "</tr>" if head else ""
    body = "".join("<tr>" + "".join(f"<td>{text(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="{f"table {kind}".strip()}"><table>{top}{body}</table></div>'


def text(value: Any) -> str:
    """Text of a page. A number stays on one line with its unit, and "p = 0.01" with its signs."""
    joined = _BEFORE_UNIT.sub("\u00a0", _AROUND_SIGN.sub("\\1\u00a0\\2\u00a0\\3", str(value)))
    return html.escape(joined)


def code(value: Any) -> str:
    """Text that a reader may copy: nothing in it is changed."""
    words = (f"<span>{html.escape(word)}</span>" for word in str(value).split(" "))
    return f"<code>{' '.join(words)}</code>"


def value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def range(interval: tuple[float, float]) -> str:
    return f"{interval[0]:.1%}\u00a0–\u00a0{interval[1]:.1%}"


def p_value(p: float) -> str:
    return f"p = {p:.3f}" if p >= 0.001 else (f"p = {p:.1e}" if p > 0 else "p < 1e-300")


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s"


def page(title: str, body: str) -> str:
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{text(title)}</title><style>{STYLE}</style></head><body><main>{body}</main></body></html>\n"
    )
