"""The pool against gymnasium's AsyncVectorEnv on the kitchen, idle workers, sharing, and overlap with a real policy.

`python benchmarks/pool.py --out=docs/results/pool.json` measures all of it but the last, with environments that are
stepped in chunks and looked at between them. `--run=RUN_DIR` measures iterations of GRPO from that run's policy, with
`rollout.overlap` and without in turns. Throughputs are of the wall clock: the machine must be otherwise idle.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import gymnasium
import numpy as np
from figures import result_line

from envs import kitchen, pool_workers
from envs.base import ChunkResult, EnvObservation, EnvSpec, Episode, episodes
from envs.pool import EnvPool

TASK, EXECUTED, WORKERS = "TurnOnSinkFaucet", 8, 2
ROOT = pathlib.Path(__file__).resolve().parent.parent
ENDLESS = 100_000  # control steps: no episode ends while it is measured
FACTOR = 0.05  # of random actions: nothing succeeds


def make_kitchen(size: int = 64) -> Any:
    """The kitchen, of an episode without end."""
    return kitchen.make(TASK, image_size=size, horizon=ENDLESS)


class Frames:
    """Frames of three cameras of 224 pixels that cost nothing: what remains is what it costs to bring them."""

    spec = EnvSpec("Frames", ("a", "b", "c"), 224, action_dim=12, state_dim=16, control_hz=20.0, horizon=ENDLESS)

    def __init__(self) -> None:
        self._images = {name: np.zeros((224, 224, 3), np.uint8) for name in self.spec.cameras}

    def reset(self, episode: Episode) -> None: ...

    def observe(self) -> EnvObservation:
        return EnvObservation(self._images, np.zeros(16, np.float32), "look")

    def step_chunk(self, actions: np.ndarray) -> ChunkResult:
        return ChunkResult(len(actions), False, False)

    def close(self) -> None: ...


class Chunked(gymnasium.Env):
    """One of these environments for gymnasium: a step is a chunk, and what it returns is seen at its end."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._env = make()
        spec = self._env.spec
        box, image = gymnasium.spaces.Box, (spec.image_size, spec.image_size, 3)
        self.action_space = box(-1.0, 1.0, (EXECUTED, spec.action_dim), np.float64)
        spaces: dict[str, Any] = {name: box(0, 255, image, np.uint8) for name in spec.cameras}
        self.observation_space = gymnasium.spaces.Dict(
            spaces | {"state": box(-np.inf, np.inf, (spec.state_dim,), np.float32)}
        )

    def _seen(self) -> dict[str, np.ndarray]:
        seen = self._env.observe()
        return {**seen.images, "state": seen.state}

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict]:
        self._env.reset(Episode(seed or 0))
        return self._seen(), {}

    def step(self, actions: np.ndarray) -> tuple[Any, float, bool, bool, dict]:
        result = self._env.step_chunk(actions)
        return self._seen(), 0.0, result.done, False, {}

    def close(self) -> None:
        self._env.close()


def chunks_of(width: int, count: int, slots: int) -> np.ndarray:
    """Small random actions [count, slots, E, width]."""
    return FACTOR * np.random.default_rng(0).uniform(-1, 1, (count, slots, EXECUTED, width))


def timed(step: Callable[[np.ndarray], Any], chunks: np.ndarray) -> dict[str, float]:
    """Chunks of the slots a second, and milliseconds of CPU for each: of this process, and of all, workers included."""
    began, cpu, everyones = time.perf_counter(), time.process_time(), cpu_of_workers()
    for chunk in chunks:
        step(chunk)
    count, own = chunks.shape[0] * chunks.shape[1], time.process_time() - cpu
    return {
        "chunks_per_s": count / (time.perf_counter() - began),
        "control_steps_per_s": count * EXECUTED / (time.perf_counter() - began),
        "parent_cpu_ms": 1e3 * own / count,
        "cpu_ms": 1e3 * (own + cpu_of_workers() - everyones) / count,
    }


def cpu_of_workers() -> float:
    """CPU seconds of the processes that this one started and that live (Linux)."""
    ticks = 0
    for path in pathlib.Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = path.read_text().rsplit(")", 1)[1].split()
            ticks += (int(fields[1]) == os.getpid()) * (int(fields[11]) + int(fields[12]))
    return ticks / os.sysconf("SC_CLK_TCK")


