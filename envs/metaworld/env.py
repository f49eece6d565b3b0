"""Meta-World behind envs.base.Env: the package's own environment, drawn only when the policy looks.

Restores bit for bit, also in another process. An episode is its seed, as LeRobot seeds the package's environments.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import mujoco
import numpy as np

from envs import opengl, stability
from envs.base import EnvObservation, EnvSpec, Episode, Snapshot, check_episode
from envs.metaworld import compat, protocols, state, tables
from envs.stepping import SteppedEnv

_NO_LIMIT = 10**9  # control steps: the horizon is the adapter's
_RENDERERS: weakref.WeakValueDictionary[tuple, opengl.Renderer] = weakref.WeakValueDictionary()  # shared by a process


class MetaWorldEnv(SteppedEnv):
    """One task of Meta-World (see envs.base.Env for the interface)."""

    def __init__(
        self,
        task: str,
        cameras: Sequence[str] = tables.CAMERAS[:1],
        image_size: int | None = None,
        horizon: int | None = None,
        protocol: str = "lerobot",
    ):
        """Checks the names and the installation; the simulation is built by the first `reset` or `restore`.

        Args:
          task: a name in `tables.TASKS`.
          cameras: names out of `tables.CAMERAS`; `observe` renders these and no others.
          image_size: pixels of the square frames; None takes the protocol's.
          horizon: control steps of an episode; None takes the protocol's.
          protocol: a name in `protocols.PROTOCOLS`.

        Raises:
          ValueError: an unknown name; Meta-World is not installed, and how to install it.
        """
        self._task = tables.check_task(task)
        self.protocol = protocols.protocol(protocol)
        for camera in cameras:
            _check_camera(camera)
        size = self.protocol.image_size if image_size is None else image_size
        if size < 1 or (horizon is not None and horizon < 1) or not cameras:
            raise ValueError(f"expected a camera, positive image_size and horizon; got {image_size} and {horizon}")
        self._spec = EnvSpec(
            task=task,
            cameras=tuple(cameras),
            image_size=size,
            action_dim=tables.ACTION_DIM,
            state_dim=tables.STATE_DIM,
            control_hz=tables.CONTROL_HZ,
            horizon=horizon or self.protocol.max_steps,
            version=", ".join(f"{name} {version}" for name, version in compat.versions().items() if name != "numpy"),
        )
        stability.keep_no_log()
        self._raw: Any = None
        self._new: dict[str, Any] = {}  # the raw environment's attributes and model as it was built
        self._renderers: dict[tuple, opengl.Renderer] = {}
        self._observation: np.ndarray | None = None

    @property
    def raw(self) -> Any:
        """The package's environment, for experts, tests and tools; None before the first episode."""
        return self._raw

    @property
    def observation(self) -> np.ndarray:
        """What the package observes [39], goal included: privileged, for experts."""
        self._started()
        assert self._observation is not None
        return self._observation.copy()

    def reset(self, episode: Episode) -> None:
        """Starts the episode of a seed, as the package's environment does after `seed(seed)` and `reset()`.

        Equal episodes start equally, in any process and after any history. One whose physics breaks down before its
        first step is over: unstable.

        Raises:
          ValueError: another task, or a field that episodes of Meta-World do not have.
        """
        check_episode(episode, self._task)
        raw, self._observation = self._simulation(), None  # until all went well
        for name, value in self._new["model"].items():
            getattr(raw.model, name)[...] = value
        mujoco.mj_resetData(raw.model, raw.data)
        mujoco.mj_forward(raw.model, raw.data)
        state.set_attributes(raw, self._new["attributes"])
        raw.seed(episode.seed)
        observation, _ = raw.reset()
        self._begin_count()
        self._observation = observation
        self._broken = stability.breakdown(raw.model, raw.data)
        for _ in range(self.protocol.settle_steps):
            self._broken = self._broken or self._control_step(np.array(tables.NO_OP))[0]

    def observe(self) -> EnvObservation:
        """Renders the spec's cameras, with the state and the instruction. Pictures are upright."""
        how = (self._spec.image_size, self.protocol.shadows, self.protocol.averaged)
        images = {camera: self._draw(camera, *how) for camera in self._spec.cameras}
        state_now = self.observation[: tables.STATE_DIM].astype(np.float32)
        return EnvObservation(images, state_now, tables.INSTRUCTIONS[self._task])

    def render(self, camera: str = tables.CAMERAS[0], size: int = 256) -> np.ndarray:
        """One camera's picture uint8 [size, size, 3] for people, with shadows; changes no physics.

        Raises:
          ValueError: an unknown camera, or no episode yet.
        """
        _check_camera(camera)
        return self._draw(camera, size, shadows=True, averaged=0)

    def snapshot(self) -> Snapshot:
        """The full state: physics, fixtures and goals, what pictures are drawn from, attributes, counters."""
        physics, rest = state.capture(self._started())
        return Snapshot(self._identity, physics, {**rest, "observation": self.observation, **self._count()})

    def restore(self, snapshot: Snapshot) -> None:
        """Back to a snapshot, bit for bit; it may come from another instance or process with the same task.

        Raises:
          ValueError: the snapshot is of another task or version.
        """
        if snapshot.env != self._identity:
            raise ValueError(f"snapshot of {snapshot.env!r} cannot be restored here: expected {self._identity!r}")
        state.apply(self._simulation(), snapshot.physics, snapshot.extra)
        self._observation = snapshot.extra["observation"].copy()
        self._set_count(snapshot.extra)

    def close(self) -> None:
        """Frees the simulation, and its renderer where no other environment draws with it."""
        self._renderers.clear()
        self._raw = self._observation = None

    # --- inside ------------------------------------------------------------------------------------------------------

    @property
    def _identity(self) -> str:
        return f"{self._spec.version}/{self._task}"

    def _started(self) -> Any:
        if self._raw is None or self._observation is None:
            raise ValueError("no episode yet: call reset or restore first")
        return self._raw

    def _simulation(self) -> Any:
        if self._raw is None:
            raw = compat.load()[0][self._task]()
            raw.model.cam_pos[raw.model.camera("corner2").id] = tables.CORNER2
            raw.max_path_length = _NO_LIMIT
            raw._set_task_called, raw._freeze_rand_vec, raw.seeded_rand_vec = True, False, True
            raw._partially_observable = False  # experts need the goal; policies do not get it
            vars(raw).pop("sawyer_observation_space", None)  # made for the other case, and cached
            self._new = {
                "attributes": state.attributes(raw),
                "model": {name: getattr(raw.model, name).copy() for name in state.MODEL_FIELDS},
            }
            self._raw = raw
        return self._raw

    def _control_step(self, action: np.ndarray) -> tuple[str, bool]:
        raw = self._started()
        self._observation, _, _, _, info = raw.step(action.astype(np.float32))  # as wide as the package's action space
        return stability.breakdown(raw.model, raw.data), bool(info["success"])

    def _draw(self, camera: str, size: int, shadows: bool, averaged: int) -> np.ndarray:
        raw = self._started()
        key = (self._task, size, shadows, averaged)
        if key not in self._renderers:
            shared = _RENDERERS.get(key) or opengl.Renderer(raw.model, size, shadows, shadows, averaged)
            self._renderers[key] = _RENDERERS[key] = shared
        image = self._renderers[key].render(raw.model, raw.data, raw.model.camera(camera).id)
        return np.ascontiguousarray(image[::-1, ::-1] if camera in tables.TURNED else image)


def _check_camera(camera: str) -> None:
    if camera not in tables.CAMERAS:
        raise ValueError(f"unknown camera {camera!r}: expected one of {', '.join(tables.CAMERAS)}")
