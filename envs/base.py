"""What every environment offers: reset, observe, step_chunk, snapshot, restore.

NumPy only: worker processes import this module, start fast and hold no accelerator.
"""

from __future__ import annotations

import dataclasses
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
    version: str = ""  # of the simulation, where success depends on it, e.g. "robocasa 0.2.0"
    label: str = ""  # what must stand beside every figure, e.g. that assets are stand-ins


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


@runtime_checkable
class Env(Protocol):
    """The interface between an environment and the pool."""

    @property
    def spec(self) -> EnvSpec: ...

    def reset(self, seed: int) -> None:
        """Starts a new episode. Equal seeds give equal episodes, in any process."""

    def observe(self) -> EnvObservation:
        """Renders the cameras now. Rendering changes no physics."""

    def step_chunk(self, actions: np.ndarray) -> ChunkResult:
        """Executes actions float [E, action_dim], stopping where the episode ends (see ChunkResult)."""

    def snapshot(self) -> Snapshot: ...

    def restore(self, snapshot: Snapshot) -> None: ...

    def close(self) -> None: ...
