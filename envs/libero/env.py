"""LIBERO behind envs.base.Env: the benchmark's own robosuite environment, rendered only when the policy looks.

Restores bit for bit, also in another process. An episode is its seed and, in evaluations, the number of one of the
benchmark's fixed initial states.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from envs import stability
from envs.base import ChunkResult, EnvObservation, EnvSpec, Snapshot, checked_actions
from envs.libero import compat, protocols, simulation, state, tables

_TRAIN_ON = ("placements", "initial_states")


class LiberoEnv:
    """One task of LIBERO or LIBERO-PRO (see envs.base.Env for the interface)."""

    def __init__(
        self,
        task: str,
        cameras: Sequence[str] = tables.CAMERAS,
        image_size: int | None = None,
        horizon: int | None = None,
        protocol: str = "openpi",
        train_on: str = "placements",
        heldout_seed: int = 900_000_000,
    ):
        """Checks the names and the installation; the simulation is built by the first `reset` or `restore`.

        Args:
          task: `SUITE/NAME` or `SUITE/NUMBER`, see `tables.task_name`.
          cameras: names out of `tables.CAMERAS`; `observe` renders these and no others.
          image_size: pixels of the square frames; None takes the protocol's.
          horizon: control steps of an episode; None takes the protocol's for the suite.
          protocol: a name in `protocols.PROTOCOLS`.
          train_on: what seeds below `heldout_seed` start from: `placements`, drawn from the task's own regions; or
            `initial_states`, one of those that evaluations use, which the spec's label then says.
          heldout_seed: seeds from this one on are the benchmark's initial states 0 to 49.

        Raises:
          ValueError: an unknown name; LIBERO or a part of it is not installed, and how to install it.
        """
        self._task = tables.task_name(task)
        self._suite, _, self._name = self._task.partition("/")
        self._found = compat.check(self._suite, self._name)
        self.protocol = protocols.protocol(protocol)
        _known("train_on", train_on, _TRAIN_ON)
        for camera in cameras:
            _known("camera", camera, tables.CAMERAS)
        size = self.protocol.image_size if image_size is None else image_size
        if size < 1 or (horizon is not None and horizon < 1) or not cameras:
            raise ValueError(f"expected a camera, positive image_size and horizon; got {image_size} and {horizon}")
        self._train_on, self._heldout_seed = train_on, heldout_seed
        self._spec = EnvSpec(
            task=self._task,
            cameras=tuple(cameras),
            image_size=size,
            action_dim=tables.ACTION_DIM,
            state_dim=tables.STATE_DIM,
            control_hz=tables.CONTROL_HZ,
            horizon=horizon or self.protocol.horizon(self._suite),
            version=", ".join(f"{name} {version}" for name, version in compat.versions().items() if name != "numpy"),
            label="" if train_on == "placements" else "trained on the evaluation's own initial states",
        )
        stability.keep_no_log()
        self._instruction = tables.instruction(self._task)
        self._raw: Any = None
        self._look = state.Look()
        self._observed: Mapping[str, np.ndarray] = {}
        self._episode: tuple[int, int | None] | None = None
        self._steps, self._succeeded, self._broken = 0, False, ""

    @property
    def spec(self) -> EnvSpec:
        """The environment's constants."""
        return self._spec

    @property
    def raw(self) -> Any:
        """The robosuite environment, for experts, tests and tools; None before the first episode."""
        return self._raw

    @property
    def steps(self) -> int:
        """Control steps executed in this episode, without the protocol's no-ops."""
        return self._steps

    @property
    def success(self) -> bool:
        """Whether the task's check has held at some step of this episode."""
        return self._succeeded

    @property
    def broken(self) -> str:
        """What MuJoCo reported when this episode's simulation broke down; empty where it did not."""
        return self._broken

    @property
    def done(self) -> bool:
        """Whether the episode has ended: in success, at the horizon, or because the simulation broke down."""
        return self._succeeded or bool(self._broken) or self._steps >= self._spec.horizon

    @functools.cached_property
    def initial_states(self) -> np.ndarray:
        """The benchmark's fixed initial states [50, 1 + nq + nv]: time, positions, velocities."""
        with np.load(self._found.states_file(self._suite, self._name), allow_pickle=False) as held:
            return held["states"]

    def episode_of(self, seed: int) -> tuple[int, int | None]:
        """(seed of all that is drawn, number of the initial state or None) of a seed's episode.

        Raises:
          ValueError: the seed stands for an initial state that there is not.
        """
        if seed >= self._heldout_seed:
            number = seed - self._heldout_seed
            if number >= tables.INITIAL_STATES:
                raise ValueError(
                    f"initial state {number} of {self._task}: LIBERO has 0 to {tables.INITIAL_STATES - 1}, which are "
                    f"the seeds from {self._heldout_seed} to {self._heldout_seed + tables.INITIAL_STATES - 1}"
                )
            return self.protocol.seed, number
        if self._train_on == "initial_states":
            number = int(np.random.default_rng([seed, 0x11BE]).integers(tables.INITIAL_STATES))
            return self.protocol.seed, number
        return seed, None

    def reset(self, seed: int) -> None:
        """Starts the episode of a seed. Equal seeds give equal episodes, in any process and after any history."""
        self.begin(*self.episode_of(int(seed)))

    def begin(self, seed: int, initial_state: int | None = None) -> None:
        """Starts an episode: places drawn by the seed, then the initial state if one is given, then the no-ops.

        An initial state holds where movable things are; where fixtures stand is always drawn.

        Raises:
          ValueError: an initial state that there is not.
        """
        if initial_state is not None and not 0 <= initial_state < tables.INITIAL_STATES:
            raise ValueError(f"got initial state {initial_state}: expected 0 to {tables.INITIAL_STATES - 1}")
        self._episode = None  # until all went well
        raw = self._simulation()
        with simulation.seeded(seed):
            self._observed = simulation.reset(raw)
        stability.forgive(raw.sim.data._data)
        if initial_state is not None:
            self._observed = simulation.set_state(raw, self.initial_states[initial_state])
        self._steps, self._succeeded, self._broken = 0, False, ""
        for _ in range(self.protocol.settle_steps):
            self._control(np.array(tables.NO_OP))
        self._episode = (seed, initial_state)

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

    def step_chunk(self, actions: np.ndarray) -> ChunkResult:
        """Executes actions [E, 7] in [-1, 1] (clipped), checking success after every control step.

        A control step in which physics breaks down ends the episode as a failure, `unstable`.

        Raises:
          ValueError: a wrong shape, a value that is not finite, or no episode yet.
        """
        self._started()
        actions = checked_actions(actions, tables.ACTION_DIM)
        executed, started = 0, time.perf_counter()
        for action in np.clip(actions, -1.0, 1.0):
            if self.done:
                break
            success = self._control(action)
            self._steps += 1
            executed += 1
            self._succeeded = success and not self._broken
        spent = time.perf_counter() - started
        return ChunkResult(executed, self._succeeded, self.done, spent, unstable=bool(self._broken))

    def snapshot(self) -> Snapshot:
        """The full state: physics, controller, gripper, fixtures, observables, the last look, counters."""
        physics, rest = state.capture(self._started(), self._look)
        extra = {
            **rest,
            "episode": self._episode,
            "steps": self._steps,
            "succeeded": self._succeeded,
            "broken": self._broken,
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
        self._episode, self._broken = extra["episode"], extra["broken"]
        self._steps, self._succeeded = extra["steps"], extra["succeeded"]

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

    def _control(self, action: np.ndarray) -> bool:
        """One control step; whether the task's check then holds."""
        raw = self._raw
        try:
            self._observed, _, success, _ = raw.step(action.copy())
        except np.linalg.LinAlgError:  # the controller inverts matrices that hold NaN
            self._broken = "numbers that are not finite in the controller"
            return False
        self._broken = self._broken or stability.breakdown(raw.sim.model._model, raw.sim.data._data)
        return bool(success)

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
        """The simulation as it was at the last sampling, for as long as something is drawn."""
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
