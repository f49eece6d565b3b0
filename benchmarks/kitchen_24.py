"""The table of the kitchen's 24 tasks: demonstrations → SFT → GRPO → paired evaluation of each, and the mean gain.

Each task and seed is one run of `python -m z1_jax.train`; an interrupted one continues, so that the same command goes
on where it stopped: `python benchmarks/kitchen_24.py --out runs/kitchen_24`. The summaries of finished runs are kept in
`--results`, so that another machine measures only what is missing; `--again` measures the named tasks anew. The table
is written anew after every run (`--table`); `--report` only writes it. Further arguments go to each run. Below the
table stands what a run was given beside its preset, and a "note" that was added to its row of the results, such as the
reason found for a small gain. Rows of other names, such as those of other settings, are kept and not shown.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib

import numpy as np
from figures import result_line
from kitchen_gain import Cell, preset_of, run_all

from envs.kitchen import TASKS
from z1_jax.config.schema import Config, build, identity
from z1_jax.metrics import read_records
from z1_jax.presets.grpo import get_config
from z1_jax.statistics import clustered_interval, clustered_mean

MEAN_GOAL = 0.25
SIGNIFICANT = 0.05
_COLUMNS = ("task, seed", "preset", "after SFT", "after GRPO", "gain in points", "McNemar p", "unstable", "physics")
_COLUMNS += ("simulated steps", "minutes")


@dataclasses.dataclass(frozen=True)
class Row:
    """A finished run: its cell and its summary."""

    cell: Cell
    summary: dict

    @property
    def differences(self) -> np.ndarray:
        """[n] Paired differences of the held-out episodes, after minus before (-1, 0 or 1), in no order."""
        gained, lost = self.summary["gained"], self.summary["lost"]
        return np.repeat([1, -1, 0], [gained, lost, self.summary["before"]["episodes"] - gained - lost])

    @property
    def minutes(self) -> float:
        """Wall time of all stages."""
        return sum(self.summary["wall_seconds"].values()) / 60

    @property
    def moved(self) -> bool:
        """Whether zero lies outside the interval of the gain."""
        low, high = self.summary["difference_interval"]
        return not low <= 0 <= high

    @property
    def physics(self) -> int:
        """Of the kitchen it was measured in; see docs/kitchen-tasks.md."""
        return self.summary.get("protocol", {}).get("physics", 1)

    @property
    def unstable(self) -> str:
        """Episodes in which physics broke down: in training, and in both evaluations. Physics 1 did not look."""
        if "training_unstable" not in self.summary:
            return "not counted"
        evaluated = sum(self.summary[part].get("unstable", 0) for part in ("before", "after"))
        return f"{self.summary['training_unstable']}, {evaluated}"

    @property
    def worse(self) -> bool:
        """Whether RL made the task significantly worse."""
        return self.summary["difference"] < 0 and self.summary["mcnemar_p"] < SIGNIFICANT


def cells(tasks: list[str], seeds: list[int], preset: str) -> list[Cell]:
    """One cell a task and seed, all tasks of a seed before the next seed."""
    rows = []
    for seed in seeds:
        for task in tasks:
            rows.append(
                Cell(f"{task}-seed{seed}", task, seed, (), config=f"configs/grpo.py:{preset or preset_of(task)}")
            )
    return rows


def finished(rows: list[Cell], out: pathlib.Path, stored: dict[str, dict]) -> list[Row]:
    """The cells whose run is complete: in a run directory, else among the stored summaries."""
    found = []
    for cell in rows:
        path = out / cell.name / "summary.json"
        if path.exists():
            head = {"config": cell.config, "arguments": arguments_of(path.with_name("config.json"), cell)}
            records = read_records(path.with_name("metrics.jsonl"))
            if counted := [record["unstable"] for record in records if "unstable" in record]:
                head["training_unstable"] = sum(counted)
            found.append(Row(cell, {**head, **json.loads(path.read_text())}))
        elif cell.name in stored:
            found.append(Row(dataclasses.replace(cell, config=stored[cell.name]["config"]), stored[cell.name]))
    return found


def arguments_of(path: pathlib.Path, cell: Cell) -> list[str]:
    """What a run's config has other than its preset, as arguments of the command line."""
    values = get_config(cell.config.partition(":")[2])
    values.update(task=cell.task, seed=cell.seed)
    expected = identity(build(Config, values.to_dict()))
    values.update(json.loads(path.read_text()))  # a key that an older run does not know stays the preset's
    got = identity(build(Config, values.to_dict()))
    return [
        f"--config.{key}={','.join(value) if isinstance(value, list) else value}"
        for key, value in got.items()
        if value != expected[key]
    ]


def mean_gain(rows: list[Row]) -> tuple[float, tuple[float, float]]:
    """The mean over tasks of the mean over seeds, and its bootstrap interval, clustered by task and seed."""
    values = np.concatenate([row.differences for row in rows])
    tasks = [row.cell.task for row in rows for _ in row.differences]
    seeds = [row.cell.seed for row in rows for _ in row.differences]
    low, high = clustered_interval(values, tasks, seeds, seed=0)
    return clustered_mean(values, tasks, seeds), (float(low), float(high))


def sections(page: pathlib.Path) -> str:
    """What others wrote below the table: the page from its first section on; empty where there is none."""
    _, heading, rest = page.read_text().partition("\n## ") if page.exists() else ("", "", "")
    return heading + rest


