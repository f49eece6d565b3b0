"""Demonstrations: episodes of a suite's scripted expert with disturbed execution and clean labels.

The executed action is the expert's plus noise, so that the recorded states spread around the expert's path. The labels
are what the expert would do from the state that was reached (as in DART, Laskey et al. 2017).

A chunk of labels is either `recorded` or `undisturbed`. Recorded labels are the expert's actions at the states that
followed: they react to noise that the observation could not show. Undisturbed labels are what the expert does on a
branch of the episode without noise.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any, Protocol

import numpy as np

from envs.base import LABELS, Env, EnvObservation, Episode
from envs.jobs import Job, run_jobs

WHITE, OFFSET = 0.5, 0.35  # standard deviations of white noise and constant offsets, as parts of the noise scale
OFFSET_STEPS = 6  # control steps that an offset lasts
Steps = Generator[None, None, "Demonstration"]
_NOISE_STREAM = 1  # keeps the noise of a seed apart from the randomisation of the same seed


class Expert(Protocol):
    """Solves the task of one environment. It follows the environment's `reset` and `restore` by itself."""

    def act(self) -> np.ndarray:
        """The action float [action_dim] for the environment's present state, in [-1, 1]."""


@dataclasses.dataclass(frozen=True)
class Demonstrator:
    """The expert of a task and its environment, as importable functions or partials that can be sent to workers."""

    make_env: Callable[[], Env]
    make_expert: Callable[[Any], Expert]  # of an environment of `make_env`
    noise_profile: tuple[float, ...]  # [action_dim], how much of the noise each action takes


@dataclasses.dataclass(frozen=True)
class Demonstration:
    """One demonstration: N observations, each with the labels of the control steps that follow it."""

    task: str
    seed: int
    instruction: str
    success: bool
    control_steps: int  # control steps executed
    noise: float  # the noise scale drawn for this episode
    step: np.ndarray  # int32 [N], control steps executed before each observation
    images: dict[str, np.ndarray]  # camera -> uint8 [N, S, S, 3]
    state: np.ndarray  # float32 [N, state_dim]
    actions: np.ndarray  # float32 [N, chunk, action_dim], clean expert actions from each observation on


def run_episode(
    demonstrator: Demonstrator,
    env: Env,
    episode: Episode,
    noise: float = 0.2,
    stride: int = 4,
    chunk: int = 8,
    labels: str = "undisturbed",
) -> Demonstration:
    """Runs the expert for one episode.

    Args:
      env: an environment that `demonstrator` made; it is reset with `episode`.
      noise: n; the episode's noise scale is drawn from {0, n, 2n}, in units of the action.
      stride: control steps between observations.
      chunk: labels of each observation. If the episode or branch ends earlier, the last label is repeated: experts end
        in a steady pull, push or retreat, and a policy that is not quite done should continue it rather than stop.
      labels: one of `LABELS`, see above.

    Returns:
      The episode, also if it failed: the caller decides whether to keep it.

    Raises:
      ValueError: unknown labels.
    """
    steps = _steps(demonstrator, env, episode, noise, stride, chunk, labels)
    while True:
        try:
            next(steps)
        except StopIteration as ended:
            return ended.value


def _steps(
    demonstrator: Demonstrator, env: Env, episode: Episode, noise: float, stride: int, chunk: int, labels: str
) -> Steps:
    """As `run_episode`, as a generator that yields at each observation."""
    if labels not in LABELS:
        raise ValueError(f"labels must be one of {', '.join(LABELS)}; got {labels!r}")
    env.reset(episode)
    expert = demonstrator.make_expert(env)
    scale, disturbances = disturb(episode.seed, noise, demonstrator.noise_profile)
    branched = labels == "undisturbed" and scale > 0  # without noise the episode itself is that branch
    observations: list[EnvObservation] = []
    chunks: list[np.ndarray] = []
    recorded: list[np.ndarray] = []
    done = success = False
    while not done:
        if len(recorded) % stride == 0:
            if recorded:
                yield
            observations.append(env.observe())
            if branched:
                chunks.append(_undisturbed(env, expert, chunk))
        recorded.append(expert.act())
        result = env.step_chunk((recorded[-1] + next(disturbances))[None])
        done, success = result.done, bool(result.success)
    if not branched:
        chunks = [_repeat_last(recorded[i : i + chunk], chunk) for i in range(0, len(recorded), stride)]
    return Demonstration(
        task=env.spec.task,
        seed=episode.seed,
        instruction=observations[0].instruction,
        success=success,
        control_steps=len(recorded),
        noise=scale,
        step=np.arange(len(observations), dtype=np.int32) * stride,
        images={camera: np.stack([seen.images[camera] for seen in observations]) for camera in env.spec.cameras},
        state=np.stack([seen.state for seen in observations]),
        actions=np.stack(chunks),
    )


def _undisturbed(env: Env, expert: Expert, chunk: int) -> np.ndarray:
    """The expert's next actions [chunk, action_dim] if nothing disturbs them; the environment stays where it is."""
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


def disturb(seed: int, noise: float, profile: tuple[float, ...]) -> tuple[float, Iterator[np.ndarray]]:
    """The noise scale of a seed's episode, drawn from {0, noise, 2 noise}, and what to add to each action.

    Args:
      profile: [action_dim], how much of the noise each action takes.
    """
    rng = np.random.default_rng([seed, _NOISE_STREAM])
    scale = float(rng.choice([0.0, 1.0, 2.0]) * noise)
    share, width = np.array(profile), len(profile)

    def disturbances() -> Iterator[np.ndarray]:
        for step in itertools.count():
            if step % OFFSET_STEPS == 0:
                offset = OFFSET * rng.standard_normal(width)
            yield scale * share * (WHITE * rng.standard_normal(width) + offset)

    return scale, disturbances()


def collect(
    demonstrator: Demonstrator,
    episodes: Iterable[Episode],
    noise: float = 0.2,
    processes: int = 2,
    stride: int = 4,
    chunk: int = 8,
    labels: str = "undisturbed",
    timeout_s: float = 60.0,
    start_timeout_s: float = 120.0,
) -> Iterator[Demonstration]:
    """Demonstrations of `episodes`, in their order, also those that failed.

    Args:
      episodes: may be endless: only a few more are started than were consumed.
      noise, stride, chunk, labels: as in `run_episode`.
      processes: worker processes; 0 runs in this process, where a fault ends the collection and a hang is not noticed.
      timeout_s: seconds that a worker may take from one observation to the next; start_timeout_s: to build its
        environment. A worker that is late or dies is replaced, and its episode is tried once more.

    Raises:
      ValueError: an unknown task or option value.
      PoolError: an episode failed twice; one line.
    """
    if processes == 0:
        env = demonstrator.make_env()
        yield from (run_episode(demonstrator, env, episode, noise, stride, chunk, labels) for episode in episodes)
        return
    work = functools.partial(_steps, demonstrator, noise=noise, stride=stride, chunk=chunk, labels=labels)
    jobs = (Job(f"seed {episode.seed}", functools.partial(_of_episode, work, episode)) for episode in episodes)
    yield from run_jobs(demonstrator.make_env, jobs, processes, timeout_s, start_timeout_s)


def _of_episode(work: Callable[..., Steps], episode: Episode, env: Env) -> Steps:
    return work(env, episode)
