"""Success of the scripted experts on fresh seeds, without and with the demonstrations' noise, in every split.

`python benchmarks/kitchen_experts.py --table docs/kitchen-tasks.md` writes the page; finished tasks are kept in `--out`
and read back. `--layout heldout --style heldout --objects heldout` measures the held-out kitchens.
"""

from __future__ import annotations

import argparse
import json
import pathlib
from collections.abc import Mapping

import numpy as np
from figures import result_line

from envs.base import Episode
from envs.kitchen import LAYOUT_SPLITS, OBJECT_SPLITS, STYLE_SPLITS, TASKS, KitchenEnv
from envs.kitchen.demos import disturb
from envs.kitchen.experts import make_expert

NOISES = (0.0, 0.2)  # none, and what demonstrations have by default
GOAL = 0.95


def run_episode(env: KitchenEnv, seed: int, noise: float) -> tuple[bool, int]:
    """Success and control steps of the expert's episode, without frames."""
    env.reset(Episode(seed))
    expert, disturbances = make_expert(env), disturb(seed, noise)[1]
    while not env.done:
        env.step_chunk((expert.act() + next(disturbances))[None])
    return env.success, env.steps


def measure(task: str, first: int, count: int, options: Mapping[str, str]) -> dict:
    """Successes and the median steps of successful episodes, for each noise, and an example of the instruction."""
    env = KitchenEnv(task, image_size=8, **options)
    found: dict = {"horizon": env.spec.horizon, "first": first, "count": count, "options": dict(options)}
    for noise in NOISES:
        outcomes = [run_episode(env, seed, noise) for seed in range(first, first + count)]
        steps = [steps for success, steps in outcomes if success]
        found[str(noise)] = {"successes": len(steps), "median": float(np.median(steps)) if steps else None}
    found["instructions"] = sorted({_instruction(env, seed) for seed in range(first, first + 60)})
    return found


def _instruction(env: KitchenEnv, seed: int) -> str:
    env.reset(Episode(seed))
    return env.observe().instruction


def table(rows: Mapping[str, dict]) -> str:
    """The lines of the page's table."""
    lines = [
        "| task | horizon | success | median steps | success with noise | median steps | an instruction |",
        "|---|---|---|---|---|---|---|",
    ]
    for task, row in rows.items():
        clean, noisy, count = row["0.0"], row["0.2"], row["count"]
        example = f"{row['instructions'][0]} ({len(row['instructions'])})"
        lines.append(
            f"| {task} | {row['horizon']} | {clean['successes']}/{count} | {clean['median']:.0f} | "
            f"{noisy['successes']}/{count} | {noisy['median']:.0f} | {example} |"
        )
    return "\n".join(lines)


def result(task: str, row: dict, noise: float) -> str:
    """A RESULT line; the goal is for the expert without noise."""
    value = row[str(noise)]["successes"] / row["count"]
    goal = GOAL if noise == 0 else None
    met = None if goal is None else value >= goal
    name = f"kitchen_experts/{task}/noise_{noise}"
    return result_line(name, value, "success", goal=goal, met=met, n=row["count"])


def main() -> None:
    """Measures what is missing and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/kitchen_experts"))
    parser.add_argument("--table", type=pathlib.Path, default=None, help="a page whose table is replaced")
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--first", type=int, default=9_000_000, help="first seed")
    parser.add_argument("--count", type=int, default=200, help="seeds")
    parser.add_argument("--layout", default="straight", help=f"also {', '.join(LAYOUT_SPLITS)}")
    parser.add_argument("--style", default="oak", help=f"also {', '.join(STYLE_SPLITS)}")
    parser.add_argument("--objects", choices=OBJECT_SPLITS, default="train")
    arguments = parser.parse_args()
    options = {"layout": arguments.layout, "style": arguments.style, "objects": arguments.objects}
    rows = {}
    for task in arguments.tasks.split(","):
        wanted = {"first": arguments.first, "count": arguments.count, "options": options}
        path = arguments.out / f"{task}-{'-'.join(options.values())}.json"
        row = json.loads(path.read_text()) if path.exists() else {}
        if any(row.get(key) != value for key, value in wanted.items()):
            row = measure(task, arguments.first, arguments.count, options)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(row, indent=1))
        rows[task] = row
        print(task, row["0.0"], row["0.2"], flush=True)
    lines = table(rows)
    if arguments.table:
        page = arguments.table.read_text()
        before, _, rest = page.partition("<!-- table -->\n")
        _, _, after = rest.partition("<!-- end -->\n")
        arguments.table.write_text(f"{before}<!-- table -->\n{lines}\n<!-- end -->\n{after}")
    print(lines)
    print("\n".join(result(task, row, noise) for task, row in rows.items() for noise in NOISES))


if __name__ == "__main__":
    main()
