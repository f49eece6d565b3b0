"""The kitchen environment: one task in one compiled scene, behind envs.base.Env."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Mapping, Sequence

import mujoco
import numpy as np

from envs import stability
from envs.base import EnvObservation, EnvSpec, Episode, Snapshot, check_episode
from envs.kitchen import gl
from envs.kitchen import render as renderer
from envs.kitchen.objects import OBJECT_SPLITS
from envs.kitchen.robot import ACTION_DIM, CONTROL_HZ, STATE_DIM, SUBSTEPS, add_robot
from envs.kitchen.scene import LAYOUT_SPLITS, LAYOUTS, STYLE_SPLITS, STYLES, SceneBuilder
from envs.kitchen.tasks import TASKS, Task
from envs.kitchen.world import World
from envs.stepping import SteppedEnv

CAMERAS = ("robot0_agentview_left", "robot0_eye_in_hand", "robot0_agentview_right")
DEFAULT_CAMERAS = CAMERAS[:2]
CAMERA_JITTER = 0.03  # metres
LIGHT_JITTER = 0.20  # of the intensity
_PHYSICS = mujoco.mjtState.mjSTATE_INTEGRATION


@functools.lru_cache(maxsize=64)
def _compiled(task: str, layout: str, objects: str) -> mujoco.MjModel:
    """The pristine model of a task in a layout; environments copy it before they write to it."""
    scene = SceneBuilder(LAYOUTS[layout], objects)
    scene.room()
    info = TASKS[task].task
    info.build(scene)
    add_robot(scene, info.focus(scene.layout), np.array(info.left_eye))
    return scene.compile()


def _known(
    kind: str, names: str | Sequence[str], table: Sequence[str], splits: Mapping[str, tuple[str, ...]] | None = None
) -> tuple[str, ...]:
    """The chosen names; one that is a split stands for all of its names."""
    chosen, splits = (names,) if isinstance(names, str) else tuple(names), splits or {}
    unknown = [name for name in chosen if name not in table and name not in splits]
    if unknown or not chosen:
        raise ValueError(f"unknown {kind} {unknown or chosen}: expected one or more of {', '.join([*table, *splits])}")
    return tuple(dict.fromkeys(part for name in chosen for part in splits.get(name, (name,))))


def _draw(rng: np.random.Generator, names: tuple[str, ...]) -> str:
    return names[rng.integers(len(names))]  # draws nothing where there is no choice


class KitchenEnv(SteppedEnv):
    """One task of the built-in kitchen (see envs.base.Env for the interface)."""

    def __init__(
        self,
        task: str,
        cameras: Sequence[str] = DEFAULT_CAMERAS,
        image_size: int = 64,
        horizon: int | None = None,
        layout: str | Sequence[str] = "straight",
        style: str | Sequence[str] = "oak",
        objects: str | Sequence[str] = "train",
    ):
        """Builds the scene; the first episode begins with `reset`.

        Args:
          task: a name in `TASKS`.
          cameras: names out of `CAMERAS`; `observe` renders these and no others.
          image_size: pixels of the square frames.
          horizon: control steps of an episode; None takes the task's.
          layout: names out of `LAYOUTS` or of its splits, `train` and `heldout`; each reset draws one of them.
          style: the same for `STYLES`.
          objects: names out of `OBJECT_SPLITS`: where the scene's things are taken from; each reset draws one of them.

        Raises:
          ValueError: an unknown name, or a size or horizon that is not positive.
        """
        if task not in TASKS:
            raise ValueError(f"unknown kitchen task {task!r}: expected one of {', '.join(TASKS)}")
        if image_size < 1 or (horizon is not None and horizon < 1):
            raise ValueError(f"image_size and horizon must be positive, got {image_size} and {horizon}")
        self._layouts = _known("layout", layout, tuple(LAYOUTS), LAYOUT_SPLITS)
        self._styles = _known("style", style, tuple(STYLES), STYLE_SPLITS)
        self._object_splits = _known("object split", objects, OBJECT_SPLITS)
        self.info = TASKS[task]
        self.task: Task = self.info.task
        self._spec = EnvSpec(
            task=task,
            cameras=_known("camera", cameras, CAMERAS),
            image_size=image_size,
            action_dim=ACTION_DIM,
            state_dim=STATE_DIM,
            control_hz=CONTROL_HZ,
            horizon=horizon or self.info.horizon,
        )
        stability.keep_no_log()
        self._worlds: dict[tuple[str, str], World] = {}
        self._rng = np.random.default_rng(0)
        self._light = renderer.Light()
        self._instruction = ""
        self.layout, self.objects = self._layouts[0], self._object_splits[0]
        self.reset(Episode(0))

    @property
    def world(self) -> World:
        """The scene of the present episode: privileged, for tasks, experts and tests."""
        key = (self.layout, self.objects)
        if key not in self._worlds:
            self._worlds[key] = World(copy.copy(_compiled(self._spec.task, *key)), self.task.things_of(self.objects))
        return self._worlds[key]

    def reset(self, episode: Episode) -> None:
        """Starts the episode of a seed: fixture, object, start and camera poses, colours, light, instruction.

        Raises:
          ValueError: an episode of another task, or one that sets what the kitchen draws by the seed.
        """
        check_episode(episode, self._spec.task)
        rng = self._rng = np.random.default_rng(episode.seed)
        self.layout, self.objects = _draw(rng, self._layouts), _draw(rng, self._object_splits)
        world = self.world
        world.clear()
        world.paint(STYLES[_draw(rng, self._styles)], rng)
        world.jitter_cameras(rng, CAMERA_JITTER)
        self._light = renderer.Light(intensity=float(rng.uniform(1 - LIGHT_JITTER, 1 + LIGHT_JITTER)))
        layout = LAYOUTS[self.layout]
        self._instruction = self.task.randomise(world, layout, rng)
        spread = np.array(self.task.start_spread)
        world.controller.start(self.task.home(layout) + rng.uniform(-spread, spread))
        self._begin_count()
        world.update()
        self.task.update(world)

    def observe(self) -> EnvObservation:
        """Renders the spec's cameras now, with the state and the instruction."""
        images = {camera: self.render(camera, self._spec.image_size) for camera in self._spec.cameras}
        return EnvObservation(images, self.world.controller.state(), self._instruction)

    def render(self, camera: str = "robot0_agentview_right", size: int = 256, backend: str = "rays") -> np.ndarray:
        """One camera's picture uint8 [size, size, 3], RGB, upright; changes no physics.

        Args:
          camera: a name in `CAMERAS`.
          size: pixels.
          backend: `rays`, what policies see; `gl`, MuJoCo's own renderer with shadows, which needs OpenGL.

        Raises:
          ValueError: an unknown camera or backend.
          RuntimeError: `gl` where this machine has no OpenGL; the message says what to install.
        """
        _known("camera", camera, CAMERAS)
        _known("backend", backend, ("rays", "gl"))
        world = self.world
        mujoco.mj_kinematics(world.model, world.data)
        mujoco.mj_camlight(world.model, world.data)
        index = world.model.camera(camera).id
        if backend == "gl":
            return gl.render(world.model, world.data, index, size, self._light)
        return renderer.render(world.model, world.data, index, size, self._light)

    def _control_step(self, action: np.ndarray) -> tuple[str, bool]:
        world = self.world
        world.controller.apply(action)
        mujoco.mj_step(world.model, world.data, nstep=SUBSTEPS)
        world.update()
        broken = stability.breakdown(world.model, world.data)
        if broken:
            return broken, False
        self.task.update(world)
        return "", bool(self.task.success(world))

    def snapshot(self) -> Snapshot:
        """The full state: physics, controller targets, randomised model fields, counters, latches, RNG."""
        world = self.world
        physics = np.empty(mujoco.mj_stateSize(world.model, _PHYSICS))
        mujoco.mj_getState(world.model, world.data, physics, _PHYSICS)
        extra = {
            "layout": self.layout,
            "objects": self.objects,
            "fields": world.fields(),
            "targets": world.controller.targets(),
            "memory": dict(world.memory),
            "light": dataclasses.asdict(self._light),
            "instruction": self._instruction,
            **self._count(),
            "rng": self._rng.bit_generator.state,
        }
        return Snapshot(self._identity, physics, extra)

    def restore(self, snapshot: Snapshot) -> None:
        """Back to a snapshot, bit for bit; it may come from another instance or process with the same task.

        Raises:
          ValueError: the snapshot is of another task.
        """
        if snapshot.env != self._identity:
            raise ValueError(f"snapshot of {snapshot.env!r} cannot be restored here: expected {self._identity!r}")
        extra = snapshot.extra
        self.layout, self.objects = extra["layout"], extra["objects"]
        world = self.world
        world.set_fields(extra["fields"])
        mujoco.mj_setState(world.model, world.data, snapshot.physics, _PHYSICS)
        stability.forgive(world.data)
        world.controller.set_targets(extra["targets"])
        world.memory = dict(extra["memory"])
        self._light = renderer.Light(**extra["light"])
        self._instruction = extra["instruction"]
        self._set_count(extra)
        self._rng.bit_generator.state = extra["rng"]
        world.update()

    @property
    def _identity(self) -> str:
        return f"kitchen/{self._spec.task}"

    def close(self) -> None:
        """Drops the compiled scenes."""
        self._worlds.clear()
