"""Environments of gymnasium as a suite: `env.suite=gym:ENV_ID`; `env.options` say where its pictures and words are.

They cannot be copied exactly, so there are no snapshots, and the members of a group share no prefix. Needs the extra
gym, which is imported when an environment is made.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from envs.base import ChunkResult, EnvObservation, EnvSpec, Episode, check_episode, checked_actions
from envs.suite import SettingError, SingleEnv

RENDER = "render"  # as the place of a picture: what the environment renders, instead of an entry of its observation
TERMINATED = "terminated"  # as the place of success: the environment ends its episodes by themselves only in success


@dataclasses.dataclass(frozen=True)
class Places:
    """Where to find what the policy needs: entries of the observation or info, `outer/inner` in nested ones.

    Attributes:
        image: of each camera; `render` for the picture that the environment renders.
        state: a number or array, flattened; empty: the whole observation, if it is an array; `none`: no state.
        success: whether the task is done; `terminated` if the environment ends episodes before the horizon in success
            alone.
        instruction: the task in words; empty: `text` at all times.
        hz: control steps a second; 0: `render_fps` of its metadata.
        expert: `package.module:name` of a callable that takes the environment and returns an object with `act()`.
    """

    image: tuple[str, ...] = (RENDER,)
    state: str = ""
    success: str = "is_success"
    instruction: str = ""
    text: str = ""
    hz: float = 0.0
    expert: str = ""


def read_options(options: Sequence[str]) -> Places:
    """The places that `env.options` names, as `name=value`. `image` may be given once for each camera.

    Raises:
        SettingError: an unknown or repeated name, or one without a value.
    """
    known = [field.name for field in dataclasses.fields(Places)]
    given: dict[str, list[str]] = {}
    for option in options:
        name, equals, value = option.partition("=")
        if not equals or not value or name not in known:
            raise SettingError("env.options", f"got {option!r}, expected NAME=VALUE with a name of {', '.join(known)}")
        given.setdefault(name, []).append(value)
    for name, values in given.items():
        if (len(values) > 1 and name != "image") or len(set(values)) < len(values):
            raise SettingError("env.options", f"got {name}={values[-1]} twice, expected each once")
    chosen: dict[str, Any] = {name: values[0] for name, values in given.items() if name != "image"}
    if "hz" in chosen:
        try:
            chosen["hz"] = float(chosen["hz"])
        except ValueError:
            raise SettingError("env.options", f"got hz={chosen['hz']}, expected a number above 0") from None
    if "text" in given and "instruction" in given:
        raise SettingError("env.options", "got text and instruction, expected one of them")
    if "image" in given:
        chosen["image"] = tuple(given["image"])
    return Places(**chosen)


class GymnasiumEnv:
    """One environment of gymnasium behind `envs.base.Env`; an episode is `reset(seed=…)`.

    Actions in [-1, 1] are scaled to the bounds of its action space. An episode ends in success, where the environment
    ends it, or at the horizon. Equal seeds and actions must give equal episodes, as gymnasium asks of environments.

    Attributes:
        env: the environment, e.g. for an expert.
    """

    def __init__(self, env_id: str, places: Places = Places(), image_size: int = 64, horizon: int = 0):  # noqa: B008
        """Makes it.

        Args:
            env_id: as for `gymnasium.make`.
            image_size: pixels that pictures are resized to, black where they are not square.
            horizon: control steps of an episode; 0: the environment's own limit.

        Raises:
            ValueError: its actions are not a bounded vector, or it has no time limit, rate, picture or state in the
                place that the options name.
            ImportError: gymnasium is not installed.
        """
        gymnasium = _gymnasium()
        self.env = gymnasium.make(env_id, render_mode="rgb_array" if RENDER in places.image else None)
        self._places, self._size = places, image_size
        space = self.env.action_space
        bounded = isinstance(space, gymnasium.spaces.Box) and np.isfinite([space.low, space.high]).all()
        if not bounded or len(space.shape) != 1:
            raise ValueError(f"actions of {env_id} are {space}, expected a vector with finite bounds (a Box)")
        self._low, self._high, self._dtype = space.low.astype(float), space.high.astype(float), space.dtype
        limit = horizon or (self.env.spec.max_episode_steps if self.env.spec else 0)
        if not limit:
            raise ValueError(f"{env_id} has no limit of steps, expected env.horizon=STEPS")
        hz = places.hz or self.env.metadata.get("render_fps") or 0
        if not hz > 0:
            raise ValueError(f"{env_id} does not say how many steps a second has, expected hz=RATE in env.options")
        self._steps, self._won, self._ended = 0, False, False
        self._seen, self._info = self.env.reset(seed=0)
        self.spec = EnvSpec(
            task=env_id.rpartition(":")[2].rpartition("/")[2],  # of module:namespace/Name-v0
            cameras=places.image,
            image_size=image_size,
            action_dim=space.shape[0],
            state_dim=self._state().size,
            control_hz=float(hz),
            horizon=limit,
            version=f"gymnasium {gymnasium.__version__}",
        )

    def reset(self, episode: Episode) -> None:
        """Starts the episode of a seed. Raises ValueError for one of another task."""
        check_episode(episode, self.spec.task)
        self._seen, self._info = self.env.reset(seed=episode.seed)
        self._steps, self._won, self._ended = 0, False, False

    def observe(self) -> EnvObservation:
        """The pictures, the state and the words of the present step."""
        images = {camera: self._picture(camera, self._size) for camera in self._places.image}
        words = self._places.text
        if self._places.instruction:
            words = str(self._found(self._places.instruction, "instruction"))
        return EnvObservation(images, self._state(), words)

    def render(self, camera: str, size: int) -> np.ndarray:
        """A camera's picture uint8 [size, size, 3]."""
        return self._picture(camera, size)

    def step_chunk(self, actions: np.ndarray) -> ChunkResult:
        """Executes actions [E, action_dim] in [-1, 1] (clipped) until the episode ends."""
        executed, started = 0, time.perf_counter()
        for action in np.clip(checked_actions(actions, self.spec.action_dim), -1.0, 1.0):
            if self._done:
                break
            scaled = self._low + (action + 1.0) / 2.0 * (self._high - self._low)
            self._seen, _, terminated, truncated, self._info = self.env.step(scaled.astype(self._dtype))
            self._steps, executed = self._steps + 1, executed + 1
            self._ended = bool(terminated or truncated)
            self._won = bool(terminated) if self._places.success == TERMINATED else self._success()
        return ChunkResult(executed, self._won, self._done, time.perf_counter() - started)

    @property
    def _done(self) -> bool:
        return self._won or self._ended or self._steps >= self.spec.horizon

    def close(self) -> None:
        """Closes the environment."""
        self.env.close()

    def _found(self, place: str, what: str) -> Any:
        """An entry of the observation, or of the info. Raises ValueError: neither has it."""
        for source in (self._seen, self._info):
            for name in place.split("/"):
                if not isinstance(source, dict) or name not in source:
                    break
                source = source[name]
            else:
                return source
        seen = ", ".join(self._seen) if isinstance(self._seen, dict) else "an array"
        raise ValueError(
            f"{what}={place} is not there: the observation has {seen}, the info {', '.join(self._info) or 'nothing'}"
        )

    def _success(self) -> bool:
        return bool(np.asarray(self._found(self._places.success, "success")).item())

    def _state(self) -> np.ndarray:
        if self._places.state == "none":
            return np.zeros(1, np.float32)
        seen = self._found(self._places.state, "state") if self._places.state else self._seen
        if isinstance(seen, dict):
            raise ValueError(
                f"the observation has {', '.join(seen)}, expected state=ONE OF THEM in env.options, or none"
            )
        return np.asarray(seen, np.float32).ravel()

    def _picture(self, camera: str, size: int) -> np.ndarray:
        picture = np.asarray(self.env.render() if camera == RENDER else self._found(camera, "image"))
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
            shown = f"{picture.dtype} {list(picture.shape)}"
            raise ValueError(f"image={camera} is {shown}, expected a picture uint8 [height, width, 3]")
        return _square(picture, size)


