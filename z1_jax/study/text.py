"""A study's tables as Markdown and as a page."""

from __future__ import annotations

from collections.abc import Sequence

from z1_jax.report import html
from z1_jax.statistics import Interval
from z1_jax.study.table import GROUPS, START, STEADY_END, STEADY_FALL, WINDOW, Elsewhere, Mean, Outcome, Row

NOTHING = "–"


def markdown(
    outcomes: Sequence[Outcome],
    over: Sequence[Mean],
    each: Sequence[Row],
    others: Sequence[Elsewhere],
    confidence: float,
) -> str:
    """Means, then one row a task and form, then the further evaluations; each table under a heading."""
    percent = f"{100 * confidence:g} %"
    parts = ["### Means", _means(outcomes, over, percent), "### Each task", _rows(each, percent), *_notes(each)]
    for heading, chosen in (
        ("Elsewhere", [one for one in others if not one.task or _alone(one, others)]),
        ("Elsewhere, each task", [one for one in others if one.task and not _alone(one, others)]),
    ):
        if chosen:
            parts += [f"### {heading}", _elsewhere(chosen, percent)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _means(outcomes: Sequence[Outcome], over: Sequence[Mean], percent: str) -> str:
    tasks = len({one.task for one in outcomes})
    head = [f"over {tasks} tasks", f"mean [{percent}]", f"difference [{percent}]", f"IQM [{percent}]", "IQM of"]
    body = []
    for mean in over:
        gain = "" if mean.form == START else _points(mean.difference, mean.difference_interval)
        iqm = f"{100 * mean.interquartile:.1f}"
        if mean.interquartile_interval:
            iqm = _rate(mean.interquartile, mean.interquartile_interval)
        of = f"{_count(mean.matrix[0], 'task')}, {_count(mean.matrix[1], 'training seed')}"
        body.append([mean.form, _rate(mean.rate, mean.interval), gain, iqm, of])
    return _table(head, body)


def _rows(each: Sequence[Row], percent: str) -> str:
    head = ["task", "form", "training seeds", START, "after", f"difference [{percent}]", "p (Holm)"]
    head += ["deviation of the end", "largest fall"]
    return _table(
        head,
        [
            [
                row.task,
                row.form,
                str(row.seeds),
                f"{100 * row.before:.1f}",
                f"{100 * row.after:.1f}",
                _points(row.after - row.before, row.interval),
                f"{row.p_value:.2g}",
                NOTHING if row.deviation is None else f"{100 * row.deviation:.1f}",
                NOTHING if row.fall is None else f"{100 * row.fall:.1f}",
            ]
            for row in each
        ],
    )


def _notes(each: Sequence[Row]) -> list[str]:
    """What the rows say together of steadiness, and what their intervals hold."""
    found = [
        "Deviation: standard deviation of the rate after RL over training seeds, in points. Largest fall: how far the "
        f"mean of {WINDOW} iterations of training success falls below that of the first {WINDOW}, in points; of joint "
        f"RL, of as many as hold {GROUPS} groups of the task."
    ]
    for form in dict.fromkeys(row.form for row in each):
        mine = [row for row in each if row.form == form]
        known = [row.deviation for row in mine if row.deviation is not None]
        alone = sum(row.seeds == 1 for row in mine)
        steady = sum(value <= STEADY_END for value in known)
        told = [f"on {steady} of {_count(len(known), 'task')} the end deviates by at most {100 * STEADY_END:g} points"]
        falls = [row.task for row in mine if row.fall is not None and row.fall > STEADY_FALL]
        told.append(f"training success falls by more than {100 * STEADY_FALL:g} points on {', '.join(falls) or 'none'}")
        if known:
            told.append(
                "intervals and p of tasks are widened by the deviation over training seeds that these show together"
            )
        elif alone:
            told.append("intervals and p hold the noise of the evaluation alone, none of training: there is one seed")
        found.append(f"{form}: {'; '.join(told if known else told[1:])}.")
        worse = [row.task for row in mine if row.after < row.before and row.p_value < 0.05]
        found.append(
            f"{form}: significantly worse after RL (p < 0.05 after Holm's correction): {', '.join(worse) or 'none'}."
        )
    return found


def _alone(one: Elsewhere, others: Sequence[Elsewhere]) -> bool:
    """Whether an evaluation is of one task, which is then its own mean."""
    return not any(other.evaluation == one.evaluation and not other.task for other in others)


def _elsewhere(others: Sequence[Elsewhere], percent: str) -> str:
    head = ["evaluation", "task", "form", "usual", f"there [{percent}]", f"there − usual [{percent}]"]
    head.append(f"gain over {START} there [{percent}]")
    return _table(
        head,
        [
            [
                one.evaluation,
                one.task or "mean",
                one.form,
                f"{100 * one.usual:.1f}",
                _rate(one.rate, one.interval),
                _points(one.change, one.change_interval),
                "" if one.gain is None or one.gain_interval is None else _points(one.gain, one.gain_interval),
            ]
            for one in others
        ],
    )


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _rate(rate: float, interval: Interval) -> str:
    return f"{100 * rate:.1f} [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"


def _points(difference: float, interval: Interval) -> str:
    return f"{100 * difference:+.1f} [{100 * interval[0]:+.1f}, {100 * interval[1]:+.1f}]"


def page(text: str, title: str) -> str:
    """The Markdown as a page."""
    parts: list[str] = [f"<header><h1>{html.text(title)}</h1></header>"]
    for part in text.strip().split("\n\n"):
        if part.startswith("### "):
            parts.append(html.section(part.removeprefix("### "), ""))
        elif part.startswith("|"):
            table = [[cell.strip() for cell in line.strip("|").split("|")] for line in part.splitlines()]
            parts.append(html.table(table[2:], table[0], "numbers"))
        else:
            parts.append(f'<p class="note">{html.text(part)}</p>')
    return html.page(title, "".join(parts))
