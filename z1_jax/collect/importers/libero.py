"""LIBERO's HDF5 files: its own, and those that OpenVLA's script makes of them by replaying without no-ops.

Frames are stored as rendered, upside down. They are turned by 180 degrees, as every protocol of `envs.libero` does, so
that they are upright and mirrored. Actions are the simulator's, the gripper's included: −1 opens, +1 closes.

LIBERO's own files hold with each action what was observed *after* it: observations are put one step later here, and the
first action has none. Replayed files, which have no `env_args`, hold what was observed before.
"""

from __future__ import annotations

import json
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from z1_jax.collect.importers.base import BadData, EpisodeRef, RawEpisode, check_length, need
from z1_jax.collect.importers.robomimic import RobomimicFile

CAMERAS = {"agentview": "agentview_rgb", "robot0_eye_in_hand": "eye_in_hand_rgb"}  # the environments' name → the file's
_STATE = (("ee_pos", 3), ("ee_ori", 3), ("gripper_states", 2))
_HZ = 20.0
_SCENE = re.compile(r"^[A-Z_]+SCENE\d+_")  # before the words in the names of libero_10 and libero_90


def is_libero(path: pathlib.Path) -> bool:
    """Whether a file's first demonstration has LIBERO's observations; False for what cannot be read."""
    h5py = need("h5py", "h5py", path)
    try:
        with h5py.File(path, "r") as file:
            first = next(iter(file["data"].values()))
            return all(name in first["obs"] for name, _ in _STATE)
    except Exception:  # noqa: BLE001 - the reader that then tries it says what is wrong
        return False


class LiberoFile(RobomimicFile):
    """One HDF5 file (see `Source`), of one task. Arguments and errors are RobomimicFile's."""

    def __init__(self, path: pathlib.Path, split: str = ""):
        super().__init__(path, split)
        self._late = "env_args" in self._data.attrs
        self.fps = self.fps or _HZ
        self.state_dim = sum(width for _, width in _STATE)
        self.order = (
            f"actions as stored, {'from the second on: observations were stored a step late' * self._late}"
            f"{'each with its observation' * (not self._late)}; state: ee_pos, ee_ori, gripper_states; pictures turned "
            "by 180 degrees"
        )
        task = self._task()
        self.episodes = tuple(EpisodeRef(episode.number, episode.name, task) for episode in self.episodes)

    def facts(self) -> dict[str, Any]:
        return super().facts() | {"format": "libero hdf5" + " replayed" * (not self._late)}

    def read(
        self, episode: EpisodeRef, cameras: Sequence[str], stride: int, instruction: str | None = None
    ) -> RawEpisode:
        """See `Source`."""
        where = f"{self.path}, {episode.name}"
        demo = self._data[episode.name]
        actions = np.asarray(demo["actions"])
        observations = demo["obs"] if "obs" in demo else {}
        parts = [self._column(observations, name, width, where, len(actions)) for name, width in _STATE]
        state = np.concatenate(parts, axis=1)
        images = {}
        for camera in cameras:
            if CAMERAS.get(camera) not in observations:
                got = ", ".join(self._cameras_of(episode.name)) or "no camera at all"
                raise BadData(f"{where} has no images of {camera}; it has {got}")
            frames = observations[CAMERAS[camera]]
            check_length(where, camera, frames.shape[0], len(actions))
            images[camera] = np.ascontiguousarray(frames[: len(actions) - self._late][::stride][:, ::-1, ::-1])
        if self._late:
            if len(actions) < 2:
                raise BadData(f"{where} has {len(actions)} actions, expected at least 2: the first has no observation")
            state, actions = state[:-1], actions[1:]
        return RawEpisode(images, state, actions, self._words(where) if instruction is None else instruction)

    def _column(self, observations: Any, name: str, width: int, where: str, steps: int) -> np.ndarray:
        if name not in observations:
            raise BadData(f"{where} has no obs/{name}; expected LIBERO's observations")
        part = np.asarray(observations[name])
        if part.ndim != 2 or part.shape[1] != width:
            raise BadData(f"{where}: obs/{name} has shape {list(part.shape)}, expected [steps, {width}]")
        check_length(where, f"obs/{name}", len(part), steps)
        return part

    def _task(self) -> str:
        """SUITE/NAME by the task's own file, or else by this one's name and folder."""
        told = str(self._data.attrs.get("bddl_file_name", ""))
        place = pathlib.PurePosixPath(told) if told else pathlib.PurePosixPath(self.path.absolute().as_posix())
        name = place.stem.removesuffix("_demo")
        suite = place.parent.name.removesuffix("_no_noops")
        return f"{suite}/{name}" if suite.startswith("libero_") else name

    def _words(self, where: str) -> str:
        """The instruction: in a suite the benchmark's, which environments and openpi's data have; else the file's."""
        suite, _, name = self._task().rpartition("/")
        if suite:
            return _SCENE.sub("", name).replace("_", " ")
        try:
            words = json.loads(self._data.attrs["problem_info"])["language_instruction"]
        except (KeyError, ValueError, TypeError):
            words = None
        text = "".join(words).strip('" ') if isinstance(words, (str, list)) else ""
        if not text:
            raise BadData(
                f"{where} has no instruction; expected language_instruction in the problem_info of its data, or a "
                "file in a folder of a suite's name (libero_object/…_demo.hdf5)"
            )
        return " ".join(text.lower().split())

    def _cameras_of(self, name: str) -> list[str]:
        try:
            return [camera for camera, stored in CAMERAS.items() if stored in self._data[name]["obs"]]
        except Exception:  # noqa: BLE001 - told when the episode is read
            return []

    def _pictures_of(self, name: str) -> list[str]:
        known = CAMERAS.values()
        return [picture for picture in super()._pictures_of(name) if picture not in known]
