"""Cost of RoboCasa as installed: a control step, a look, a reset, a snapshot and both kinds of restore.

`python benchmarks/robocasa_cost.py OpenDrawer`; `--standins` without the downloaded assets (figures are then labelled).
Times are process CPU time, so that other work on the machine hardly counts; rendering counts all of its threads.
"""

from __future__ import annotations

import argparse
import pickle
import resource
import statistics
import time
from collections.abc import Callable

import numpy as np
from figures import result_line

from envs import robocasa
from envs.base import Episode
from envs.robocasa import compat, tables


def milliseconds(work: Callable[[], object], repeats: int) -> list[float]:
    """CPU milliseconds of each of some calls, after one that does not count."""
    work()
    times = []
    for _ in range(repeats):
        began = time.process_time()
        work()
        times.append(1e3 * (time.process_time() - began))
    return times


def measure(task: str, standins: bool, repeats: int) -> dict[str, list[float]]:
    """CPU milliseconds of everything that an environment does."""
    env = robocasa.make(task, scenes=("1/1",), image_size=256, horizon=10**6, standins=standins)
    rng = np.random.default_rng(0)
    seeds = iter(range(10**6))
    found: dict[str, list[float]] = {}
    found["reset"] = milliseconds(lambda: env.reset(Episode(next(seeds))), repeats)
    arm = rng.uniform(-1, 1, (20, 12)) * np.r_[np.ones(7), np.zeros(5)] - np.r_[np.zeros(11), 1.0]
    found["control step"] = [t / len(arm) for t in milliseconds(lambda: env.step_chunk(arm), repeats)]
    for size in (128, 224, 256):
        found[f"frame {size}"] = milliseconds(lambda size=size: env.render(tables.CAMERAS[0], size), repeats)

    def reset_and_look() -> None:
        env.reset(Episode(next(seeds)))
        env.render(tables.CAMERAS[0], 256)

    found["reset and first frame"] = milliseconds(reset_and_look, repeats)
    found["snapshot"] = milliseconds(env.snapshot, repeats)
    snapshot = env.snapshot()
    found["restore, same episode"] = milliseconds(lambda: env.restore(snapshot), repeats)

    def elsewhere() -> None:
        env._episode = {}  # as an environment that was in another episode
        env.restore(snapshot)

    found["restore, another episode"] = milliseconds(elsewhere, repeats)
    found["snapshot, kilobytes"] = [len(pickle.dumps(snapshot)) / 1e3]
    found["process, megabytes"] = [resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("task", nargs="?", default="OpenDrawer")
    parser.add_argument("--standins", action="store_true", help="without the downloaded assets")
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    try:
        label = robocasa.make(given.task, standins=given.standins).spec.label
    except ValueError as error:
        parser.error(str(error))
    print(f"{given.task}, {compat.versions()} {label and f'[{label}]'}")
    found = measure(given.task, given.standins, given.repeats)
    for name, values in found.items():
        print(f"{name:28} {statistics.median(values):9.1f}   {min(values):9.1f} … {max(values):.1f}")
    for name, values in found.items():
        unit = name.partition(", ")[2] if name.endswith("bytes") else "CPU ms"
        figure, median = f"robocasa {given.task}: {name}", statistics.median(values)
        print(result_line(figure, median, unit, n=len(values), spread=[min(values), max(values)], label=label))


if __name__ == "__main__":
    main()
