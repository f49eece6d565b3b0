"""Cost of LIBERO: a control step, a look, a reset, a snapshot, a restore, and memory.

`python benchmarks/libero_cost.py libero_object/0`. Times are process CPU time, so that other work on the machine hardly
counts; rendering counts all of its threads.
"""

from __future__ import annotations

import argparse
import itertools
import pickle
import resource
import statistics
import time
from collections.abc import Callable

import numpy as np
from figures import result_line

from envs import libero
from envs.base import Episode
from envs.libero import tables


def milliseconds(work: Callable[[], object], repeats: int) -> list[float]:
    """CPU milliseconds of each of some calls, after one that does not count."""
    work()
    times = []
    for _ in range(repeats):
        began = time.process_time()
        work()
        times.append(1e3 * (time.process_time() - began))
    return times


def megabytes() -> float:
    """The most memory that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def measure(task: str, repeats: int) -> dict[str, list[float]]:
    """CPU milliseconds of everything that an environment does, and memory."""
    env = libero.make(task, horizon=10**6)
    seeds = itertools.count()
    found: dict[str, list[float]] = {}
    began = time.process_time()
    env.reset(Episode(next(seeds)))
    found["first reset, which builds the model"] = [1e3 * (time.process_time() - began)]
    found["reset with the protocol's no-ops"] = milliseconds(lambda: env.reset(Episode(next(seeds))), repeats)
    actions = np.random.default_rng(0).uniform(-1, 1, (20, tables.ACTION_DIM))
    found["control step"] = [t / len(actions) for t in milliseconds(lambda: env.step_chunk(actions), repeats)]
    found["without pictures, megabytes"] = [megabytes()]
    for camera, size in itertools.product(tables.CAMERAS, (64, 128, 256, 360)):
        found[f"frame {camera} {size}"] = milliseconds(lambda c=camera, s=size: env.render(c, s), repeats)
    found["snapshot"] = milliseconds(env.snapshot, 10 * repeats)
    snapshot = env.snapshot()
    found["restore"] = milliseconds(lambda: env.restore(snapshot), 10 * repeats)
    found["snapshot, kilobytes"] = [len(pickle.dumps(snapshot)) / 1e3]
    found["process, megabytes"] = [megabytes()]
    second = libero.make(task)
    second.reset(Episode(0))
    second.render()
    found["process with a second environment, megabytes"] = [megabytes()]
    second.close()
    env.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("task", nargs="?", default="libero_object/0")
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    try:
        print(libero.make(given.task).spec.version)
    except ValueError as error:
        parser.error(str(error))
    found = measure(given.task, given.repeats)
    for name, values in found.items():
        print(f"{name:46} {statistics.median(values):9.2f}   {min(values):9.2f} … {max(values):.2f}")
    for name, values in found.items():
        unit = name.partition(", ")[2] if name.endswith("bytes") else "CPU ms"
        figure, median = f"libero {given.task}: {name}", statistics.median(values)
        print(result_line(figure, median, unit, n=len(values), spread=[min(values), max(values)]))


if __name__ == "__main__":
    main()
