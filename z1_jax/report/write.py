"""One self-contained HTML page about a run: headline, intervals, protocol, curves, videos.

    python -m z1_jax.report RUN_DIR

Reads only files of the run directory; what is missing or damaged is left out with a note.
"""

from __future__ import annotations

import base64
import dataclasses
import itertools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from z1_jax.files import write_whole
from z1_jax.metrics import METRICS, read_records
from z1_jax.report import charts, html, tasks
from z1_jax.report.series import at, running_mean, series
from z1_jax.statistics import wilson_interval

Records = list[dict[str, Any]]
REPORT = "report.html"
COMMANDS = "commands.jsonl"  # the command lines that worked on a run, and when each began
MOST_FILMS = 16  # that a page of several tasks embeds: of 24 tasks all would be tens of megabytes
SUFFIXES = {".webp": "image/webp", ".gif": "image/gif", ".png": "image/png"}


@dataclasses.dataclass(frozen=True)
class Curve:
    """One chart: which numbers of which stage, and how to show them."""

    title: str
    stage: str
    keys: Mapping[str, str]  # key of the record -> name in the legend
    form: charts.Format = charts.short
    x_label: str = "iteration"
    y_range: tuple[float, float] | None = None
    log: bool = False
    stacked: bool = False
    note: str = ""
    when_positive: bool = False  # drawn only where a number is above zero


def _percent(value: float) -> str:
    return f"{100 * value:.3g}%"


def _seconds(value: float) -> str:
    return f"{value:.3g} s"


TIMES = ("simulate", "render", "sample", "update", "idle")
CURVES = (
    Curve(
        "SFT loss",
        "sft",
        {"loss": "training", "validation/trained": "trained episodes", "validation/held_out": "held-out episodes"},
        x_label="step",
    ),
    Curve(
        "Groups", "grpo", {"groups/kept": "kept", "groups/all_success": "all succeed", "groups/all_fail": "all fail"}
    ),
    Curve(
        "Largest |ratio − 1| before the first update",
        "grpo",
        {"ratio/first_update_max_error": "error"},
        log=True,
        note="How well the trainer recomputes the sampler's log-probabilities: rounding only.",
    ),
    Curve(
        "Unstable episodes",
        "grpo",
        {"unstable": "each iteration"},
        note="The simulation broke down: counted as failures.",
        when_positive=True,
    ),
    Curve("Clip fraction", "grpo", {"clip_fraction": "clipped"}, form=_percent),
    Curve("Importance ratio", "grpo", {"ratio/mean": "mean", "ratio/max": "largest"}),
    Curve("Approximate KL", "grpo", {"approx_kl": "KL"}),
    Curve("Gradient norm", "grpo", {"grad_norm": "norm"}),
    Curve("Time per iteration", "grpo", {f"time/{name}": name for name in TIMES}, form=_seconds, stacked=True),
    Curve("Simulated control steps, in all", "grpo", {"steps/total": "steps"}),
)


