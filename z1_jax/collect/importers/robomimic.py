"""HDF5 files in robomimic's layout, as RoboCasa v0.1 publishes them: data/demo_i with actions, obs and ep_meta.

Actions are in the simulator's order already. Images are taken as they stand: robomimic stores them upright.
"""

from __future__ import annotations

import collections
import json
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from z1_jax.collect.importers.base import BadData, EpisodeRef, RawEpisode, check_length, checksum, need
from z1_jax.collect.importers.orders import STATE_OBSERVATIONS
from z1_jax.errors import UserError, first_line

_IMAGE = "_image"
_ERRORS = (OSError, KeyError, ValueError, RuntimeError, TypeError, AttributeError)  # of h5py, on damaged files


class RobomimicFile:
    """One HDF5 file (see `Source`).

    Args:
        split: a filter key of the file's `mask` group; empty: all demonstrations.

    Raises:
        BadData: it cannot be opened, or holds no demonstrations.
        UserError: h5py is not installed, or there is no such split.
    """

    order = "actions raw as stored; state from the five observations of RoboCasa"

    def __init__(self, path: pathlib.Path, split: str = ""):
        self.path = path
        self.flaws: tuple[str, ...] = ()
        h5py = need("h5py", "h5py", path)
        try:
            self._file = h5py.File(path, "r")
            self._data = self._file["data"]
            names = self._split(split) if split else list(self._data)
        except _ERRORS as error:
            if isinstance(error, UserError):
                raise
            raise BadData(f"{path} cannot be read as robomimic's HDF5 ({first_line(error)}); get it anew") from None
        arguments = self._env_args()
        settings = arguments.get("env_kwargs")
        self.fps = _number(settings.get("control_freq")) if isinstance(settings, dict) else None
        self._version = str(arguments.get("env_version", "unknown"))
        task = str(arguments.get("env_name") or path.stem)
        self.episodes = tuple(EpisodeRef(_number_of(name), name, task) for name in sorted(names, key=_number_of))
        if not self.episodes:
            raise BadData(f"{path} holds no demonstrations; expected groups data/demo_0, data/demo_1, …")
        shapes = [self._shape(name) for name in names]
        widths = collections.Counter(shape[1] for shape in shapes if len(shape) == 2)
        self.action_dim = widths.most_common(1)[0][0] if widths else 0
        self._steps = sum(shape[0] for shape in shapes if shape)
        self.state_dim = sum(width for _, width in STATE_OBSERVATIONS)
        self.cameras = tuple(sorted({camera for name in names for camera in self._cameras_of(name)}))
        self.frames = tuple(f"{camera}: arrays" for camera in self.cameras)
        self.pictures = tuple(sorted({picture for name in names[:1] for picture in self._pictures_of(name)}))

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
        demo = self._data[episode.name]
        actions = np.asarray(demo["actions"])
        told = demo.attrs.get("num_samples")
        if told is not None and int(told) != len(actions) > 0:
            raise BadData(f"{where}: it has {len(actions)} actions, expected the {int(told)} of its num_samples")
        observations = demo["obs"] if "obs" in demo else {}
        state = self._state(observations, where, len(actions))
        images = {}
        for camera in cameras:
            if camera + _IMAGE not in observations:
                got = ", ".join(self._cameras_of(episode.name)) or "no camera at all"
                raise BadData(f"{where} has no images of {camera}; it has {got}")
            check_length(where, camera, observations[camera + _IMAGE].shape[0], len(actions))
            images[camera] = observations[camera + _IMAGE][...][::stride]
        text = self._instruction(demo, where) if instruction is None else instruction
        return RawEpisode(images, state, actions, text)

    def _state(self, observations: Any, where: str, steps: int) -> np.ndarray:
        parts = []
        for name, width in STATE_OBSERVATIONS:
            if name not in observations:
                raise BadData(f"{where} has no obs/{name}; expected the observations of RoboCasa's robot")
            part = np.asarray(observations[name])
            if part.ndim != 2 or part.shape[1] != width:
                raise BadData(f"{where}: obs/{name} has shape {list(part.shape)}, expected [steps, {width}]")
            check_length(where, f"obs/{name}", len(part), steps)
            parts.append(part)
        return np.concatenate(parts, axis=1)

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

    def _shape(self, name: str) -> tuple[int, ...]:
        try:
            return tuple(self._data[name]["actions"].shape)
        except _ERRORS:
            return ()  # told when the episode is read

    def _cameras_of(self, name: str) -> list[str]:
        try:
            return sorted(key.removesuffix(_IMAGE) for key in self._data[name]["obs"] if key.endswith(_IMAGE))
        except _ERRORS:
            return []

    def _pictures_of(self, name: str) -> list[str]:
        """Observations that look like frames and do not end in _image: LIBERO's *_rgb."""
        try:
            found = self._data[name]["obs"].items()
            return [key for key, d in found if d.ndim == 4 and d.dtype == np.uint8 and not key.endswith(_IMAGE)]
        except _ERRORS:
            return []


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) else None


def _number_of(name: str) -> int:
    """The i of demo_i; names without a number come first."""
    digits = re.search(r"(\d+)$", name)
    return int(digits.group()) if digits else -1