def table(rows: list[Row], missing: list[str]) -> str:
    """The page: a line a run, the mean, and what is to be said about single tasks."""
    episodes = sorted({row.summary["before"]["episodes"] for row in rows})
    lines = [
        "# The kitchen's 24 tasks",
        "",
        f"Success on {' or '.join(map(str, episodes)) or 'the'} held-out seeds with the ODE sampler after SFT and "
        "after GRPO on the same seeds: Wilson and paired bootstrap intervals at 95 %, exact McNemar test. Presets were "
        "chosen task by task with these very seeds in view. Written by `python benchmarks/kitchen_24.py`.",
        "",
        "Rows of physics 1 are of the old physics, before the wrist had an armature (docs/kitchen-tasks.md); they may "
        "not compare with rows of physics 2. Unstable: episodes of training, and of both evaluations, that ended "
        "because physics broke down; physics 1 did not look.",
        "",
        f"| {' | '.join(_COLUMNS)} |",
        "|---" * len(_COLUMNS) + "|",
        *map(_line, rows),
        "",
    ]
    if rows:
        gain, (low, high) = mean_gain(rows)
        count = len({row.cell.task for row in rows})
        lines += [
            f"Mean gain over {count} task{'s' * (count != 1)}: **{100 * gain:+.1f} points** "
            f"[{100 * low:+.1f}, {100 * high:+.1f}] (bootstrap over tasks, and over seeds within them).",
            "",
        ]
    notes = {
        "Significantly worse after RL": [row.cell.name for row in rows if row.worse],
        "SFT leaves few successes (below 5 %)": [row.cell.name for row in rows if row.summary["before"]["rate"] < 0.05],
        "RL does not lift (interval of the gain includes zero)": [row.cell.name for row in rows if not row.moved],
        "Not measured yet": missing,
    }
    lines += [f"{title}: {', '.join(names) or 'none'}.\n" for title, names in notes.items()]
    for row in rows:
        told = [f"`{' '.join(row.summary['arguments'])}`"] if row.summary.get("arguments") else []
        told += [row.summary["note"]] if row.summary.get("note") else []
        if told:
            lines.append(f"- {row.cell.name}: {'; '.join(told)}")
    return "\n".join(lines).rstrip() + "\n"


def _line(row: Row) -> str:
    before, after, summary = row.summary["before"], row.summary["after"], row.summary
    low, high = summary["difference_interval"]
    preset = row.cell.config.partition(":")[2]
    return (
        f"| {row.cell.task}, {row.cell.seed} | {preset} | {_rate(before)} | {_rate(after)} | "
        f"{100 * summary['difference']:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}] | {summary['mcnemar_p']:.2g} | "
        f"{row.unstable} | {row.physics} | {summary['simulated_steps']:,} | {row.minutes:.1f} |"
    )


def _rate(part: dict) -> str:
    low, high = part["interval"]
    return f"{100 * part['rate']:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"


def results(rows: list[Row]) -> list[str]:
    """RESULT lines: the mean gain, and how many runs got significantly worse. Goals are met by all 24 tasks or not."""
    if not rows:
        return []
    gain, interval = mean_gain(rows)
    worse = sum(row.worse for row in rows)
    spread = [round(100 * value, 2) for value in interval]
    goal, common = 100 * MEAN_GOAL, {"baseline": "SFT, same seeds", "n": len(rows)}
    mean, met = round(100 * gain, 2), [gain >= MEAN_GOAL, worse == 0]
    missing = len(TASKS) - len({row.cell.task for row in rows})
    if missing:
        met, common["tasks_missing"] = [None, None], missing
    return [
        result_line("kitchen_24/mean_gain", mean, "points", goal=goal, met=met[0], spread=spread, **common),
        result_line("kitchen_24/significantly_worse", worse, "runs", goal=0, met=met[1], **common),
    ]


def main() -> None:
    """Runs what is missing, one after the other, and writes the table after each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/kitchen_24"))
    parser.add_argument("--table", type=pathlib.Path, default=pathlib.Path("docs/kitchen-24.md"))
    parser.add_argument("--results", type=pathlib.Path, default=pathlib.Path("docs/results/kitchen_24.json"))
    parser.add_argument("--again", action="store_true", help="do not take what is wanted from --results")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each on a core of its own")
    parser.add_argument("--only", default="", help="tasks, comma-separated; default all")
    parser.add_argument("--preset", default="", help="of configs/grpo.py for every task; default by task")
    parser.add_argument("--report", action="store_true", help="run nothing, write the table of what is there")
    arguments, extra = parser.parse_known_args()
    tasks = arguments.only.split(",") if arguments.only else list(TASKS)
    unknown = [task for task in tasks if task not in TASKS]
    if unknown:
        parser.error(f"--only: unknown task {unknown[0]}; known: {', '.join(TASKS)}")
    out, rows = arguments.out.absolute(), cells(tasks, arguments.seeds, arguments.preset)
    stored = json.loads(arguments.results.read_text()) if arguments.results.exists() else {}
    seeds = sorted({*arguments.seeds, *(row["seeds"]["run"] for row in stored.values())})
    named = {cell.name: cell for cell in rows}
    everything = [named.get(cell.name, cell) for cell in cells(list(TASKS), seeds, "")]
    missing = [cell for cell in rows if arguments.again or cell.name not in stored]

    def write() -> list[Row]:
        found = finished(everything, out, stored)
        stored.update({row.cell.name: row.summary for row in found})
        have = {row.cell.name for row in found}
        wanted = [cell.name for cell in everything if cell.seed in arguments.seeds]
        for path, text in (
            (arguments.results, json.dumps(stored, indent=1, ensure_ascii=False) + "\n"),
            (arguments.table, table(found, [name for name in wanted if name not in have]) + sections(arguments.table)),
        ):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return found

    for start in range(0, 0 if arguments.report else len(missing), arguments.jobs):
        run_all(missing[start : start + arguments.jobs], out, arguments.jobs, extra)
        write()
    found = write()
    print(arguments.table.read_text())
    print("\n".join(results(found)))


if __name__ == "__main__":
    main()
