"""The interface of every environment: reset, observe, step_chunk, snapshot, restore.

NumPy only: worker processes import this module, start fast and hold no accelerator.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

LABELS = ("recorded", "undisturbed")  # what a demonstration's chunks may hold: see kitchen/demos.py


@dataclasses.dataclass(frozen=True)
class EnvSpec:
    """Constants of one environment, the same for every episode."""

    task: str  # e.g. "TurnOnSinkFaucet"
    cameras: tuple[str, ...]  # names of the rendered cameras, in the order of the policy's image slots
    image_size: int  # pixels; frames are square
    action_dim: int  # width of one raw action
    state_dim: int  # width of the proprioceptive state
    control_hz: float  # control steps per second of simulated time
    horizon: int  # control steps after which an episode ends
    version: str = ""  # of the simulation, if success depends on it, e.g. "robocasa 0.2.0"
    label: str = ""  # a caveat that is printed beside every figure, e.g. that assets are stand-ins
    copies: bool = True  # whether it has snapshot and restore; set by workers


@dataclasses.dataclass(frozen=True)
class Episode:
    """Everything that the start of an episode depends on, besides the environment's own settings."""

    seed: int  # of everything that is drawn
    task: str = ""  # a name of the suite's; empty: the only task of the environment
    scene: str = ""  # where the suite has several and the episode does not draw it, e.g. "1/4"
    split: str = ""  # of its objects, where the episode does not draw it either
    init_state: int | None = None  # number of a fixed initial state, in suites that have such

    def to_json(self) -> dict[str, Any]:
        """Its identity as JSON: the seed, and those other fields that are set."""
        return {
            key: value for key, value in dataclasses.asdict(self).items() if key == "seed" or value not in ("", None)
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Episode:
        """The episode of a record, which may hold more. Raises KeyError without a seed."""
        names = [field.name for field in dataclasses.fields(cls) if field.name in record]
        return cls(**{"seed": record["seed"], **{name: record[name] for name in names}})


def episodes(seeds: Iterable[int], task: str = "") -> list[Episode]:
    """The episodes of some seeds of one task, for suites in which the seed decides everything else."""
    return [Episode(int(seed), task) for seed in seeds]


@dataclasses.dataclass(frozen=True)
class EnvObservation:
    """What the policy sees before it decides on a chunk."""

    images: dict[str, np.ndarray]  # camera name -> uint8 [S, S, 3], RGB, upright
    state: np.ndarray  # float32 [state_dim], raw units, no object or fixture poses
    instruction: str  # the task in words


@dataclasses.dataclass(frozen=True)
class ChunkResult:
    """What happened while one chunk of actions was executed."""

    steps: int  # control steps executed, 0..E: execution stops at the end of the episode
    success: bool  # latched: true from the first step at which the task's check held
    done: bool  # success, the horizon is reached, or unstable
    simulate_s: float = 0.0  # seconds spent stepping physics
    unstable: bool = False  # latched: the simulation broke down, which ends the episode as a failure


def check_episode(episode: Episode, task: str, known: Sequence[str] = ()) -> None:
    """Refuses an episode that an environment would not start as it is described.

    Args:
        task: of the environment; known: fields besides seed and task that it obeys.
    Raises:
        ValueError: it is of another task, or sets a field that the environment does not use.
    """
    if episode.task not in ("", task):
        raise ValueError(f"got an episode of {episode.task!r}: expected one of {task!r}")
    given = [key for key in episode.to_json() if key not in ("seed", "task", *known)]
    if given:
        raise ValueError(f"{given[0]} of an episode has no effect on {task}: leave it out")


def checked_actions(actions: np.ndarray, width: int) -> np.ndarray:
    """Actions [E, width] as float64.

    Raises:
        ValueError: a wrong shape, or a value that is not finite.
    """
    actions = np.asarray(actions, np.float64)
    if actions.ndim != 2 or actions.shape[1] != width:
        raise ValueError(f"actions have shape {actions.shape}: expected [E, {width}], one row a control step")
    if not np.isfinite(actions).all():
        rows = np.flatnonzero(~np.isfinite(actions).all(axis=1)).tolist()
        raise ValueError(f"actions hold NaN or infinity in rows {rows}: expected finite values in [-1, 1]")
    return actions


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """The full state of an environment: picklable, restores bit for bit, also into another process."""

    env: str  # identity of the environment class and task that wrote it
    physics: np.ndarray  # simulator state vector
    extra: dict[str, Any]  # everything else that a replay needs (counters, targets, RNG, model fields)
    task: str = ""  # of a pool's slot: pools note it, environments need not


@runtime_checkable
class Env(Protocol):
    """The interface between an environment and the pool."""

    @property
    def spec(self) -> EnvSpec: ...

    def reset(self, episode: Episode) -> None:
        """Starts an episode. Equal ones start equally, to the bit, in any process."""

    def observe(self) -> EnvObservation:
        """Renders the cameras now. Rendering changes no physics."""

    def step_chunk(self, actions: np.ndarray) -> ChunkResult:
        """Executes actions float [E, action_dim], stopping where the episode ends (see ChunkResult)."""

    def snapshot(self) -> Snapshot: ...

    def restore(self, snapshot: Snapshot) -> None: ...

    def close(self) -> None: ...


class Pool(Protocol):
    """Environments (slots) that rollouts and evaluations step together, in this process or in others.

    Slots are numbered 0 to num_envs - 1. A call names each at most once, and returns results in the order of its slots.
    """

    @property
    def spec(self) -> EnvSpec:
        """Constants of the environments."""

    @property
    def num_envs(self) -> int:
        """How many slots there are."""

    def reset(self, slots: Sequence[int], episodes: Sequence[Episode]) -> list[EnvObservation]:
        """Starts an episode in each slot; returns its first observation. This and the rest may raise `SlotsLost`."""

    def step(self, slots: Sequence[int], actions: np.ndarray) -> tuple[list[ChunkResult], list[EnvObservation | None]]:
        """Executes a chunk in each slot: float [len(slots), E, action_dim]. A done episode gives no observation."""

    def begin_reset(self, slots: Sequence[int], episodes: Sequence[Episode]) -> Any:
        """As `reset`, without waiting: what `finish` takes."""

    def begin_step(self, slots: Sequence[int], actions: np.ndarray) -> Any:
        """As `step`, without waiting: what `finish` takes. Other slots may be asked meanwhile."""

    def finish(self, call: Any) -> list[Any]:
        """Waits for what was begun. Slot by slot, a reset's observation, or a step's result and observation."""

    def branch(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Makes slot targets[i] a bit-exact copy of slot sources[i] as it was before the call."""

    def snapshot(self, slots: Sequence[int]) -> list[Snapshot]:
        """The full state of each slot."""

    def restore(self, slots: Sequence[int], snapshots: Sequence[Snapshot]) -> None:
        """Puts each slot into the state of its snapshot."""

    def render(self, slots: Sequence[int], camera: str, size: int) -> list[np.ndarray]:
        """One frame of each slot, uint8 [size, size, 3]."""

    def take_times(self) -> dict[str, float]:
        """Wall seconds in calls since the last take, by kind: simulate, render, wait.

        `hidden` are those that workers simulated and rendered while the caller did other things; there may be more.
        """

    def close(self) -> None:
        """Ends the environments. Closing twice is harmless."""

    def __enter__(self) -> Pool: ...

    def __exit__(self, *exception: object) -> None: ...


class PoolError(RuntimeError):
    """A worker failed and replacing it did not help. One line: worker, slot, what it was doing, why."""


class SlotsLost(PoolError):
    """Some slots failed at one state again and again; the others have done what was asked.

    Attributes:
        lost: by slot, what it was doing and why it failed. Such a slot stays as it was until it is reset or restored.
        answers: of the call, in the order of its slots; None for those that are lost.
    """

    def __init__(self, lost: Mapping[int, str], answers: Sequence[Any]) -> None:
        super().__init__("; ".join(dict.fromkeys(lost.values())))
        self.lost, self.answers = dict(lost), list(answers)


def copies(env: object) -> bool:
    """Whether an environment can be copied: it has snapshot and restore."""
    return all(callable(getattr(env, name, None)) for name in ("snapshot", "restore"))
