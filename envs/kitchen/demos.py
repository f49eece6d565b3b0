"""Demonstrations: episodes of the scripted experts with disturbed execution and clean labels.

The executed action is the expert's plus noise, so that the recorded states spread around the expert's path; the labels
stay what the expert would do from the state that was reached (as in DART, Laskey et al. 2017).

A chunk of labels is either `recorded`: the expert's actions at the states that followed, which answer noise that nobody
could foresee from the observation; or `undisturbed`: what the expert does on a branch of the episode without noise.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import itertools
import multiprocessing
import os
import signal
import sys
import threading
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from envs.base import LABELS, EnvObservation
from envs.kitchen.env import KitchenEnv
from envs.kitchen.experts import Expert, make_expert
from envs.kitchen.robot import ACTION_DIM
from envs.worker import HOME, exit_with_parent

WHITE, OFFSET = 0.5, 0.35  # standard deviations of white noise and constant offsets, as parts of the noise scale
OFFSET_STEPS = 6  # control steps that an offset lasts
# Full noise on the position; less where a unit is half a radian or a finger's grip; none on the base.
_NOISE_PROFILE = np.array([1.0] * 3 + [0.3] * 4 + [0.0] * 5)
_NOISE_STREAM = 1  # keeps the noise of a seed apart from the randomisation of the same seed


@dataclasses.dataclass(frozen=True)
class Episode:
    """One demonstration: N observations, each with the labels of the control steps that follow it."""

    task: str
    seed: int
    instruction: str
    success: bool
    control_steps: int  # control steps executed
    noise: float  # the noise scale drawn for this episode
    step: np.ndarray  # int32 [N], control steps executed before each observation
    images: dict[str, np.ndarray]  # camera -> uint8 [N, S, S, 3]
    state: np.ndarray  # float32 [N, 16]
    actions: np.ndarray  # float32 [N, chunk, 12], clean expert actions from each observation on


def run_episode(
    env: KitchenEnv,
    seed: int,
    noise: float = 0.2,
    stride: int = 4,
    chunk: int = 8,
    labels: str = "undisturbed",
) -> Episode:
    """Runs the expert for one episode.

    Args:
      env: a kitchen environment; it is reset with `seed`.
      seed: of the episode and, in a stream of its own, of the noise.
      noise: n; the episode's noise scale is drawn from {0, n, 2n}, in units of the action.
      stride: control steps between observations.
      chunk: labels an observation. Where the episode or branch ends before, the last label is repeated: experts end in
        a steady pull, push or retreat, and a policy that is not quite done should go on with it rather than stop.
      labels: one of `LABELS`, see above.

    Returns:
      The episode, also when it failed: the caller keeps what it wants.

    Raises:
      ValueError: unknown labels.
    """
    if labels not in LABELS:
        raise ValueError(f"labels must be one of {', '.join(LABELS)}; got {labels!r}")
    env.reset(seed)
    expert = make_expert(env)
    scale, disturbances = disturb(seed, noise)
    branched = labels == "undisturbed" and scale > 0  # without noise the episode itself is that branch
    observations: list[EnvObservation] = []
    chunks: list[np.ndarray] = []
    recorded: list[np.ndarray] = []
    done = False
    while not done:
        if env.steps % stride == 0:
            observations.append(env.observe())
            if branched:
                chunks.append(_undisturbed(env, expert, chunk))
        recorded.append(expert.act())
        done = env.step_chunk((recorded[-1] + next(disturbances))[None]).done
    if not branched:
        chunks = [_repeat_last(recorded[i : i + chunk], chunk) for i in range(0, len(recorded), stride)]
    return Episode(
        task=env.spec.task,
        seed=seed,
        instruction=observations[0].instruction,
        success=env.success,
        control_steps=env.steps,
        noise=scale,
        step=np.arange(len(observations), dtype=np.int32) * stride,
        images={camera: np.stack([seen.images[camera] for seen in observations]) for camera in env.spec.cameras},
        state=np.stack([seen.state for seen in observations]),
        actions=np.stack(chunks),
    )


def _undisturbed(env: KitchenEnv, expert: Expert, chunk: int) -> np.ndarray:
    """The expert's next actions [chunk, 12] if nothing disturbs them; the environment stays where it is."""
    present = env.snapshot()
    actions: list[np.ndarray] = []
    done = False
    while len(actions) < chunk and not done:
        actions.append(expert.act())
        done = env.step_chunk(actions[-1][None]).done
    env.restore(present)
    return _repeat_last(actions, chunk)