class Counted:
    """An environment that counts the CPU of simulating and rendering, and writes it to a folder at its end."""

    def __init__(self, make: Callable[[], Any], folder: str) -> None:
        self._env, self._folder, self._chunks, self._cpu_s = make(), folder, 0, 0.0
        self.spec, self.reset = self._env.spec, self._env.reset

    def observe(self) -> EnvObservation:
        return self._timed(self._env.observe)

    def step_chunk(self, actions: np.ndarray) -> ChunkResult:
        self._chunks += 1
        return self._timed(self._env.step_chunk, actions)

    def _timed(self, function: Callable[..., Any], *args: Any) -> Any:
        began = time.thread_time()
        try:
            return function(*args)
        finally:
            self._cpu_s += (time.thread_time() - began) * (self._chunks > 0)

    def close(self) -> None:
        file, text = tempfile.mkstemp(dir=self._folder, text=True)[0], f"{self._chunks} {self._cpu_s}"
        with os.fdopen(file, "w") as out:
            out.write(text)
        self._env.close()


def counted(case: Callable[..., dict[str, float]], make: Callable[[], Any], *args: Any) -> dict[str, float]:
    """A case, with the CPU of simulating and rendering a chunk, and the share of the cores that this is not."""
    with tempfile.TemporaryDirectory() as folder:
        found = case(functools.partial(Counted, make, folder), *args)
        rows = [path.read_text().split() for path in pathlib.Path(folder).iterdir()]
    found["env_cpu_ms"] = 1e3 * sum(float(cpu) for _, cpu in rows) / sum(int(chunks) for chunks, _ in rows)
    found["beside_cpu_ms"] = found["cpu_ms"] - found["env_cpu_ms"]
    found["cores_idle"] = 1.0 - 1e-3 * found["chunks_per_s"] * found["cpu_ms"] / WORKERS
    found["cores_not_simulating"] = 1.0 - 1e-3 * found["chunks_per_s"] * found["env_cpu_ms"] / WORKERS
    return found


def with_pool(make: Callable[[], Any], slots: int, count: int, schedule: str = "") -> dict[str, float]:
    """Chunks through the pool: all slots at once, in two halves that are open at once, or each worker on its own."""
    with EnvPool(make, slots, WORKERS) as pool:
        pool.reset(range(slots), episodes(range(slots)))
        chunks = chunks_of(pool.spec.action_dim, count, slots)
        parts = [list(range(slots))]
        if schedule == "halves":
            parts = [list(part) for part in np.array_split(np.arange(slots), 2)]
        elif schedule == "workers":
            parts = [list(range(worker, slots, pool.num_workers)) for worker in range(pool.num_workers)]
        pool.step(range(slots), chunks[0])
        pool.take_times()
        calls = {pool.begin_step(part, chunks[0][part]): part for part in parts} if schedule else {}

        def step(chunk: np.ndarray) -> None:
            if not schedule:
                pool.step(range(slots), chunk)
            for _ in calls.copy():
                call = next(iter(calls)) if schedule == "halves" else pool.ready(list(calls))
                part = calls.pop(call)
                pool.finish(call)
                calls[pool.begin_step(part, chunk[part])] = part

        began = time.perf_counter()
        found = timed(step, chunks)
        wall = time.perf_counter() - began
        found["idle"] = 1.0 - pool.take_times()["busy"] / (min(WORKERS, slots) * wall)
        return found


def with_gymnasium(make: Callable[[], Any], slots: int, count: int) -> dict[str, float]:
    """The same chunks through AsyncVectorEnv with shared memory: a process for each environment."""
    vector = gymnasium.vector.AsyncVectorEnv([functools.partial(Chunked, make)] * slots, context="spawn")
    try:
        vector.reset(seed=list(range(slots)))
        width = vector.single_action_space.shape[1]
        chunks = chunks_of(width, count, slots)
        vector.step(chunks[0])
        return timed(vector.step, chunks)
    finally:
        vector.close()


def with_plain_pickles(make: Callable[[], Any], slots: int, count: int) -> dict[str, float]:
    """The pool without shared memory, as where the system has none."""
    given, pool_workers.anonymous = pool_workers.anonymous, list
    try:
        return with_pool(make, slots, count)
    finally:
        pool_workers.anonymous = given


