"""Success of LIBERO's scripted experts on fresh placements, under a protocol's number of steps.

`python benchmarks/libero_experts.py --table docs/libero.md` writes the table into the page; finished tasks are kept in
`--out` and read back, so that it can be stopped and started, and run twice at once on different suites.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import time

import numpy as np
from figures import result_line

from envs import libero
from envs.base import Episode
from envs.libero import tables
from envs.libero.env import LiberoEnv
from envs.libero.experts import make_expert

SUITES = ("libero_object", "libero_spatial", "libero_goal")
GOAL = 0.9


def run_episode(env: LiberoEnv, seed: int) -> tuple[bool, int]:
    """Success and control steps of the expert's episode, without frames."""
    env.reset(Episode(seed))
    expert, done = make_expert(env), False
    while not done:
        done = env.step_chunk(expert.act()[None]).done
    return env.success, env.steps


def measure(task: str, first: int, count: int) -> dict:
    """Successes, the steps of successful episodes, and the seeds of the others."""
    env, began = libero.make(task), time.perf_counter()
    outcomes = {seed: run_episode(env, seed) for seed in range(first, first + count)}
    steps = [steps for success, steps in outcomes.values() if success]
    found = {
        "version": env.spec.version,
        "horizon": env.spec.horizon,
        "first": first,
        "count": count,
        "successes": len(steps),
        "steps": [float(np.percentile(steps, q)) for q in (0, 50, 100)] if steps else None,
        "failed": [seed for seed, (success, _) in outcomes.items() if not success],
        "seconds": round(time.perf_counter() - began, 1),
    }
    env.close()
    return found


def table(rows: dict[str, dict]) -> str:
    """The lines of the page's table."""
    lines = ["| task | success | steps: least, median, most | of at most |", "|---|---|---|---|"]
    for task, row in rows.items():
        steps = " / ".join(f"{value:.0f}" for value in row["steps"]) if row["steps"] else "–"
        lines.append(f"| {task} | {row['successes']}/{row['count']} | {steps} | {row['horizon']} |")
    for suite in dict.fromkeys(task.partition("/")[0] for task in rows):
        of_suite = [row for task, row in rows.items() if task.startswith(f"{suite}/")]
        successes, count = (sum(row[key] for row in of_suite) for key in ("successes", "count"))
        lines.append(f"| **{suite}**, {len(of_suite)} tasks | {successes}/{count} | | |")
    return "\n".join(lines)


def main() -> None:
    """Measures what is missing and prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/libero_experts"))
    parser.add_argument("--table", type=pathlib.Path, default=None, help="a page whose table is replaced")
    parser.add_argument("--suites", default=",".join(SUITES))
    parser.add_argument("--first", type=int, default=9_000_000, help="first seed")
    parser.add_argument("--count", type=int, default=50, help="seeds")
    given = parser.parse_args()
    rows = {}
    try:
        names = [task for suite in given.suites.split(",") for task in tables.tasks(suite)]
    except ValueError as error:
        parser.error(str(error))
    for task in names:
        path = given.out / f"{task.replace('/', '-')}.json"
        row = json.loads(path.read_text()) if path.exists() else {}
        if (row.get("first"), row.get("count")) != (given.first, given.count):
            row = measure(task, given.first, given.count)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(row, indent=1))
        rows[task] = row
        print(task, row, flush=True)
    lines = table(rows)
    if given.table:
        before, _, rest = given.table.read_text().partition("<!-- table -->\n")
        _, _, after = rest.partition("<!-- end -->\n")
        given.table.write_text(f"{before}<!-- table -->\n{lines}\n<!-- end -->\n{after}")
    print(lines)
    for task, row in rows.items():
        value = row["successes"] / row["count"]
        print(result_line(f"libero_experts/{task}", value, "success", goal=GOAL, met=value >= GOAL, n=row["count"]))


if __name__ == "__main__":
    main()
