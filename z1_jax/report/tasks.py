"""What a report says of each task of a run that has several: success, training and its falls, a curve each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from z1_jax.report import charts, html
from z1_jax.report.series import running_mean, series

_PREFIX, _SUFFIX = "tasks/", "/success"


def table(summary: Mapping[str, Any]) -> str:
    """One row a task: rates, their paired difference, and how training went; empty where there is one task."""
    rates, trained = summary.get("after", {}).get("tasks", {}), summary.get("training_by_task", {})
    paired = summary.get("tasks", {})
    if not rates:
        return ""
    rows = [[task, *_compared(rates[task], paired.get(task)), *_trained(trained.get(task))] for task in rates]
    sides = [label.partition(":")[0] for label in summary.get("labels", ("before", "after"))]  # "A: run/sft/300"
    head = ["task", *sides, "difference", "McNemar"] if paired else ["task", "rate", "interval"]
    head += ["groups", "training success", "largest fall"] if trained else []
    note = (
        '<p class="note">Training success: mean of the last 10 iterations with groups of the task; the fall is that of '
        "this mean from its best before.</p>"
        if trained
        else ""
    )
    return html.section("Each task", html.table(rows, head, "numbers") + note)


def _compared(rate: Mapping[str, Any], paired: Mapping[str, Any] | None) -> list[str]:
    if paired is None:
        low, high = rate["interval"]
        return [f"{rate['rate']:.1%}", html.range((low, high))]
    low, high = paired["difference_interval"]
    return [
        f"{paired['before']['rate']:.1%}",
        f"{paired['after']['rate']:.1%}",
        f"{100 * paired['difference']:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]",
        html.p_value(float(paired["mcnemar_p"])),
    ]


def _trained(record: Mapping[str, Any] | None) -> list[str]:
    if record is None:
        return []
    success = "–" if record["success"] is None else f"{record['success']:.1%}"
    fall = "–" if record["fall"] is None else f"{100 * record['fall']:.1f} points"
    return [f"{record['groups']:,}", success, fall]


def curves(records: Sequence[dict[str, Any]]) -> str:
    """A card a task: its training success over the iterations in which it had groups."""
    keys = dict.fromkeys(key for record in records for key in record if _of_task(key))
    return "".join(_card(records, key) for key in keys)


def _of_task(key: str) -> bool:
    return key.startswith(_PREFIX) and key.endswith(_SUFFIX)


def _card(records: Sequence[dict[str, Any]], key: str) -> str:
    raw = series(records, "grpo", key, "each iteration", style="faint")
    shown = [raw, running_mean(raw)]
    chart = charts.line_chart(shown, "iteration", lambda rate: f"{100 * rate:.3g}%", y_range=(0.0, 1.0))
    task = key.removeprefix(_PREFIX).removesuffix(_SUFFIX)
    return html.card(f"Training success: {task}", chart, [(one.name, one.colour, one.style) for one in shown])
