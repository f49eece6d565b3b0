"""How often the kitchen's physics breaks down, per task and kind of actions, and what such episodes used to count as.

`python benchmarks/kitchen_stability.py` goes on where it stopped: counts are kept in `--results`, blocks of episodes of
all tasks in turn. `--report` only prints. Kinds of actions: `random`, uniform in [-1, 1] at each control step;
`saturated`, -1 or 1 in each dimension, held for eight steps; `expert`, the scripted expert with the noise of
demonstrations. `wrong` counts unstable episodes that are successes where nobody looks: physics breaks, the episode goes
on to its horizon, and at some step the task's check holds.
"""

from __future__ import annotations

import argparse
import json
import pathlib
from collections.abc import Iterator

import mujoco
import numpy as np
from figures import result_line

from envs.base import Episode
from envs.kitchen import TASKS, KitchenEnv
from envs.kitchen.demos import disturb
from envs.kitchen.experts import make_expert
from envs.kitchen.robot import SUBSTEPS

RESULTS = pathlib.Path(__file__).parent.parent / "docs" / "results" / "kitchen_stability.json"
KINDS = {"random": 10_000, "saturated": 4_000, "expert": 1_000}  # episodes a task
AFFECTED = ("TurnOffSinkFaucet", "CloseDrawer", "CloseSingleDoor", "CloseDoubleDoor", "TurnOffStove", "TurnSinkSpout")
BLOCK = 100  # episodes between two writes
HELD = 8  # control steps that a saturated action lasts
NOISE = 0.2  # of the experts, as for demonstrations


def actions_of(kind: str, env: KitchenEnv, seed: int) -> Iterator[np.ndarray]:
    """The actions [12] of a seed's episode, which has just been reset."""
    horizon, width = env.spec.horizon, env.spec.action_dim
    if kind == "expert":
        expert, (_, noise) = make_expert(env), disturb(seed, NOISE)
        for disturbance in noise:
            yield expert.act() + disturbance
    elif kind == "saturated":
        rng = np.random.default_rng([seed, 8])
        yield from np.repeat(rng.choice([-1.0, 1.0], (-(-horizon // HELD), width)), HELD, axis=0)
    else:
        yield from np.random.default_rng([seed, 7]).uniform(-1.0, 1.0, (horizon, width))


def run_episode(env: KitchenEnv, kind: str, seed: int, counts: dict) -> None:
    """Adds one episode to the counts of its task and kind."""
    env.reset(Episode(seed))
    fastest, actions = 0.0, actions_of(kind, env, seed)
    while not env.done:
        env.step_chunk(next(actions)[None])
        fastest = max(fastest, float(np.abs(env.world.data.qvel).max()))
    counts["episodes"] += 1
    counts["successes"] += env.success
    if env.broken:
        found = {"seed": seed, "step": env.steps, "cause": env.broken, "wrong": unguarded(env, kind, seed)}
        counts["wrong"] += found["wrong"]
        counts["unstable"].append(found)
    else:
        counts["fastest"] = max(counts["fastest"], round(fastest, 1))


def unguarded(env: KitchenEnv, kind: str, seed: int) -> bool:
    """Whether the episode of a seed is a success where breakdowns do not end it."""
    env.reset(Episode(seed))
    world = env.world
    for _, action in zip(range(env.spec.horizon), actions_of(kind, env, seed), strict=False):
        world.controller.apply(action)
        mujoco.mj_step(world.model, world.data, nstep=SUBSTEPS)
        world.update()
        env.task.update(world)
        if env.task.success(world):
            return True
    return False


def new_counts() -> dict:
    """Counts of a task and kind; `fastest` is the highest speed of a joint in a stable episode, m/s or rad/s."""
    return {"episodes": 0, "successes": 0, "wrong": 0, "fastest": 0.0, "unstable": []}


def lines(stored: dict[str, dict]) -> Iterator[str]:
    """A RESULT line a task and kind: breakdowns in 10,000 episodes, which were wrong successes before, none after."""
    for name, counts in stored.items():
        rate = 10_000 / counts["episodes"]
        yield result_line(
            f"kitchen/unstable/{name}",
            round(rate * len(counts["unstable"]), 2),
            "in 10,000 episodes",
            n=counts["episodes"],
            unstable=len(counts["unstable"]),
            wrong_successes_before=counts["wrong"],
            wrong_successes=0,
        )


def table(stored: dict[str, dict]) -> str:
    """A line a task: unstable of all episodes of each kind; how many of the unstable ones were successes."""
    tasks = sorted({name.partition("/")[0] for name in stored}, key=list(TASKS).index)
    rows = ["| task | " + " | ".join(f"{kind} | wrong" for kind in KINDS) + " |", "|---" * (1 + 2 * len(KINDS)) + "|"]
    for task in tasks:
        cells = [stored.get(f"{task}/{kind}") for kind in KINDS]
        texts = [f"{len(c['unstable'])} of {c['episodes']:,} | {c['wrong']}" if c else "– | –" for c in cells]
        rows.append(f"| {task} | {' | '.join(texts)} |")
    return "\n".join(rows)


def main() -> None:
    """Measures what is missing, and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", default=",".join(AFFECTED), help="or all (%(default)s)")
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--episodes", type=int, help="a task and kind; default: " + str(KINDS))
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS)
    parser.add_argument("--report", action="store_true", help="measure nothing")
    arguments = parser.parse_args()
    stored = json.loads(arguments.results.read_text()) if arguments.results.exists() else {}
    tasks = list(TASKS) if arguments.tasks == "all" else arguments.tasks.split(",")
    goals = {
        f"{task}/{kind}": arguments.episodes or KINDS[kind] for task in tasks for kind in arguments.kinds.split(",")
    }
    envs: dict[str, KitchenEnv] = {}
    done = lambda name: stored.get(name, new_counts())["episodes"]  # noqa: E731
    while not arguments.report and (left := [name for name in goals if done(name) < goals[name]]):
        name = min(left, key=lambda name: done(name) / goals[name])
        task, kind = name.split("/")
        env = envs.setdefault(task, KitchenEnv(task))
        counts = stored.setdefault(name, new_counts())
        for seed in range(counts["episodes"], min(counts["episodes"] + BLOCK, goals[name])):
            run_episode(env, kind, seed, counts)
        aside = arguments.results.with_suffix(".tmp")
        aside.write_text(json.dumps(dict(sorted(stored.items())), indent=1))
        aside.replace(arguments.results)
        print(f"{name}: {counts['episodes']} episodes, {len(counts['unstable'])} unstable", flush=True)
    print(table(stored))
    print("\n".join(lines(stored)))


if __name__ == "__main__":
    main()
