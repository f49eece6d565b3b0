"""Cost of the built-in kitchen on one core: control steps a second without frames, and milliseconds a frame, per task.

`python benchmarks/kitchen.py`; `--tasks A,B` for some. Steps are those of the experts' episodes, stepped again without
the expert; times are process CPU time, so that other work on the machine hardly counts. Below stands how often physics
breaks down, as counted by `benchmarks/kitchen_stability.py`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import numpy as np
from figures import result_line
from kitchen_stability import RESULTS as STABILITY
from kitchen_stability import lines as stability_lines

from envs.base import Episode
from envs.kitchen import CAMERAS, TASKS, KitchenEnv
from envs.kitchen.experts import make_expert

STEPS_GOAL = 1000.0  # control steps a second on one core
REPEATS = 5
FIRST_SEED = 50_000


def recorded(env: KitchenEnv, seed: int) -> np.ndarray:
    """The expert's actions [N, 12] in the episode of a seed."""
    env.reset(Episode(seed))
    expert, actions = make_expert(env), []
    while not env.done:
        actions.append(expert.act())
        env.step_chunk(actions[-1][None])
    return np.stack(actions)


def seconds(work: Callable[[], object]) -> float:
    """CPU seconds that `work` takes."""
    began = time.process_time()
    work()
    return time.process_time() - began


def steps_per_second(env: KitchenEnv, episodes: int) -> list[float]:
    """Control steps a CPU second, once a repeat: the experts' actions in chunks of eight."""
    plans = [(seed, recorded(env, seed)) for seed in range(FIRST_SEED, FIRST_SEED + episodes)]
    rates = []
    for _ in range(REPEATS):
        steps, spent = 0, 0.0
        for seed, actions in plans:
            env.reset(Episode(seed))
            chunks = [actions[i : i + 8] for i in range(0, len(actions), 8)]
            spent += seconds(lambda chunks=chunks: [env.step_chunk(chunk) for chunk in chunks])
            steps += env.steps
        rates.append(steps / spent)
    return rates


def frame_milliseconds(env: KitchenEnv, size: int, frames: int) -> list[float]:
    """CPU milliseconds a frame of the first two cameras, once a repeat."""
    env.render(CAMERAS[0], size)
    pairs = max(1, frames // 2)
    draw = lambda: [env.render(camera, size) for _ in range(pairs) for camera in CAMERAS[:2]]  # noqa: E731
    return [1000 * seconds(draw) / (2 * pairs) for _ in range(REPEATS)]


def result(name: str, values: list[float], unit: str, goal: float | None) -> str:
    """The figure's RESULT line; a goal is a lower bound."""
    value = statistics.median(values)
    met = None if goal is None else value >= goal
    spread = [round(edge, 2) for edge in (min(values), max(values))]
    return result_line(name, round(value, 2), unit, goal=goal, met=met, n=len(values), spread=spread)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--episodes", type=int, default=3, help="of each task, per repeat")
    parser.add_argument("--size", type=int, default=64, help="pixels of a frame")
    parser.add_argument("--frames", type=int, default=10, help="per repeat")
    arguments = parser.parse_args()
    lines = []
    print(f"{'task':24} {'geoms':>5} {'dofs':>5} {'steps/s':>8} {f'ms a frame at {arguments.size}':>18}")
    for task in arguments.tasks.split(","):
        env = KitchenEnv(task)
        rates = steps_per_second(env, arguments.episodes)
        frames = frame_milliseconds(env, arguments.size, arguments.frames)
        model = env.world.model
        print(
            f"{task:24} {model.ngeom:5} {model.nv:5} {statistics.median(rates):8.0f} {statistics.median(frames):18.2f}",
            flush=True,
        )
        lines.append(result(f"kitchen/steps_per_second/{task}", rates, "control steps/s", STEPS_GOAL))
        lines.append(result(f"kitchen/frame/{task}", frames, "ms", None))
    print("\n".join([*lines, *stability_lines(json.loads(STABILITY.read_text()))]))


if __name__ == "__main__":
    main()
