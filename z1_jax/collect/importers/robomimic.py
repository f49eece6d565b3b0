"""HDF5 files of demonstrations: robomimic's layout, as RoboCasa v0.1 publishes it, and others whose columns are named.

robomimic's has data/demo_i with actions, obs and ep_meta. Actions are in the simulator's order already. Images are
taken as they stand: robomimic stores them upright.
"""

from __future__ import annotations

import collections
import json
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from z1_jax.collect.importers.base import (
    STANDARD,
    BadData,
    Columns,
    EpisodeRef,
    RawEpisode,
    check_length,
    checksum,
    need,
)
from z1_jax.collect.importers.orders import STATE_OBSERVATIONS
from z1_jax.errors import UserError, first_line

_IMAGE = "_image"
_ERRORS = (OSError, KeyError, ValueError, RuntimeError, TypeError, AttributeError)  # of h5py, on damaged files
_SHOWN = 24  # columns that an error lists


class RobomimicFile:
    """One HDF5 file (see `Source`).

    Its demonstrations are the groups in data, or in the file where it has no such group. A file that holds the named
    columns itself is one demonstration, as ALOHA's are; its task is then named after its folder.

    Args:
        split: a filter key of the file's `mask` group; empty: all demonstrations.
        columns: paths within a demonstration's group, or within its obs.

    Raises:
        BadData: it cannot be opened, holds no demonstrations, or lacks a named column.
        UserError: h5py is not installed, or there is no such split.
    """

    parts = tuple((f"obs/{name}", width) for name, width in STATE_OBSERVATIONS)  # of the state, where none are named
    whose = "the observations of RoboCasa's robot"
    late = 0  # steps that observations are stored after the action that was chosen on them
    turned = False  # whether frames are stored upside down

    def __init__(self, path: pathlib.Path, split: str = "", columns: Columns = STANDARD):
        self.path, self._named = path, columns
        self.flaws: tuple[str, ...] = ()
        h5py = need("h5py", "h5py", path)
        try:
            self._file = h5py.File(path, "r")
            self._data = self._file["data"] if "data" in self._file else self._file
            self._alone = bool(columns.actions) and all(
                hasattr(_find(self._data, name), "shape") for name in columns.actions
            )
            names = [path.stem] if self._alone else self._split(split) if split else self._groups()
        except _ERRORS as error:
            if isinstance(error, UserError):
                raise
            raise BadData(f"{path} cannot be read as robomimic's HDF5 ({first_line(error)}); get it anew") from None
        arguments = self._env_args()
        settings = arguments.get("env_kwargs")
        self.fps = _number(settings.get("control_freq")) if isinstance(settings, dict) else None
        self._version = str(arguments.get("env_version", "unknown"))
        task = str(arguments.get("env_name") or (path.absolute().parent.name if self._alone else path.stem))
        self.episodes = tuple(EpisodeRef(_number_of(name), name, task) for name in sorted(names, key=_number_of))
        if not self.episodes:
            raise BadData(f"{path} holds no demonstrations; expected groups data/demo_0, data/demo_1, …")
        self._state = tuple((name, None) for name in columns.state) or self.parts
        self._actions = tuple((name, None) for name in columns.actions) or (("actions", None),)
        self._check_names()
        shapes = [shape for name in names if (shape := self._shape(name, self._actions))]
        self.action_dim, self._steps = _most_common(shapes), sum(steps for steps, _ in shapes)
        self.state_dim = sum(width or 0 for _, width in self._state)
        if columns.state:
            self.state_dim = _most_common([shape for name in names if (shape := self._shape(name, self._state))])
        self.cameras = tuple(dict(columns.images) or sorted({c for name in names for c in self._cameras_of(name)}))
        self.frames = tuple(f"{camera}: arrays" for camera in self.cameras)
        self.pictures = tuple(sorted({picture for name in names[:1] for picture in self._pictures_of(name)}))
        self.order = self._told()

    def facts(self) -> dict[str, Any]:
        return {
            "path": str(self.path),
            "format": "robomimic hdf5",
            "version": self._version,
            "bytes": self.path.stat().st_size,
            "sha256_of_ends": checksum([self.path]),
            "episodes": len(self.episodes),
            "frames": self._steps,
        }

    def read(
        self, episode: EpisodeRef, cameras: Sequence[str], stride: int, instruction: str | None = None
    ) -> RawEpisode:
        """See `Source`."""
        where = f"{self.path}, {episode.name}"
        demo = self._demo(episode.name)
        actions = self._joined(demo, self._actions, where)
        steps = len(actions)
        told = demo.attrs.get("num_samples")
        if told is not None and int(told) != steps > 0:
            raise BadData(f"{where}: it has {steps} actions, expected the {int(told)} of its num_samples")
        state = self._joined(demo, self._state, where, steps)
        images = {camera: self._frames(episode.name, camera, where, steps)[::stride] for camera in cameras}
        text = self._instruction(demo, where) if instruction is None else instruction
        if 0 < steps <= self.late:
            raise BadData(f"{where} has {steps} actions, expected at least 2: the first has no observation")
        return RawEpisode(images, state[: steps - self.late], actions[self.late :], text)

    def _demo(self, name: str) -> Any:
        return self._data if self._alone else self._data[name]

    def _joined(self, demo: Any, parts: Sequence[tuple[str, int | None]], where: str, steps: int = -1) -> np.ndarray:
        """Columns side by side [steps, sum of widths]; `steps` is the length of the first where it is not given."""
        found = []
        for name, width in parts:
            column = _find(demo, name)
            if column is None:
                if self._named.state or self._named.actions:
                    raise BadData(f"{where} has no column {name}; it has {_listed(demo)}")
                raise BadData(
                    f"{where} has no {name}; expected {self.whose}, or names of others: --state=COLUMN,COLUMN; it has "
                    f"{_listed(demo)}"
                )
            part = np.asarray(column)
            part = part[:, None] if part.ndim == 1 and width is None else part
            if part.ndim != 2 or width not in (None, part.shape[1]):
                raise BadData(f"{where}: {name} has shape {list(part.shape)}, expected [steps, {width or 'width'}]")
            check_length(where, name, len(part), len(part) if steps < 0 else steps)
            steps = len(part)
            found.append(part)
        return np.concatenate(found, axis=1)

    def _frames(self, name: str, camera: str, where: str, steps: int) -> np.ndarray:
        """Frames of every step that is kept, upright: [steps − late, H, W, 3]."""
        demo = self._demo(name)
        column = dict(self._named.images).get(camera) or self._column_of(camera)
        frames = _find(demo, column) if column else None
        if frames is None:
            if self._named.images:
                raise BadData(f"{where} has no column {column} of images; it has {_listed(demo)}")
            got = ", ".join(self._cameras_of(name)) or "no camera at all"
            raise BadData(f"{where} has no images of {camera}; it has {got}")
        if frames.ndim != 4:
            raise BadData(
                f"{where}: {column} has shape {list(frames.shape)}, expected images [steps, height, width, 3]; of "
                "encoded ones import a LeRobot version"
            )
        check_length(where, camera, frames.shape[0], steps)
        kept = frames[: max(0, steps - self.late)]
        return np.ascontiguousarray(kept[:, ::-1, ::-1]) if self.turned else kept

    def _column_of(self, camera: str) -> str:
        """The column of a camera's frames where none is named; empty: it has none."""
        return f"obs/{camera}{_IMAGE}"

    def _instruction(self, demo: Any, where: str) -> str:
        try:
            text = json.loads(demo.attrs["ep_meta"])["lang"]
        except (KeyError, ValueError, TypeError):
            text = None
        if not isinstance(text, str):
            raise BadData(
                f"{where} has no instruction; expected JSON with a text under the key lang in its ep_meta, or "
                "--instruction=TEXT, or --instructions=TABLE for one an episode"
            )
        return text

    def _groups(self) -> list[str]:
        """Names of the demonstrations' groups."""
        names = [name for name, value in self._data.items() if hasattr(value, "keys")]
        if self._data is not self._file:
            return names
        names = [name for name in names if self._named.actions and self._shape(name, [(self._named.actions[0], None)])]
        if names:
            return names
        wanted = f"group with {self._named.actions[0]}" if self._named.actions else "group data, which robomimic's have"
        raise BadData(
            f"{self.path} has no {wanted}; it has {_listed(self._file)}; name the columns of files of another layout: "
            "--actions=COLUMN --state=COLUMN,COLUMN --images=CAMERA:COLUMN"
        )

    def _check_names(self) -> None:
        """Checks the named columns on the first demonstration, since a wrong name is wrong for the whole file."""
        try:
            demo = self._demo(self.episodes[0].name)
            options = (("state", self._named.state), ("actions", self._named.actions))
            named = [(option, name) for option, names in options for name in names]
            named += [("images", column) for _, column in self._named.images]
            missing = [(option, name) for option, name in named if not hasattr(_find(demo, name), "shape")]
        except _ERRORS:
            return  # told when the episode is read
        for option, name in missing:
            raise BadData(
                f"option --{option}: {self.path}, {self.episodes[0].name} has no column {name}; it has {_listed(demo)}"
            )

    def _told(self) -> str:
        """What was done to actions, state and pictures, in words."""
        named = self._named
        actions = f" from {' + '.join(named.actions)}" * bool(named.actions)
        late = ", from the second on: observations were stored a step late" * bool(self.late)
        state = " + ".join(named.state) or ", ".join(name.removeprefix("obs/") for name, _ in self.parts)
        images = "".join(f", {camera} from {column}" for camera, column in named.images)
        pictures = "turned by 180 degrees" if self.turned else "as stored"
        return f"actions{actions} as stored{late}; state: {state}{images}; pictures {pictures}"

    def _split(self, split: str) -> list[str]:
        masks = self._file["mask"] if "mask" in self._file else {}
        if split not in masks:
            known = ", ".join(masks) or "none"
            raise UserError(f"option --split: {self.path} has no mask {split!r}; it has {known}")
        names = [name.decode() if isinstance(name, bytes) else str(name) for name in masks[split][()]]
        return list(dict.fromkeys(names))

    def _env_args(self) -> dict[str, Any]:
        try:
            return dict(json.loads(self._data.attrs["env_args"]))
        except (KeyError, ValueError, TypeError):
            return {}

    def _shape(self, name: str, parts: Sequence[tuple[str, int | None]]) -> tuple[int, int] | None:
        """(steps, sum of the columns' widths) of a demonstration; None where the reader will tell what is wrong."""
        try:
            shapes = [_find(self._demo(name), column).shape for column, _ in parts]
            return shapes[0][0], sum(shape[1] if len(shape) == 2 else 1 for shape in shapes)
        except (*_ERRORS, IndexError):
            return None

    def _cameras_of(self, name: str) -> list[str]:
        try:
            return sorted(key.removesuffix(_IMAGE) for key in self._demo(name)["obs"] if key.endswith(_IMAGE))
        except _ERRORS:
            return []

    def _pictures_of(self, name: str) -> list[str]:
        """Observations that look like frames and do not end in _image."""
        try:
            found = self._demo(name)["obs"].items()
            return [key for key, d in found if d.ndim == 4 and d.dtype == np.uint8 and not key.endswith(_IMAGE)]
        except _ERRORS:
            return []


def _find(demo: Any, name: str) -> Any:
    """A column by its path in a demonstration's group, or in its obs; None where there is none."""
    for path in (name, f"obs/{name}"):
        if path in demo:
            return demo[path]
    return None


def _listed(demo: Any) -> str:
    """The columns of a group with their shapes, for an error."""
    found: list[str] = []
    demo.visititems(
        lambda name, value: found.append(f"{name} {list(value.shape)}") if hasattr(value, "shape") else None
    )
    return ", ".join(found[:_SHOWN]) + ", …" * (len(found) > _SHOWN) or "no columns"


def _most_common(shapes: Sequence[tuple[int, int]]) -> int:
    widths = collections.Counter(width for _, width in shapes)
    return widths.most_common(1)[0][0] if widths else 0


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) else None


def _number_of(name: str) -> int:
    """The i of demo_i; names without a number come first."""
    digits = re.search(r"(\d+)$", name)
    return int(digits.group()) if digits else -1
