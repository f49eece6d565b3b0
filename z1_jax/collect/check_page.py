"""What `checking` found, for the terminal and as a page of HTML."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from jaxtyping import Shaped
from PIL import Image

from z1_jax.collect.checking import Checked, Quantity
from z1_jax.report import charts, html

_MOST_WORDS, _MOST_LINES = 12, 40  # in the terminal
_HEAD = ("dimension", "least", "1 %", "mean", "99 %", "greatest", "std", "outliers", "")


def summary(checked: Checked, facts: Mapping[str, str]) -> list[tuple[str, str]]:
    """(name, value) of each line about the dataset as a whole. `facts`: what its files say of themselves."""
    lengths = checked.lengths
    sizes = ", ".join(f"{camera} {height}×{width}" for camera, (height, width) in checked.cameras.items())
    return [
        *facts.items(),
        ("episodes", f"{len(checked.names)}, {checked.decisions} decisions"),
        (
            "control steps",
            f"{lengths.sum()}; an episode {lengths.min()} … {lengths.max()}, median {np.median(lengths):g}",
        ),
        ("tasks", _counted(checked.tasks)),
        ("instructions", _counted(checked.words)),
        ("cameras", sizes),
        ("widths", ", ".join(f"{key} {quantity.stats.dim}" for key, quantity in checked.quantities.items())),
    ]


def _counted(counts: Mapping[str, int], most: int = _MOST_WORDS) -> str:
    shown = [f"{text!r} {count}" for text, count in sorted(counts.items(), key=lambda item: -item[1])]
    return f"{len(counts)}: " + ", ".join(shown[:most]) + f" and {len(shown) - most} more" * (len(shown) > most)


def rows(quantity: Quantity) -> list[tuple[str, ...]]:
    """A line a dimension, as in `_HEAD`."""
    stats = quantity.stats
    found = []
    for dim in range(stats.dim):
        numbers = (quantity.low, stats.q01, stats.mean, stats.q99, quantity.high, stats.std)
        held = "constant" if stats.constant[dim] else ""
        found.append((str(dim), *(f"{value[dim]:.4g}" for value in numbers), str(quantity.outliers[dim]), held))
    return found


def terminal(checked: Checked, facts: Mapping[str, str]) -> Iterator[str]:
    """The lines for the console."""
    table = summary(checked, facts)
    width = max(len(name) for name, _ in table)
    yield from (f"{name.ljust(width)}  {value}" for name, value in table)
    for key, quantity in checked.quantities.items():
        lines = [(key, *_HEAD[1:]), *rows(quantity)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(_HEAD))]
        yield ""
        yield from ("  ".join(cell.rjust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)
    yield ""
    findings = checked.findings
    yield f"{len(findings)} thing{'s' * (len(findings) > 1)} to look at:" if findings else "nothing looks wrong"
    yield from (f"  {finding.kind}: {finding.line}" for finding in findings[:_MOST_LINES])
    if len(findings) > _MOST_LINES:
        yield f"  and {len(findings) - _MOST_LINES} more, which the page has"


def page(title: str, checked: Checked, facts: Mapping[str, str]) -> str:
    """All of it as one self-contained page, with a few frames of the first episodes."""
    findings = html.table([(f.kind, f.line) for f in checked.findings]) or "<p>Nothing looks wrong.</p>"
    parts = [
        f"<header><h1>{html.text(title)}</h1></header>",
        html.section("What is in it", html.table(summary(checked, facts))),
        html.section("To look at", findings),
        html.section("Lengths", f'<div class="grid">{html.card("Control steps", _lengths(checked), ())}</div>'),
    ]
    for key, quantity in checked.quantities.items():
        head = (key, *_HEAD[1:])
        parts.append(html.section(f"{key.capitalize()}, by dimension", html.table(rows(quantity), head, "numbers")))
    figures = "".join(_figure(name, frames) for name, frames in checked.strips.items())
    parts.append(
        html.section("First, middle and last frame of the first episodes", f'<div class="grid">{figures}</div>')
    )
    words = sorted(checked.words.items(), key=lambda item: -item[1])
    parts.append(html.section("Instructions", html.table([(text, str(n)) for text, n in words], ("text", "episodes"))))
    return html.page(title, "".join(parts))


def _lengths(checked: Checked) -> str:
    steps = sorted(checked.lengths.tolist())
    # A line needs two points: a single episode is drawn twice.
    ys = steps if len(steps) > 1 else steps * 2
    series = charts.Series("control steps", [float(i) for i in range(len(ys))], [float(y) for y in ys])
    return charts.line_chart([series], "episodes, by length", lambda y: f"{y:g}")


def _figure(name: str, frames: Sequence[Shaped[np.ndarray, "h w 3"]]) -> str:
    images = "".join(f'<img alt="" src="{_data(frame)}">' for frame in frames)
    return f'<figure class="card"><div class="pair">{images}</div><figcaption>{html.text(name)}</figcaption></figure>'


def _data(frame: Shaped[np.ndarray, "h w 3"]) -> str:
    out = io.BytesIO()
    Image.fromarray(frame).save(out, "PNG")
    return f"data:image/png;base64,{base64.b64encode(out.getvalue()).decode()}"
