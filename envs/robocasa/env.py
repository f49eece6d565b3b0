"""RoboCasa behind envs.base.Env: the raw robosuite environment, rendered only when the policy looks.

Restores bit for bit, also in another process. An episode is its seed: scene, objects, poses and instruction follow from
it, and a snapshot taken elsewhere is restored by starting the same episode first.
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
from envs.robocasa import compat, standin, state, tables
from envs.stepping import SteppedEnv

_NO_LIMIT = 10**9  # control steps: the horizon is this adapter's


class RoboCasaEnv(SteppedEnv):
    """One task of RoboCasa, v0.2 or v1.0.1 as installed (see envs.base.Env for the interface)."""

    def __init__(
        self,
        task: str,
        cameras: Sequence[str] = tables.CAMERAS,
        image_size: int = 224,
        horizon: int | None = None,
        scenes: Sequence[str] = ("training",),
        objects: str = "train",
        heldout_scenes: Sequence[str] = ("evaluation",),
        heldout_objects: str = "heldout",
        heldout_seed: int = 900_000_000,
        standins: bool = False,
    ):
        """Checks the names and the installation; the simulation is built by the first `reset` or `restore`.

        Args:
          task: a name in `tables.HORIZONS`, or v0.2's name of a task that v1 renamed.
          cameras: names out of `tables.CAMERAS`; `observe` renders these and no others.
          image_size: pixels of the square frames.
          horizon: control steps of an episode; None takes the task's.
          scenes: names of sets of scenes and pairs layout/style, see `tables.scenes`; each episode draws one.
          objects: a split of the object instances, a name in `tables.OBJECTS`.
          heldout_scenes, heldout_objects: the same, for seeds from `heldout_seed` on; those take the scenes in turn, so
            that equally many episodes take place in each.
          standins: run without the downloaded assets, on primitive stand-ins. What comes out is labelled.

        Raises:
          ValueError: an unknown name; RoboCasa or its assets are not installed, and how to install them.
        """
        found = compat.check(standins)
        self._api, self._standins = found.api, standins
        self._task = tables.task_name(task, found.api)
        self._scenes = tables.scenes(tuple(scenes), found.api)
        self._heldout_scenes = tables.scenes(tuple(heldout_scenes), found.api)
        for split in (objects, heldout_objects):
            _known("object split", split, tables.OBJECTS[found.api])
        self._objects, self._heldout_objects, self._heldout_seed = objects, heldout_objects, heldout_seed
        for camera in cameras:
            _known("camera", camera, tables.CAMERAS)
        if image_size < 1 or (horizon is not None and horizon < 1) or not cameras:
            raise ValueError(f"expected a camera, positive image_size and horizon; got {image_size} and {horizon}")
        self._spec = EnvSpec(
            task=self._task,
            cameras=tuple(cameras),
            image_size=image_size,
            action_dim=tables.ACTION_DIM,
            state_dim=tables.STATE_DIM,
            control_hz=tables.CONTROL_HZ,
            horizon=horizon or tables.HORIZONS[found.api][self._task],
            version=f"robocasa {found.version}",
            label=standin.LABEL if standins else "",
        )
        stability.keep_no_log()
        self._raw: Any = None
        self._observed: Mapping[str, np.ndarray] = {}
        self._start: dict[tuple[str, str], Any] = {}  # plain attributes where the episode began
        self._episode: dict[str, Any] = {}  # seed, scene and split: what `restore` builds the same episode from
        self._global_rng: Any = None  # this environment's own state of np.random's global generator
        self._instruction = ""

    @property
    def raw(self) -> Any:
        """The robosuite environment, for tests and tools; None before the first episode."""
        return self._raw

    def episode_of(self, seed: int) -> dict[str, Any]:
        """Seed, scene and object split of a seed's episode.

        Raises:
          ValueError: the task excludes all of the scenes.
        """
        heldout = seed >= self._heldout_seed
        scenes = self._allowed(self._heldout_scenes if heldout else self._scenes)
        if heldout:
            scene = scenes[(seed - self._heldout_seed) % len(scenes)]
        else:
            scene = scenes[np.random.default_rng([seed, 0x5CE4E]).integers(len(scenes))]
        return {"seed": seed, "scene": scene, "objects": self._heldout_objects if heldout else self._objects}

    def reset(self, episode: Episode) -> None:
        """Starts an episode. Equal ones start equally, in any process and after any history.

        Raises:
          ValueError: another task, or a scene or split that does not exist.
        """
        task = tables.task_name(episode.task, self._api) if episode.task else ""
        check_episode(dataclasses.replace(episode, task=task), self._task, ("scene", "split"))
        begun = self.episode_of(episode.seed)
        if episode.scene:
            (begun["scene"],) = tables.scenes((episode.scene,), self._api)
        if episode.split:
            _known("object split", episode.split, tables.OBJECTS[self._api])
            begun["objects"] = episode.split
        self._begin(begun)

    def observe(self) -> EnvObservation:
        """Renders the spec's cameras now, with the state and the instruction."""
        images = {camera: self.render(camera, self._spec.image_size) for camera in self._spec.cameras}
        return EnvObservation(images, self._proprioception(), self._instruction)

    def render(self, camera: str = tables.CAMERAS[0], size: int = 256) -> np.ndarray:
        """One camera's picture uint8 [size, size, 3], RGB, upright; changes no physics.

        Raises:
          ValueError: an unknown camera, or no episode yet.
        """
        _known("camera", camera, tables.CAMERAS)
        sim = self._started().sim
        if sim._render_context_offscreen is None:
            self._open_renderer(size)
        sim._render_context_offscreen.gl_ctx.make_current()  # another environment of this process may have drawn last
        return np.ascontiguousarray(sim.render(camera_name=camera, width=size, height=size)[::-1])

    def _stepping(self) -> contextlib.AbstractContextManager[None]:
        return self._own_randomness()

    def _control_step(self, action: np.ndarray) -> tuple[str, bool]:
        """robosuite itself, at versions 1.5.1 and 1.5.2, looks at no warning of MuJoCo and raises nothing."""
        raw = self._started()
        self._observed = raw.step(action.copy())[0]  # robosuite writes into the array that it is given
        broken = stability.breakdown(raw.sim.model._model, raw.sim.data._data)
        return broken, not broken and bool(raw._check_success())

    def snapshot(self) -> Snapshot:
        """The full state: physics, controllers, latches, colours, observables, counters and both random generators."""
        physics, rest = state.capture(self._started(), self._start)
        extra = {
            **rest,
            "episode": dict(self._episode),
            "global_rng": self._global_rng,
            **self._count(),
        }
        return Snapshot(self._identity, physics, extra)

    def restore(self, snapshot: Snapshot) -> None:
        """Back to a snapshot, bit for bit; it may come from another instance or process with the same task.

        What `observe` then gives is what it would have given where the snapshot was taken.

        Raises:
          ValueError: the snapshot is of another task, version or kind of assets.
        """
        if snapshot.env != self._identity:
            raise ValueError(f"snapshot of {snapshot.env!r} cannot be restored here: expected {self._identity!r}")
        extra = snapshot.extra
        if extra["episode"] != self._episode:
            self._begin(extra["episode"])
        raw = self._raw
        state.apply(raw, self._start, snapshot.physics, extra)
        stability.forgive(raw.sim.data._data)
        self._global_rng = extra["global_rng"]
        self._set_count(extra)
        self._observed = raw._get_observations()  # the observables' restored values: nothing is measured anew

    def close(self) -> None:
        """Frees the simulation and its renderer."""
        if self._raw is not None:
            self._raw.close()
            self._raw = None
        self._episode = {}

    # --- inside ------------------------------------------------------------------------------------------------------

    @property
    def _identity(self) -> str:
        kind = " with stand-ins" if self._standins else ""
        return f"{self._spec.version}{kind}/{self._task}"

    def _started(self) -> Any:
        if self._raw is None:
            raise ValueError("no episode yet: call reset or restore first")
        return self._raw

    def _begin(self, episode: Mapping[str, Any]) -> None:
        """Builds the scene of an episode and resets into it."""
        self._episode = {}  # until all went well: after a failure `restore` must build anew
        scene, split = tuple(episode["scene"]), tables.OBJECTS[self._api][episode["objects"]]
        self._global_rng = np.random.RandomState(episode["seed"] % 2**32).get_state()
        with self._own_randomness():
            if self._raw is None:
                self._raw = self._build(scene)
            raw = self._raw
            raw.layout_and_style_ids, raw.obj_instance_split = [scene], split
            # Both generators, after the constructor drew from them: an episode must not depend on what was before.
            raw.rng = np.random.default_rng(episode["seed"])
            np.random.seed(episode["seed"] % 2**32)
            self._observed = raw.reset()
        self._start = state.baseline(raw)
        self._instruction = raw.get_ep_meta()["lang"]
        self._episode = {**episode, "scene": scene}
        self._begin_count()

    def _build(self, scene: tables.Scene) -> Any:
        _prepare(self._standins)
        import robosuite

        return robosuite.make(
            self._task,
            robots="PandaOmron",
            controller_configs=robosuite.load_composite_controller_config(controller=None, robot="PandaOmron"),
            layout_and_style_ids=[scene],
            use_camera_obs=False,
            has_renderer=False,
            has_offscreen_renderer=False,  # `render` opens it: robosuite's own would draw at every control step
            renderer="mujoco",
            generative_textures=None,
            randomize_cameras=False,
            translucent_robot=False,
            ignore_done=True,
            horizon=_NO_LIMIT,
            seed=0,
        )

    def _allowed(self, scenes: tuple[tables.Scene, ...]) -> tuple[tables.Scene, ...]:
        """The scenes that the task takes place in: some need fixtures that not every kitchen has."""
        _prepare(self._standins)
        from robosuite.environments.base import REGISTERED_ENVS

        task = REGISTERED_ENVS[self._task]
        layouts, styles = getattr(task, "EXCLUDE_LAYOUTS", ()), getattr(task, "EXCLUDE_STYLES", ())
        allowed = tuple((layout, style) for layout, style in scenes if layout not in layouts and style not in styles)
        if not allowed:
            raise ValueError(f"{self._task} takes place in none of the scenes {scenes[:5]}: choose others")
        return allowed

    def _proprioception(self) -> np.ndarray:
        self._started()
        parts = [np.atleast_1d(self._observed[f"robot0_{name}"]) for name, _ in tables.STATE]
        return np.concatenate(parts).astype(np.float32)

    def _open_renderer(self, size: int) -> None:
        """Opens robosuite's own renderer. It brings the scene up to date by itself, which here must not happen."""
        from robosuite.utils.binding_utils import MjRenderContextOffscreen

        sim = self._raw.sim
        sim.forward = lambda: None
        try:
            context = MjRenderContextOffscreen(sim, device_id=-1, max_width=size, max_height=size)
        finally:
            del sim.forward
        context.vopt.geomgroup[0], context.vopt.geomgroup[1] = 0, 1  # what is seen, not what collides

    @contextlib.contextmanager
    def _own_randomness(self) -> Iterator[None]:
        """A context with this environment's own state in np.random's global generator, which RoboCasa draws from."""
        theirs = np.random.get_state()
        np.random.set_state(self._global_rng)
        try:
            yield
        finally:
            self._global_rng = np.random.get_state()
            np.random.set_state(theirs)


@functools.cache
def _prepare(standins: bool) -> None:
    if standins:
        standin.install(standin.folder())
    compat.load()


def _known(kind: str, name: str, table: Any) -> None:
    if name not in table:
        raise ValueError(f"unknown {kind} {name!r}: expected one of {', '.join(table)}")
