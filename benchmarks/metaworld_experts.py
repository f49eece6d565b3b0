"""Success of Meta-World's own scripted experts on fresh seeds, within LeRobot's 500 control steps, and within fewer.

`python benchmarks/metaworld_experts.py --table docs/metaworld.md` writes the table into the page, and what was measured
into `--out`, from which finished tasks are read back.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import time

import numpy as np
from figures import result_line

from envs import metaworld
from envs.base import Episode
from envs.metaworld import tables
from envs.metaworld.env import MetaWorldEnv
from envs.metaworld.suite import make_expert

WITHIN = (100, 200, 500)  # control steps: RLinf's, those of the protocol `quick`, LeRobot's
MEANS = ("MT10", "MT50", "easy", "medium", "hard", "very_hard")
GOAL = 0.9


def run_episode(env: MetaWorldEnv, seed: int) -> tuple[bool, int, str]:
    """Success, control steps and what broke down in the expert's episode, without frames."""
    env.reset(Episode(seed))
    expert, done = make_expert(env), False
    while not done:
        done = env.step_chunk(expert.act()[None]).done
    return env.success, env.steps, env.broken


def measure(task: str, first: int, count: int) -> dict:
    """Successes, the steps of successful episodes, and the seeds of the others."""
    env, began = metaworld.make(task), time.perf_counter()
    outcomes = {seed: run_episode(env, seed) for seed in range(first, first + count)}
    steps = [taken for success, taken, _ in outcomes.values() if success]
    found = {
        "version": env.spec.version,
        "first": first,
        "count": count,
        "successes": {str(limit): sum(taken <= limit for taken in steps) for limit in WITHIN},
        "steps": [float(np.percentile(steps, q)) for q in (0, 50, 100)] if steps else None,
        "failed": [seed for seed, (success, *_) in outcomes.items() if not success],
        "unstable": [seed for seed, (*_, broken) in outcomes.items() if broken],
        "seconds": round(time.perf_counter() - began, 1),
    }
    env.close()
    return found


def table(rows: dict[str, dict]) -> str:
    """The lines of the page's table."""
    limits = " | ".join(f"in {limit}" for limit in WITHIN)
    lines = [f"| task | {limits} | steps: least, median, most |", "|---|" + "---|" * (len(WITHIN) + 1)]
    for task, row in rows.items():
        steps = " / ".join(f"{value:.0f}" for value in row["steps"]) if row["steps"] else "–"
        rates = " | ".join(f"{row['successes'][str(limit)]}/{row['count']}" for limit in WITHIN)
        lines.append(f"| {task} | {rates} | {steps} |")
    for name in MEANS:
        of_set = [rows[task] for task in tables.SETS[name] if task in rows]
        if len(of_set) == len(tables.SETS[name]):
            means = [np.mean([row["successes"][str(limit)] / row["count"] for row in of_set]) for limit in WITHIN]
            lines.append(f"| **{name}**, {len(of_set)} tasks | {' | '.join(f'{mean:.1%}' for mean in means)} | |")
    return "\n".join(lines)


def main() -> None:
    """Measures what is missing and prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("docs/results/metaworld_experts.json"))
    parser.add_argument("--table", type=pathlib.Path, default=None, help="a page whose table is replaced")
    parser.add_argument("--tasks", default="MT50", help="a named set, or tasks with commas between them")
    parser.add_argument("--first", type=int, default=9_000_000, help="first seed")
    parser.add_argument("--count", type=int, default=50, help="seeds")
    given = parser.parse_args()
    known = json.loads(given.out.read_text()) if given.out.exists() else {}
    rows = {}
    for task in tables.SETS.get(given.tasks, tuple(given.tasks.split(","))):
        row = known.get(task, {})
        if (row.get("first"), row.get("count")) != (given.first, given.count):
            row = known[task] = measure(task, given.first, given.count)
            given.out.write_text(json.dumps(known, indent=1) + "\n")
        rows[task] = row
        print(task, row, flush=True)
    lines = table(rows)
    if given.table:
        before, _, rest = given.table.read_text().partition("<!-- table -->\n")
        _, _, after = rest.partition("<!-- end -->\n")
        given.table.write_text(f"{before}<!-- table -->\n{lines}\n<!-- end -->\n{after}")
    print(lines)
    for task, row in rows.items():
        value = row["successes"][str(WITHIN[-1])] / row["count"]
        print(result_line(f"metaworld_experts/{task}", value, "success", goal=GOAL, met=value >= GOAL, n=row["count"]))


if __name__ == "__main__":
    main()