def _square(picture: np.ndarray, size: int) -> np.ndarray:
    """uint8 [h, w, 3] to [size, size, 3]: bilinear, aspect kept, centred on black."""
    if picture.shape[:2] == (size, size):
        return picture
    from PIL import Image

    scale = size / max(picture.shape[:2])
    height, width = (max(1, round(pixels * scale)) for pixels in picture.shape[:2])
    out = np.zeros((size, size, 3), np.uint8)
    top, left = (size - height) // 2, (size - width) // 2
    small = Image.fromarray(picture).resize((width, height), Image.Resampling.BILINEAR)
    out[top : top + height, left : left + width] = np.asarray(small)
    return out


def _gymnasium() -> Any:
    try:
        return importlib.import_module("gymnasium")
    except ImportError as error:
        raise ImportError("env.suite=gym:… needs gymnasium: pip install 'z1-jax[gym]'") from error


class GymnasiumSuite(SingleEnv):
    """One environment of gymnasium as a suite of one task, with its name for the task's."""

    own_keys: tuple[str, ...] = ("env.options",)

    def __init__(self, name: str, places: Places, image_size: int, horizon: int):
        """Args: `name`: gym:ENV_ID; the others as `GymnasiumEnv`'s. Raises SettingError where it cannot be made."""
        env_id = name.partition(":")[2]
        make: Any = functools.partial(GymnasiumEnv, env_id, places, image_size, horizon)
        super().__init__(make, name, _imported(places.expert) if places.expert else None)


def _imported(where: str) -> Any:
    module, _, name = where.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as error:  # noqa: BLE001 - it is the user's module: anything can be wrong in it
        text = " ".join(f"{type(error).__name__}: {error}".split())
        raise SettingError("env.options", f"expert={where} cannot be imported: {text}") from error


@functools.cache  # it makes an environment, to see what it is
def gymnasium_suite(name: str, options: tuple[str, ...], image_size: int, horizon: int) -> GymnasiumSuite:
    """The suite of gym:ENV_ID. Raises SettingError where there is none."""
    return GymnasiumSuite(name, read_options(options), image_size, horizon)