def write_report(run_dir: str | os.PathLike) -> Path:
    """Writes `run_dir`/report.html and returns its path.

    Raises:
      ValueError: `run_dir` is not the directory of a run.
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise ValueError(f"{run_dir} is not a directory: expected the directory of a run")
    if not any((run_dir / name).exists() for name in ("config.json", METRICS, "summary.json")):
        raise ValueError(f"{run_dir} is not a run directory: expected config.json, {METRICS} or summary.json in it")
    notes: list[str] = []
    summary = _read_object(run_dir / "summary.json", notes)
    config = _read_object(run_dir / "config.json", notes)
    records = _read_metrics(run_dir / METRICS, notes)

    body = [
        _attempt("headline", notes, _headline, run_dir, summary, _read_commands(run_dir / COMMANDS, notes)),
        _attempt("results", notes, _results, summary),
        _attempt("each task", notes, tasks.table, summary),
        _attempt("videos", notes, _videos, run_dir, summary, notes),
        _attempt("curves", notes, _curves, records, notes),
        _attempt("protocol", notes, _protocol, summary),
        _attempt("cost", notes, _cost, summary),
        _attempt("config", notes, _config, config),
        _notes(notes),
    ]
    path = run_dir / REPORT
    write_whole(path, html.page(_tasks(run_dir, summary), "\n".join(body)))
    return path


# --- sections ------------------------------------------------------------------------------------------------------


def _headline(run_dir: Path, summary: dict, commands: Records) -> str:
    named = _tasks(run_dir, summary)
    told = ", ".join(f"“{text}”" for text in summary.get("instructions", ()))
    sentence = summary.get("sentence") or _sentence(summary)
    lines = [html.text(f"{named}: {told}" if told else named), *_origin(summary, commands)]
    head, *rest = (f'<p class="task">{line}</p>' for line in lines)
    return f"<header>{head}<h1>{html.text(sentence)}</h1>{''.join(rest)}</header>"


def _tasks(run_dir: Path, summary: dict) -> str:
    task = summary.get("task", run_dir.name)
    return ", ".join(map(str, task)) if isinstance(task, list) else str(task)


def _origin(summary: dict, commands: Records) -> list[str]:
    """When a run was made, by which command and in what time, as far as its files tell."""
    facts = [f"begun {commands[0]['began']}"] if commands else []
    facts += [f"ended {summary['ended']}"] if "ended" in summary else []
    if seconds := summary.get("wall_seconds"):
        facts.append(f"{html.duration(sum(map(float, seconds.values())))} in all stages")
    facts += [f"{len(commands)} starts, the last one with this command"] if len(commands) > 1 else []
    lines = [html.text(", ".join(facts))] if facts else []
    return lines + ([html.code(commands[-1]["command"])] if commands else [])


def _sentence(summary: dict) -> str:
    if "before" in summary and "after" in summary:
        before, after = _rate(summary["before"]), _rate(summary["after"])
        return (
            f"Success went from {before:.1%} to {after:.1%} on the same {summary['after']['episodes']} held-out seeds."
        )
    return "This run has no summary yet: it was not finished, or not evaluated."


def _results(summary: dict) -> str:
    labels = _labels(summary)
    rows = [(label, summary[key]) for label, key in zip(labels, ("before", "after"), strict=True) if key in summary]
    if not rows:
        return ""
    chart = charts.interval_chart([(label, _rate(row), _interval(row)) for label, row in rows])
    table = [
        [label, f"{row['successes']} of {row['episodes']}", f"{_rate(row):.1%}", html.range(_interval(row))]
        for label, row in rows
    ]
    facts = [
        [f"{label}: failures by {what}", f"{row[key]:,}"]
        for label, row in rows
        for key, what in (("unstable", "unstable physics"), ("lost", "environments that broke down"))
        if row.get(key)
    ]
    if summary.get("groups_lost"):
        facts.append(["training groups dropped: an environment broke down", f"{summary['groups_lost']:,}"])
    if summary.get("difference") is not None:
        text = f"{100 * summary['difference']:+.1f} points"
        if summary.get("difference_interval"):
            low, high = summary["difference_interval"]
            text += f" [{100 * low:+.1f}, {100 * high:+.1f}]"
        base, other = labels
        named = "B minus A" if "labels" in summary else f"{other} minus {base[:1].lower()}{base[1:]}"
        facts.append([f"{named}, paired by seed", text])
    if summary.get("mcnemar_p") is not None:
        facts.append(["Exact McNemar test, two-sided", html.p_value(float(summary["mcnemar_p"]))])
    confidence = summary.get("protocol", {}).get("confidence", 0.95)
    columns = ["", "successes", "rate", f"{100 * confidence:g} % (Wilson)"]
    tables = html.table(table, columns, "numbers") + html.table(facts, (), "numbers")
    return html.section(
        "Result",
        f'<div class="split"><div class="card">{chart}</div><div>{tables}{_remarks(summary)}</div></div>',
    )


def best_sentence(best: Mapping[str, Any]) -> str:
    """Which checkpoint of RL is the best that is kept, and by what."""
    rate, window = f"{100 * best['success']:.1f} %", best["window"]
    head = f"grpo/{best['step']}, training success {rate}"
    if "tasks" in best:
        return f"{head}, the mean over {best['tasks']} tasks of the last {window} iterations with groups of each"
    return f"{head} over the {window} iterations before it"


def _labels(summary: dict) -> tuple[str, str]:
    base, other = summary.get("labels", ("Before RL", "After RL"))
    return str(base), str(other)


def _remarks(summary: dict) -> str:
    best = summary.get("best_checkpoint")
    lines = [f"Best checkpoint: {best_sentence(best)}."] if best else []
    lines += [f"Repeated: {summary['repeats']}."] if "repeats" in summary else []
    return "".join(f'<p class="note">{html.text(line)}</p>' for line in lines)


def _videos(run_dir: Path, summary: dict, notes: list[str]) -> str:
    cards = []
    names: dict[str, str] = dict(zip(("before", "after"), _labels(summary), strict=True))
    pairs = summary.get("videos") or []
    shown = _some_of_each_task(pairs, names)
    if len(shown) < len(pairs):
        notes.append(f"Of {len(pairs)} filmed episodes {len(shown)} are shown; all films are in {run_dir / 'videos'}.")
    for pair in shown:
        images = []
        for side in (side for side in names if side in pair):
            source = _embedded(run_dir, pair[side], notes)
            if source:
                verdict = {True: "✓ success", False: "✗ failure"}.get(pair.get(f"{side}_success"), "")
                images.append(
                    f'<figure><img src="{source}" alt="{html.text(names[side])}, seed {html.text(pair.get("seed"))}">'
                    f"<figcaption>{html.text(names[side])} <b>{verdict}</b></figcaption></figure>"
                )
        if images:
            task = f"{html.text(pair['task'])}, seed" if "task" in pair else "Seed"
            seed = f"<p>{task} {html.text(pair.get('seed'))}</p>"
            cards.append(f'<div class="card">{seed}<div class="pair">{"".join(images)}</div></div>')
    rule = f'<p class="note">{html.text(summary["videos_rule"])}</p>' if "videos_rule" in summary else ""
    return html.section("Episodes", f'{rule}<div class="grid">{"".join(cards)}</div>') if cards else ""


def _some_of_each_task(pairs: Sequence[Any], sides: Mapping[str, str]) -> list[Any]:
    """Of several tasks so many pairs that there are at most MOST_FILMS films: of each task the first, then the next."""
    if len({pair.get("task") for pair in pairs}) < 2:
        return list(pairs)
    places: dict[Any, int] = {}
    order = []
    for number, pair in enumerate(pairs):
        place = places[pair.get("task")] = places.get(pair.get("task"), -1) + 1
        order.append((place, number))
    chosen: list[int] = []
    films = 0
    for _, number in sorted(order):
        films += sum(side in pairs[number] for side in sides)
        if films > MOST_FILMS:
            break
        chosen.append(number)
    return [pairs[number] for number in sorted(chosen)]


def _curves(records: Records, notes: list[str]) -> str:
    cards = [_attempt("training success", notes, _success_curve, records)]
    cards.append(_attempt("training success of each task", notes, tasks.curves, records))
    cards += [_attempt(curve.title, notes, _curve, curve, records) for curve in CURVES]
    cards = [card for card in cards if card]
    if not cards:
        notes.append("metrics.jsonl holds no numbers to draw yet.")
        return ""
    return html.section("Training", f'<div class="grid">{"".join(cards)}</div>')


def _success_curve(records: Records) -> str:
    raw = series(records, "grpo", "success", "each iteration", style="faint")
    shown = [one for one in (raw, running_mean(raw)) if one.xs]
    if not raw.xs:
        return ""
    chart = charts.line_chart(shown, "iteration", _percent, y_range=(0.0, 1.0))
    return html.card("Success of training rollouts", chart, [(one.name, one.colour, one.style) for one in shown])


def _curve(curve: Curve, records: Records) -> str:
    shown = [
        series(records, curve.stage, key, name, colour=index) for index, (key, name) in enumerate(curve.keys.items())
    ]
    shown = [one for one in shown if any(y is not None for y in one.ys)]
    if not shown or (curve.when_positive and not any(y and y > 0 for one in shown for y in one.ys)):
        return ""
    if curve.stacked:
        xs = sorted({x for one in shown for x in one.xs})
        shown = [dataclasses.replace(one, xs=xs, ys=at(one, xs)) for one in shown]
        chart = charts.stacked_chart(shown, curve.x_label, curve.form)
    else:
        chart = charts.line_chart(shown, curve.x_label, curve.form, curve.y_range, curve.log)
    return html.card(curve.title, chart, [(one.name, one.colour, one.style) for one in shown], curve.note)


def _protocol(summary: dict) -> str:
    rows = [[key, html.value(value)] for key, value in _flat(summary.get("protocol") or {})]
    if "seeds" in summary:
        rows.append(["seeds", html.value(summary["seeds"])])
    for change in summary.get("lengths") or []:
        text = (
            f"{change['was']} → {change['wanted']} after {change['done']}; schedules follow the new length from there"
        )
        rows.append([change["key"], text])
    return html.section("Protocol of the evaluation", html.table(rows)) if rows else ""


def _cost(summary: dict) -> str:
    seconds = {stage: float(s) for stage, s in (summary.get("wall_seconds") or {}).items()}
    rows = [[f"{stage}, wall time", html.duration(s)] for stage, s in seconds.items()]
    rows += [["all stages", html.duration(sum(seconds.values()))]] if len(seconds) > 1 else []
    if summary.get("simulated_steps") is not None:
        rows.append(["simulated control steps", f"{int(summary['simulated_steps']):,}"])
    return html.section("Cost", html.table(rows)) if rows else ""


def _config(config: dict) -> str:
    rows = [[key, html.value(value)] for key, value in _flat(config)]
    return (
        html.section("Config", f"<details><summary>{len(rows)} values</summary>{html.table(rows)}</details>")
        if rows
        else ""
    )


def _notes(notes: Sequence[str]) -> str:
    return (
        html.section("Left out", "<ul>" + "".join(f"<li>{html.text(note)}</li>" for note in notes) + "</ul>")
        if notes
        else ""
    )


def _attempt(what: str, notes: list[str], build: Callable[..., str], *args: Any) -> str:
    """A section, or a note where its data does not have the expected form: half a run still gets its page."""
    try:
        return build(*args)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        notes.append(f"The section “{what}” could not be made: {type(error).__name__}: {error}")
        return ""


# --- reading -------------------------------------------------------------------------------------------------------


def _read_object(path: Path, notes: list[str]) -> dict:
    if not path.exists():
        notes.append(f"{path.name} is missing: what it holds is not shown.")
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        notes.append(f"{path.name} is damaged and not shown: {error}")
        return {}
    if not isinstance(content, dict):
        notes.append(f"{path.name} does not hold a JSON object and is not shown.")
        return {}
    return content


def _read_metrics(path: Path, notes: list[str]) -> Records:
    try:
        if not path.exists():
            notes.append(f"{path.name} is missing: no curves.")
        return _once(read_records(path), path, notes)
    except ValueError as error:
        notes.append(f"No curves: {error}")
        return []


def _read_commands(path: Path, notes: list[str]) -> Records:
    try:
        return [row for row in read_records(path) if {"began", "command"} <= row.keys()]
    except ValueError as error:
        notes.append(f"No command: {error}")
        return []


def _once(records: Records, path: Path, notes: list[str]) -> Records:
    """The records of stages whose steps each appear once and in order; others are a mix of several runs."""
    steps: dict[Any, list[int]] = {}
    for record in records:
        if isinstance(record.get("step"), int):
            steps.setdefault(record.get("stage"), []).append(record["step"])
    mixed = [stage for stage, told in steps.items() if any(b <= a for a, b in itertools.pairwise(told))]
    for stage in mixed:
        notes.append(f"No curves of {stage}: {path.name} tells of steps twice or out of order, so of several runs.")
    return [record for record in records if record.get("stage") not in mixed]


def _embedded(run_dir: Path, name: Any, notes: list[str]) -> str:
    path = (run_dir / str(name)).resolve()
    if name is None or path.suffix not in SUFFIXES or not path.is_relative_to(run_dir.resolve()) or not path.is_file():
        notes.append(f"The video {name} is missing, outside the run directory, or not one of {', '.join(SUFFIXES)}.")
        return ""
    return f"data:{SUFFIXES[path.suffix]};base64,{base64.b64encode(path.read_bytes()).decode()}"


def _rate(row: dict) -> float:
    return float(row["rate"]) if row.get("rate") is not None else row["successes"] / row["episodes"]


def _interval(row: dict) -> tuple[float, float]:
    low, high = row.get("interval") or wilson_interval(row["successes"], row["episodes"])
    return float(low), float(high)


def _flat(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for key, value in tree.items():
        rows += _flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else [(f"{prefix}{key}", value)]
    return rows
