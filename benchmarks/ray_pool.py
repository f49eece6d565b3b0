"""What simulators as Ray actors cost beside worker processes: a chunk without physics, and the kitchen's steps.

`python benchmarks/ray_pool.py` starts a Ray cluster of several nodes on this machine: the learner's, which has no
simulators, and others, whose answers go from their object store to the learner's. First an environment that does
nothing, with frames as large as two policies see: milliseconds a chunk of one slot, and of them the learner's CPU, by
how many slots answer at once. Then the kitchen, and whether both pools gave the same to the bit.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from envs import kitchen
from envs.base import ChunkResult, EnvObservation, EnvSpec, Episode, episodes
from envs.pool import EnvPool
from envs.ray_cluster import RESOURCE
from envs.ray_workers import RayWorkers

SIGHTS = {"2 x 64": (2, 64), "3 x 224": (3, 224)}  # cameras, pixels
EXECUTED = 8
REPEATS = 3


class Still:
    """No physics: fresh frames alone."""

    def __init__(self, cameras: int, size: int) -> None:
        names = tuple(f"camera{number}" for number in range(cameras))
        self.spec = EnvSpec("Still", names, size, action_dim=7, state_dim=8, control_hz=20.0, horizon=10**9)
        self._frames = np.random.default_rng(0).integers(0, 256, (cameras, size, size, 3), np.uint8)

    def reset(self, episode: Episode) -> None:
        pass

    def observe(self) -> EnvObservation:
        images = dict(zip(self.spec.cameras, self._frames.copy(), strict=True))
        return EnvObservation(images, np.zeros(8, np.float32), "stand still")

    def step_chunk(self, actions: np.ndarray) -> ChunkResult:
        return ChunkResult(len(actions), False, False)

    def close(self) -> None:
        pass


def pools(factory: Callable[[], Any], slots: int, workers: int) -> dict[str, Callable[[], EnvPool]]:
    return {
        "local": lambda: EnvPool(factory, slots, workers),
        "ray": lambda: EnvPool(factory, slots, workers, place=RayWorkers({"": factory}, 0, workers, name="benchmark")),
    }


def costs(made: dict[str, Callable[[], EnvPool]], chunks: int) -> dict[str, dict[str, float]]:
    """The least of three measurements of each pool, in turns: others may work on the machine."""
    found = [{name: cost(make, chunks) for name, make in made.items()} for _ in range(REPEATS)]
    return {
        name: {key: round(min(one[name][key] for one in found), 3) for key in ("wall_ms", "cpu_ms")} for name in made
    }


def cost(make_pool: Callable[[], EnvPool], chunks: int) -> dict[str, float]:
    """Milliseconds of a chunk of one slot: wall, and of this process's CPU."""
    with make_pool() as pool:
        slots = list(range(pool.num_envs))
        pool.reset(slots, episodes(slots))
        actions = np.zeros((len(slots), EXECUTED, 7))
        for _ in range(5):
            pool.step(slots, actions)
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(chunks):
            for look in pool.step(slots, actions)[1]:
                assert look is not None and look.images["camera0"][0, 0, 0] >= 0
        done = chunks * len(slots)
        return {
            "wall_ms": 1e3 * (time.perf_counter() - wall) / done,
            "cpu_ms": 1e3 * (time.process_time() - cpu) / done,
        }


def rollout(make_pool: Callable[[], EnvPool], chunks: int) -> dict[str, Any]:
    """Control steps a second of lockstep chunks in the kitchen, and a digest of all that came back."""
    rng, digest = np.random.default_rng(0), hashlib.sha256()
    with make_pool() as pool:
        slots = list(range(pool.num_envs))
        pool.reset(slots, episodes(slots))
        steps, spent = 0, 0.0
        for chunk in range(chunks + 1):
            actions = rng.uniform(-0.5, 0.5, (len(slots), EXECUTED, pool.spec.action_dim))
            began = time.perf_counter()
            results, looks = pool.step(slots, actions)
            if chunk:  # the first one warms up
                spent += time.perf_counter() - began
                steps += sum(result.steps for result in results)
            for result, look in zip(results, looks, strict=True):
                digest.update(f"{result.steps} {result.success} {result.done}".encode())
                if look is not None:
                    digest.update(look.state.tobytes() + b"".join(image.tobytes() for image in look.images.values()))
    return {"steps_per_s": steps / spent, "digest": digest.hexdigest()}


def rollouts(made: dict[str, Callable[[], EnvPool]], chunks: int) -> dict[str, Any]:
    """The most of three measurements of each pool, in turns; and whether all gave the same."""
    found = [{name: rollout(make, chunks) for name, make in made.items()} for _ in range(REPEATS)]
    same = len({each["digest"] for one in found for each in one.values()}) == 1
    most = {name: round(max(one[name]["steps_per_s"] for one in found)) for name in made}
    return {"equal to the bit": same, "steps_per_s": most}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nodes", type=int, default=2, help="hosts of simulators; 0: the learner's own has them")
    parser.add_argument("--workers", type=int, default=2, help="processes or actors in the kitchen")
    parser.add_argument("--chunks", type=int, default=200, help="of the environment that does nothing")
    parser.add_argument("--kitchen-chunks", type=int, default=5)
    given = parser.parse_args()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray
    import ray_pool  # this file, under a name that workers can import
    from ray.cluster_utils import Cluster

    units, store = {RESOURCE: given.workers}, 256 * 2**20
    small: dict[str, Any] = {"num_cpus": 0, "object_store_memory": store}
    own = {"resources": units} if not given.nodes else {}
    cluster = Cluster(True, head_node_args={**small, **own, "include_dashboard": False})
    try:
        for _ in range(given.nodes):
            cluster.add_node(resources=units, **small)
        ray.init(address=cluster.address, logging_level="error", log_to_driver=False)
        for sight, shape in SIGHTS.items():
            for slots in (1, 4, 8):
                made = pools(functools.partial(ray_pool.Still, *shape), slots, 1)
                found = costs(made, given.chunks // slots + 5)
                print(json.dumps({"frames": sight, "slots a worker": slots} | found), flush=True)
        for slots in (given.workers, 8 * given.workers):
            made = pools(functools.partial(kitchen.make, "TurnOnSinkFaucet"), slots, given.workers)
            print(json.dumps({"kitchen slots": slots} | rollouts(made, given.kitchen_chunks)), flush=True)
    finally:
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    main()