def _repeat_last(actions: list[np.ndarray], length: int) -> np.ndarray:
    return np.stack(actions + actions[-1:] * (length - len(actions)))


def disturb(seed: int, noise: float) -> tuple[float, Iterator[np.ndarray]]:
    """The noise scale of a seed's episode, drawn from {0, noise, 2 noise}, and what to add to each action [12]."""
    rng = np.random.default_rng([seed, _NOISE_STREAM])
    scale = float(rng.choice([0.0, 1.0, 2.0]) * noise)

    def disturbances() -> Iterator[np.ndarray]:
        for step in itertools.count():
            if step % OFFSET_STEPS == 0:
                offset = OFFSET * rng.standard_normal(ACTION_DIM)
            yield scale * _NOISE_PROFILE * (WHITE * rng.standard_normal(ACTION_DIM) + offset)

    return scale, disturbances()


_worker_env: KitchenEnv | None = None


def _start_worker(task: str, options: dict[str, Any], parent: int) -> None:
    global _worker_env
    threading.Thread(target=exit_with_parent, args=(parent,), daemon=True).start()
    _worker_env = KitchenEnv(task, **options)


def _run_in_worker(seed: int, noise: float, stride: int, chunk: int, labels: str) -> Episode:
    return run_episode(_worker_env, seed, noise, stride, chunk, labels)


def collect(
    task: str,
    seeds: Iterable[int],
    noise: float = 0.2,
    processes: int = 2,
    stride: int = 4,
    chunk: int = 8,
    labels: str = "undisturbed",
    options: Mapping[str, Any] | None = None,
) -> Iterator[Episode]:
    """Episodes of `seeds`, in their order, also those that failed.

    Args:
      task: a kitchen task.
      seeds: of the episodes; may be endless, because only a few episodes are under way beyond what was consumed.
      noise, stride, chunk, labels: as in `run_episode`.
      processes: worker processes; 1 or less runs in this process.
      options: KitchenEnv's further arguments.

    Raises:
      ValueError: an unknown task or option value.
    """
    options = dict(options or {})
    env = KitchenEnv(task, **options)  # a mistake in the arguments shows here, not inside a worker
    if processes <= 1:
        yield from (run_episode(env, seed, noise, stride, chunk, labels) for seed in seeds)
        return
    pool = concurrent.futures.ProcessPoolExecutor(
        processes, multiprocessing.get_context("spawn"), _start_worker, (task, options, os.getpid())
    )
    try:
        pending: collections.deque[concurrent.futures.Future[Episode]] = collections.deque()
        for seed in seeds:
            with _starting_workers():
                pending.append(pool.submit(_run_in_worker, seed, noise, stride, chunk, labels))
            if len(pending) >= 4 * processes:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _starting_workers() -> Iterator[None]:
    """Processes that start within inherit a blocked SIGINT (Ctrl-C is the parent's to handle, from their first moment)
    and do not import the parent's main module, which may take seconds and hold an accelerator."""
    main = sys.modules["__main__"]
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    sys.modules["__main__"] = types.ModuleType("__main__")
    sys.path.insert(0, HOME)  # the workers' path is a copy: they find this `envs`, whatever the working directory holds
    try:
        yield
    finally:
        sys.path.remove(HOME)
        sys.modules["__main__"] = main
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
