"""LIBERO's own robosuite environment: built once for each task, reset as if it were new, drawn only on request."""

from __future__ import annotations

import atexit
import contextlib
import functools
import pathlib
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import mujoco
import numpy as np

from envs.libero import compat, state, tables

NO_LIMIT = 10**9  # control steps: the horizon is the adapter's
SEEN = ("robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos")  # the observables that the state is made of
_DRAWN: weakref.WeakSet[Any] = weakref.WeakSet()  # simulations with an open renderer


def build(task_file: pathlib.Path, look: state.Look) -> Any:
    """LIBERO's environment of a task, which from now on is only reset softly.

    LIBERO by itself builds the whole model anew at each reset: 1 to 2 seconds, and the list of what to draw for
    drawers and doors grows each time, so that equal seeds give other scenes. Here `sim.reset` leaves the simulation as
    a new model's would be, to the bit.
    """
    domain = compat.load()
    import robosuite
    from libero.libero.envs.bddl_utils import get_problem_info

    base = domain.TASK_MAPPING[get_problem_info(str(task_file))["problem_name"]]
    pristine: dict[str, np.ndarray] = {}

    def initialize(self: Any, xml_string: str | None = None) -> None:
        base._initialize_sim(self, xml_string)
        pristine.update({name: getattr(self.sim.model._model, name).copy() for name in state.MODEL_FIELDS})

    recording = type(base.__name__, (base,), {"_initialize_sim": initialize})  # LIBERO compares the name
    with seeded(0):
        raw = recording(
            bddl_file_name=str(task_file),
            robots=["Panda"],
            controller_configs=robosuite.load_controller_config(default_controller="OSC_POSE"),
            gripper_types="default",
            initialization_noise=None,
            use_camera_obs=False,
            has_renderer=False,
            has_offscreen_renderer=False,  # `open_renderer` does: robosuite's own would draw at every control step
            control_freq=tables.CONTROL_HZ,
            horizon=NO_LIMIT,
            ignore_done=True,
            hard_reset=False,
        )
    for name, observable in raw._observables.items():
        if name not in SEEN:
            observable.set_enabled(False)
    _note_look(raw, look)
    raw.sim.reset = functools.partial(_fresh, raw, pristine)
    return raw


def _fresh(raw: Any, pristine: Mapping[str, np.ndarray]) -> None:
    """The simulation as it is when LIBERO has just compiled the model."""
    model, data = raw.sim.model._model, raw.sim.data._data
    for name, value in pristine.items():
        getattr(model, name)[...] = value
    mujoco.mj_resetData(model, data)
    mujoco.mj_forward(model, data)  # LIBERO does, and the solver starts from what it leaves
    raw.robots[0].gripper.current_action = np.zeros_like(raw.robots[0].gripper.current_action)


def _note_look(raw: Any, look: state.Look) -> None:
    """Makes the first observable that samples also record the scene (`Look`)."""
    observable = raw._observables[SEEN[0]]
    sensor = observable._sensor

    @functools.wraps(sensor)
    def sample(cache: dict) -> np.ndarray:
        look.take(raw.sim)
        return sensor(cache)

    observable._sensor = sample


def reset(raw: Any) -> Mapping[str, np.ndarray]:
    """A reset of LIBERO, repeated until the things find room, as its own wrapper does."""
    from robosuite.utils.errors import RandomizationError

    while True:
        try:
            return raw.reset()
        except RandomizationError:
            continue


def set_state(raw: Any, flat: np.ndarray) -> Mapping[str, np.ndarray]:
    """Puts a fixed initial state in, as LIBERO's own `set_init_state` does."""
    raw.sim.set_state_from_flattened(flat)
    raw.sim.forward()
    raw._check_success()
    raw._post_process()
    raw._update_observables(force=True)
    return raw._get_observations()


def moved_arm(raw: Any, by: np.ndarray) -> np.ndarray:
    """The present state [1 + nq + nv], its arm's joints moved [7], radians. The controller keeps the usual posture as
    its own, as it does where an initial state is put in."""
    flat = raw.sim.get_state().flatten()
    flat[1 + np.array(raw.robots[0]._ref_joint_pos_indexes)] += by
    return flat


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """A context with a seeded np.random, which LIBERO draws from. The generator's state is restored afterwards."""
    theirs = np.random.get_state()
    np.random.seed(seed % 2**32)
    try:
        yield
    finally:
        np.random.set_state(theirs)


def open_renderer(sim: Any, size: int) -> None:
    """Opens robosuite's own renderer. It brings the scene up to date by itself, which here must not happen."""
    from robosuite.utils.binding_utils import MjRenderContextOffscreen

    sim.forward = lambda: None
    try:
        context = MjRenderContextOffscreen(sim, device_id=-1, max_width=size, max_height=size)
    finally:
        del sim.forward
    context.vopt.geomgroup[0], context.vopt.geomgroup[1] = 0, 1  # what is seen, not what collides

    _DRAWN.add(sim)
    _close_at_exit()


@functools.cache
def _close_at_exit() -> None:
    """Has renderers closed at the interpreter's end before robosuite closes OpenGL, which it registered before this."""

    @atexit.register
    def close() -> None:
        for sim in list(_DRAWN):
            close_renderer(sim)


def close_renderer(sim: Any) -> None:
    """Frees the renderer of a simulation, if one is open."""
    context = getattr(sim, "_render_context_offscreen", None)
    if context is not None:
        context.gl_ctx.make_current()
        sim._render_context_offscreen = None
