"""LIBERO behind envs.base.Env: the benchmark's own robosuite environment, rendered only when the policy looks.

Restores bit for bit, also in another process. An episode is its seed and, in evaluations, the number of one of the
benchmark's fixed initial states (`Protocol.evaluation`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from envs import stability
from envs.base import EnvObservation, EnvSpec, Episode, Snapshot, check_episode
from envs.libero import compat, protocols, simulation, state, tables
from envs.stepping import SteppedEnv


class LiberoEnv(SteppedEnv):
    """One task of LIBERO or LIBERO-PRO (see envs.base.Env for the interface)."""

    def __init__(
        self,
        task: str,
        cameras: Sequence[str] = tables.CAMERAS,
        image_size: int | None = None,
        horizon: int | None = None,
        protocol: str = "openpi",
        train_on: str = "placements",
    ):
        """Checks the names and the installation; the simulation is built by the first `reset` or `restore`.

        Args:
          task: `SUITE/NAME` or `SUITE/NUMBER`, see `tables.task_name`.
          cameras: names out of `tables.CAMERAS`; `observe` renders these and no others.
          image_size: pixels of the square frames; None takes the protocol's.
          horizon: control steps of an episode; None takes the protocol's for the suite.
          protocol: a name in `protocols.PROTOCOLS`.
          train_on: what episodes without `init_state` start from: `placements`, drawn from the task's own regions; or
            `initial_states`, one of those that evaluations use, which the spec's label then says.

        Raises:
          ValueError: an unknown name; LIBERO or a part of it is not installed, and how to install it.
        """
        self._task = tables.task_name(task)
        self._suite, _, self._name = self._task.partition("/")
        self._found = compat.check(self._suite, self._name)
        self.protocol = protocols.protocol(protocol)
        _known("train_on", train_on, protocols.TRAIN_ON)
        for camera in cameras:
            _known("camera", camera, tables.CAMERAS)
        size = self.protocol.image_size if image_size is None else image_size
        if size < 1 or (horizon is not None and horizon < 1) or not cameras:
            raise ValueError(f"expected a camera, positive image_size and horizon; got {image_size} and {horizon}")
        self._train_on = train_on
        self.arm_noise = tables.ARM_NOISE  # of drawn placements; 0 gives LIBERO's own reset, which moves things alone
        self._spec = EnvSpec(
            task=self._task,
            cameras=tuple(cameras),
            image_size=size,
            action_dim=tables.ACTION_DIM,
            state_dim=tables.STATE_DIM,
            control_hz=tables.CONTROL_HZ,
            horizon=horizon or self.protocol.horizon(self._suite),
            version=", ".join(f"{name} {version}" for name, version in compat.versions().items() if name != "numpy"),
            label="" if train_on == "placements" else protocols.ON_INITIAL_STATES,
        )
        stability.keep_no_log()
        self._instruction = tables.instruction(self._task)
        self._raw: Any = None
        self._look = state.Look()
        self._observed: Mapping[str, np.ndarray] = {}
        self._episode: Episode | None = None  # seed and initial state as they were used

    @property
    def raw(self) -> Any:
        """The robosuite environment, for experts, tests and tools; None before the first episode."""
        return self._raw

    @functools.cached_property
    def initial_states(self) -> np.ndarray:
        """The benchmark's fixed initial states [50, 1 + nq + nv]: time, positions, velocities."""
        with np.load(self._found.states_file(self._suite, self._name), allow_pickle=False) as held:
            return held["states"]

    def reset(self, episode: Episode) -> None:
        """Starts an episode: places drawn by the seed, then the initial state if there is one, then the no-ops.

        An initial state holds where movable things are, and the arm's posture; where fixtures stand is then drawn by
        the protocol's seed. Otherwise all three are drawn by the episode's, the posture as in the initial states.
        Equal episodes start equally, in any process and after any history.

        Raises:
          ValueError: another task, or an initial state that does not exist.
        """
        task = tables.task_name(episode.task) if episode.task else ""
        check_episode(dataclasses.replace(episode, task=task), self._task, ("init_state",))
        seed, number, last = episode.seed, episode.init_state, tables.INITIAL_STATES - 1
        if number is None and self._train_on == "initial_states":
            number = int(np.random.default_rng([seed, 0x11BE]).integers(tables.INITIAL_STATES))
        if number is not None and not 0 <= number <= last:
            raise ValueError(f"got initial state {number} of {self._task}: LIBERO has 0 to {last}")
        if number is not None:
            seed = self.protocol.seed
        self._episode = None  # until all went well
        raw = self._simulation()
        with simulation.seeded(seed):
            self._observed = simulation.reset(raw)
        stability.forgive(raw.sim.data._data)
        if number is not None:
            self._observed = simulation.set_state(raw, self.initial_states[number])
        elif self.arm_noise:
            posture = np.random.default_rng([seed, 0xA4]).normal(0.0, self.arm_noise, tables.ARM_JOINTS)
            self._observed = simulation.set_state(raw, simulation.moved_arm(raw, posture))
        self._begin_count()
        for _ in range(self.protocol.settle_steps):
            self._broken = self._broken or self._control(np.array(tables.NO_OP))[0]
        self._episode = Episode(seed, self._task, init_state=number)

    def observe(self) -> EnvObservation:
        """Renders the spec's cameras, with the state and the instruction, all as at the last sampling.

        Pictures come as the protocol's policies see them: upright, and mirrored where it says so.
        """
        flip = slice(None, None, -1 if self.protocol.mirrored else 1)
        with self._shown():
            images = {camera: self._draw(camera, self._spec.image_size) for camera in self._spec.cameras}
        images = {camera: np.ascontiguousarray(image[:, flip]) for camera, image in images.items()}
        return EnvObservation(images, self._proprioception(), self._instruction)

    def render(self, camera: str = tables.CAMERAS[0], size: int = 256) -> np.ndarray:
        """One camera's picture uint8 [size, size, 3] for people: RGB, upright, not mirrored; changes no physics.

        Raises:
          ValueError: an unknown camera, or no episode yet.
        """
        _known("camera", camera, tables.CAMERAS)
        with self._shown():
            return self._draw(camera, size)

    def snapshot(self) -> Snapshot:
        """The full state: physics, controller, gripper, fixtures, observables, the last look, counters."""
        physics, rest = state.capture(self._started(), self._look)
        extra = {
            **rest,
            "episode": self._episode,
            **self._count(),
        }
        return Snapshot(self._identity, physics, extra)

    def restore(self, snapshot: Snapshot) -> None:
        """Back to a snapshot, bit for bit; it may come from another instance or process with the same task.

        Raises:
          ValueError: the snapshot is of another task or version.
        """
        if snapshot.env != self._identity:
            raise ValueError(f"snapshot of {snapshot.env!r} cannot be restored here: expected {self._identity!r}")
        extra, raw = snapshot.extra, self._simulation()
        state.apply(raw, self._look, snapshot.physics, extra)
        self._observed = raw._get_observations()  # the observables' restored values: nothing is measured anew
        self._episode = extra["episode"]
        self._set_count(extra)

    def close(self) -> None:
        """Frees the simulation and its renderer."""
        if self._raw is not None:
            simulation.close_renderer(self._raw.sim)
            self._raw.close()
            self._raw = None
        self._episode = None

    # --- inside ------------------------------------------------------------------------------------------------------

    @property
    def _identity(self) -> str:
        return f"{self._spec.version}/{self._task}"

    def _started(self) -> Any:
        if self._raw is None or self._episode is None:
            raise ValueError("no episode yet: call reset or restore first")
        return self._raw

    def _simulation(self) -> Any:
        if self._raw is None:
            self._raw = simulation.build(self._found.task_file(self._suite, self._name), self._look)
        return self._raw

    def _control_step(self, action: np.ndarray) -> tuple[str, bool]:
        self._started()
        return self._control(action)

    def _control(self, action: np.ndarray) -> tuple[str, bool]:
        raw = self._raw
        try:
            self._observed, _, success, _ = raw.step(action.copy())
        except np.linalg.LinAlgError:  # the controller inverts matrices that hold NaN
            return "numbers that are not finite in the controller", False
        return stability.breakdown(raw.sim.model._model, raw.sim.data._data), bool(success)

    def _proprioception(self) -> np.ndarray:
        from robosuite.utils.transform_utils import quat2axisangle

        position, turn, fingers = (self._observed[name] for name in simulation.SEEN)
        return np.concatenate([position, quat2axisangle(turn.copy()), fingers]).astype(np.float32)

    def _draw(self, camera: str, size: int) -> np.ndarray:
        sim = self._raw.sim
        if sim._render_context_offscreen is None:
            simulation.open_renderer(sim, size)
        sim._render_context_offscreen.gl_ctx.make_current()  # another environment of this process may have drawn last
        return np.ascontiguousarray(sim.render(camera_name=camera, width=size, height=size)[::-1])

    @contextlib.contextmanager
    def _shown(self) -> Iterator[None]:
        """A context with the simulation as it was at the last sampling, for drawing."""
        sim, present = self._started().sim, state.Look()
        present.take(sim)
        self._look.put(sim)
        try:
            yield
        finally:
            present.put(sim)


def _known(kind: str, name: str, table: Any) -> None:
    if name not in table:
        raise ValueError(f"unknown {kind} {name!r}: expected one of {', '.join(table)}")