def rounds(cases: dict[str, Callable[[], dict[str, float]]], count: int) -> dict[str, dict[str, float]]:
    """The median of each figure of each case, over rounds in which each case has its turn."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in cases}
    for number in range(count):
        for name, case in cases.items():
            found[name].append(case())
            told = ", ".join(f"{key} {value:.3g}" for key, value in found[name][-1].items())
            print(f"round {number}: {name}: {told}", flush=True)
    return {
        name: {key: statistics.median(one[key] for one in all_of_it) for key in all_of_it[0]}
        for name, all_of_it in found.items()
    }


def of_the_kitchen(slots: int, count: int) -> dict[str, Callable[[], dict[str, float]]]:
    case = functools.partial(functools.partial, counted)
    return {
        "pool": case(with_pool, make_kitchen, slots, count),
        "pool in halves": case(with_pool, make_kitchen, slots, count, "halves"),
        "pool, each worker on its own": case(with_pool, make_kitchen, slots, count, "workers"),
        "AsyncVectorEnv": case(with_gymnasium, make_kitchen, slots, count),
    }


def of_frames(count: int) -> dict[str, Callable[[], dict[str, float]]]:
    return {
        "pool": functools.partial(with_pool, Frames, 8, count),
        "pool without shared memory": functools.partial(with_plain_pickles, Frames, 8, count),
        "AsyncVectorEnv": functools.partial(with_gymnasium, Frames, 8, count),
    }


def sharing(groups: int, size: int, prefix: int) -> dict[str, dict[str, float]]:
    """Wall seconds and control steps of groups in the kitchen under each branching; the policy costs nothing."""
    from z1_jax.rl import rollout
    from z1_jax.rl.tree import branch_plan

    found: dict[str, dict[str, float]] = {}
    with EnvPool(functools.partial(kitchen.make, TASK, horizon=160), groups * size, WORKERS) as pool:
        actor, processor = free_policy(pool.spec)
        for branching in ("none", "prefix", "tree"):
            plan = branch_plan(branching, size, 0 if branching == "none" else prefix)
            began = time.perf_counter()
            out = rollout.collect(pool, actor, (), processor, plan, episodes(range(groups)), (0,), executed=EXECUTED)
            found[branching] = {
                "seconds": time.perf_counter() - began,
                "steps_simulated": out.simulated_steps,
                "steps_unshared": int(out.steps.sum()),
                "looks": len(out.looks.tokens),
            }
            print(f"{branching}: {found[branching]}", flush=True)
    return found


def overlap(decision_ms: float, count: int, groups: int = 8, size: int = 8) -> dict[str, dict[str, float]]:
    """Wall seconds of groups with overlap and without, in turns, where decisions of any size take so long elsewhere.

    This is what a policy on a GPU or TPU looks like from here: a decision takes no core, and reading the weights, not
    the batch, sets its time.
    """
    from z1_jax.rl import rollout
    from z1_jax.rl.tree import branch_plan

    plans = {"none": branch_plan("none", size, 0), "tree": branch_plan("tree", size, 2)}
    with EnvPool(functools.partial(kitchen.make, TASK, horizon=64), groups * size, WORKERS) as pool:
        actor, processor = free_policy(pool.spec, decision_ms / 1e3)

        def walked(branching: str, halves: bool, number: int) -> dict[str, float]:
            began = time.perf_counter()
            seeds, plan = episodes(range(groups * number, groups * (number + 1))), plans[branching]
            out = rollout.collect(
                pool, actor, (None, None), processor, plan, seeds, (0,), executed=EXECUTED, overlap=halves
            )
            return {"seconds": time.perf_counter() - began, "hidden_s": out.seconds["hidden"]}

        found: dict[str, list[dict[str, float]]] = {}
        for number in range(count):
            for branching in plans:
                for halves in (False, True):
                    name = f"{branching}, {'overlap' if halves else 'in turn'}"
                    found.setdefault(name, []).append(walked(branching, halves, number))
    return {name: {key: statistics.median(one[key] for one in each) for key in each[0]} for name, each in found.items()}


def free_policy(spec: EnvSpec, decision_s: float = 0.0) -> tuple[Any, Any]:
    """An actor that draws noise alone, and waits so long for each decision; and the processor of an environment."""
    from z1_jax.data.normalize import NormStats
    from z1_jax.data.tokenizer import PromptTokenizer, kitchen_instructions, train_small_tokenizer
    from z1_jax.data.transforms import InputProcessor
    from z1_jax.rl.flow import Chain

    words = PromptTokenizer.from_bytes(train_small_tokenizer(kitchen_instructions(), vocab_size=512), 48)
    sizes = {"state": np.ones(spec.state_dim), "actions": FACTOR * np.ones(spec.action_dim)}
    stats = {name: NormStats(0 * size, size, -size, size) for name, size in sizes.items()}
    processor = InputProcessor(words, stats, spec.cameras, spec.image_size, spec.action_dim)

    class Free:
        def encode(self, params: Any, observation: Any) -> tuple[None, int]:
            return None, len(observation.tokens)

        def sample(self, params: Any, cache: None, ids: np.ndarray, *_: Any) -> Chain:
            time.sleep(decision_s)
            shape, chunk = ids.shape[:2], (2, EXECUTED, spec.action_dim)
            drawn = [np.random.default_rng(one).uniform(-1, 1, chunk) for one in ids.reshape(-1, 3)]
            x = np.reshape(drawn, (*shape, *chunk)).astype("f")
            return Chain(x, np.ones((*shape, 1), bool), np.zeros(shape))

    return Free(), processor


def iterations(run: pathlib.Path, count: int) -> dict[str, dict[str, float]]:
    """Iterations of GRPO from the policy of a run, with overlap and without in turns; none of them trains on."""
    import dataclasses

    import jax

    from z1_jax import sharding
    from z1_jax.checkpoint import Checkpoints
    from z1_jax.config.command_line import parse_command_line
    from z1_jax.config.schema import RolloutConfig
    from z1_jax.policy import find_policy, load_policy
    from z1_jax.rl import diagnostics
    from z1_jax.rl.trainer import GrpoTrainer
    from z1_jax.stages import make_pool

    config = parse_command_line(["pool", f"--config.env.workers={WORKERS}"], str(ROOT / "configs" / "grpo.py"))
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    directory, step = find_policy(run)
    policy = load_policy(Checkpoints(directory), step, mesh)
    found: dict[str, list[dict[str, float]]] = {}
    with make_pool(config) as pool:
        trainers = {
            overlap: GrpoTrainer(
                policy, dataclasses.replace(config, rollout=RolloutConfig(overlap=overlap)), mesh, pool.num_envs
            )
            for overlap in (False, True)
        }
        for number in range(count + 1):  # the first one compiles
            for overlap, trainer in trainers.items():
                began, cpu = time.perf_counter(), time.process_time() + cpu_of_workers()
                out = trainer.collect(pool, number)
                collected = time.perf_counter()
                trainer.update(out, number)
                split = diagnostics.times(out, collected - began, time.perf_counter() - collected)
                split["cpu_s"] = time.process_time() + cpu_of_workers() - cpu
                # Of the cores: with all of it filled, an iteration would take 1 - cores_idle of its time.
                split["cores_idle"] = 1.0 - split["cpu_s"] / (WORKERS * split["time/total"])
                if number:
                    found.setdefault("overlap" if overlap else "in turn", []).append(split)
    return {
        name: {key: statistics.median(one.get(key, 0.0) for one in splits) for key in {**splits[0], "time/hidden": 0}}
        for name, splits in found.items()
    }


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    return {"cores": os.cpu_count(), "load_before": os.getloadavg()[0], "date": time.strftime("%Y-%m-%d")}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, help="JSON of all figures")
    parser.add_argument("--run", type=pathlib.Path, help="a run directory of the kitchen: measures iterations")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=["idle"], help="the kitchen with 8 slots alone: workers and cores that idle")
    parser.add_argument("--chunks", type=int, default=60, help="of each slot, for 8 slots; 4 times as many for 2")
    args = parser.parse_args(argv)
    facts: dict[str, Any] = {"machine": machine()}
    if args.run:
        facts["iterations"] = iterations(args.run, args.rounds)
        for name, split in facts["iterations"].items():
            print(result_line(f"pool/iteration/{name}", split["time/total"], "s", n=args.rounds, **split))
    else:
        for slots in (8,) if args.only else (2, 8):
            facts[f"kitchen, {slots} slots"] = rounds(of_the_kitchen(slots, args.chunks * 8 // slots), args.rounds)
        if not args.only:
            facts["3 frames of 224 pixels, 8 slots"] = rounds(of_frames(10 * args.chunks), args.rounds)
            facts["sharing"] = sharing(4, 8, 4)
            for decision_ms in (50, 100):
                facts[f"decisions of {decision_ms} ms elsewhere"] = overlap(decision_ms, args.rounds)
        for case, by_name in facts.items():
            for name, figures in by_name.items() if case not in ("machine", "sharing") else ():
                for key, value in figures.items():
                    print(result_line(f"pool/{case}/{name}/{key}", value, key, n=args.rounds))
    facts["machine"]["load_after"] = machine()["load_before"]
    if args.out:
        args.out.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    import pool  # workers can import what this module holds by that name, not by __main__

    pool.main()
