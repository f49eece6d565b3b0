"""What it costs and saves that the slots of a worker take turns in fewer simulators than slots.

`python benchmarks/simulators.py kitchen TurnOnSinkFaucet OpenDrawer`, or libero, or robocasa (on stand-ins). Each count
of simulators runs in a process of its own, in this order: resets into all tasks, lockstep chunks with their looks,
branches. CPU time, so that other work on the machine hardly counts; the most memory that the process held; and whether
every look and state came out the same, to the bit.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from figures import result_line

from envs.base import Episode
from envs.pool import EnvPool


def factory(suite: str, task: str) -> Callable[[], Any]:
    """What builds an environment of a task, as its suite's defaults have it."""
    if suite == "kitchen":
        from envs import kitchen

        return functools.partial(kitchen.make, task)
    if suite == "libero":
        from envs import libero

        return functools.partial(libero.make, task, image_size=128)
    from envs import robocasa

    return functools.partial(
        robocasa.make, task, image_size=128, standins=True, scenes=("1/1",), heldout_scenes=("1/1",)
    )


def measure(suite: str, tasks: list[str], slots: int, chunks: int, executed: int, simulators: int) -> dict[str, Any]:
    """CPU milliseconds a chunk and slot, megabytes, and a digest of all that came back, with so many simulators."""
    rng, digest = np.random.default_rng(0), hashlib.sha256()
    with EnvPool({task: factory(suite, task) for task in tasks}, slots, 0, simulators=simulators) as pool:
        groups = [Episode(10 + slot // 4, tasks[slot // 4 % len(tasks)]) for slot in range(slots)]  # groups of four
        began = time.process_time()
        looks = pool.reset(range(slots), groups)
        reset_ms = 1e3 * (time.process_time() - began) / slots
        began = time.process_time()
        done = 0
        for chunk in range(chunks):
            actions = rng.uniform(-0.5, 0.5, (slots, executed, pool.spec.action_dim))
            results, looks = pool.step(range(slots), actions)
            done += slots
            for result, look in zip(results, looks, strict=True):
                digest.update(f"{result.steps} {result.success} {result.done}".encode())
                if look is not None:
                    digest.update(look.state.tobytes() + b"".join(image.tobytes() for image in look.images.values()))
            if chunk == 0:  # as a prefix that a group shares
                pool.branch([slot - slot % 4 for slot in range(slots)], range(slots))
        spent = 1e3 * (time.process_time() - began) / done
        for snapshot in pool.snapshot(range(slots)):
            digest.update(snapshot.physics.tobytes())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    return {"chunk_ms": spent, "reset_ms": reset_ms, "megabytes": peak, "digest": digest.hexdigest()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("suite", choices=("kitchen", "libero", "robocasa"))
    parser.add_argument("tasks", nargs="+")
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--chunks", type=int, default=5)
    parser.add_argument("--executed", type=int, default=8, help="control steps a chunk")
    parser.add_argument("--simulators", type=int, default=-1, help="measure this number alone, as JSON")
    given = parser.parse_args()
    if given.simulators >= 0:
        settings = given.slots, given.chunks, given.executed, given.simulators
        print(json.dumps(measure(given.suite, given.tasks, *settings)))
        return
    found: dict[int, dict[str, Any]] = {}
    for simulators in (0, len(given.tasks)):
        command = [sys.executable, *sys.argv, f"--simulators={simulators}"]
        ran = subprocess.run(command, capture_output=True, text=True, check=True)
        found[simulators] = json.loads(ran.stdout.splitlines()[-1])
    (own, shared), same = found.values(), len({each["digest"] for each in found.values()}) == 1
    print(
        f"{given.slots} slots, {len(given.tasks)} tasks of {given.suite}; chunks of {given.executed} steps with looks"
    )
    print(f"{'simulators':>12} {'chunk':>10} {'reset':>10} {'memory':>10}")
    for name, each in (("one a slot", own), ("one a task", shared)):
        print(f"{name:>12} {each['chunk_ms']:7.1f} ms {each['reset_ms']:7.1f} ms {each['megabytes']:7,.0f} MB")
    print(f"results {'equal to the bit' if same else 'DIFFER'}")
    for name, unit, key in (("chunk", "ms", "chunk_ms"), ("memory", "MB", "megabytes")):
        met = same if name == "chunk" else None
        facts = {"suite": given.suite, "slots": given.slots, "tasks": given.tasks, "same_bits": same}
        print(
            result_line(
                f"{name} with one simulator a task", round(shared[key], 2), unit, baseline=round(own[key], 2),
                goal="equal to the bit" if name == "chunk" else None, met=met, n=given.slots * given.chunks, **facts,
            )
        )  # fmt: skip


if __name__ == "__main__":
    main()
