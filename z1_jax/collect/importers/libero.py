"""LIBERO's HDF5 files: its own, and those that OpenVLA's script makes of them by replaying without no-ops.

Frames are stored as rendered, upside down. They are turned by 180 degrees, as every protocol of `envs.libero` does, so
that they are upright and mirrored. Actions are the simulator's, the gripper's included: −1 opens, +1 closes.

LIBERO's own files store with each action what was observed *after* it. So the reader pairs each action with the row
before it, and drops the first action, which has no observation. Replayed files, which have no `env_args`, store what
was observed before the action.
"""

from __future__ import annotations

import json
import pathlib
import re
from typing import Any

from z1_jax.collect.importers.base import STANDARD, BadData, Columns, EpisodeRef, need
from z1_jax.collect.importers.robomimic import RobomimicFile

CAMERAS = {"agentview": "agentview_rgb", "robot0_eye_in_hand": "eye_in_hand_rgb"}  # the environments' name → the file's
_STATE = (("ee_pos", 3), ("ee_ori", 3), ("gripper_states", 2))
HZ = 20.0
_SCENE = re.compile(r"^[A-Z_]+SCENE\d+_")  # before the words in the names of libero_10 and libero_90


def is_libero(path: pathlib.Path) -> bool:
    """Whether a file names a task of LIBERO's, or its first demonstration has LIBERO's observations.

    False for files that cannot be read. The names of LIBERO's pictures are not enough: others may have turned theirs.
    """
    h5py = need("h5py", "h5py", path)
    try:
        with h5py.File(path, "r") as file:
            if "bddl_file_name" in file["data"].attrs or "problem_info" in file["data"].attrs:
                return True
            first = next(iter(file["data"].values()))
            return all(name in first["obs"] for name, _ in _STATE)
    except Exception:  # noqa: BLE001 - the reader that then tries it says what is wrong
        return False


def task_of(place: pathlib.PurePosixPath) -> str:
    """SUITE/NAME of the task that a file is of; NAME alone where it lies in no folder of a suite's."""
    name = place.stem.removesuffix("_demo")
    suite = place.parent.name.removesuffix("_no_noops")
    return f"{suite}/{name}" if suite.startswith("libero_") else name


class LiberoFile(RobomimicFile):
    """One HDF5 file (see `Source`), of one task. Arguments and errors are RobomimicFile's.

    Whichever columns are named, frames are turned and actions are paired with the observation before them.
    """

    parts = tuple((f"obs/{name}", width) for name, width in _STATE)
    whose = "LIBERO's observations"
    turned = True

    def __init__(self, path: pathlib.Path, split: str = "", columns: Columns = STANDARD):
        super().__init__(path, split, columns)
        self.late = int("env_args" in self._data.attrs)
        self.order = self._told()
        self.fps = self.fps or HZ
        task = self._task()
        self.episodes = tuple(EpisodeRef(episode.number, episode.name, task) for episode in self.episodes)

    def facts(self) -> dict[str, Any]:
        return super().facts() | {"format": "libero hdf5" + " replayed" * (not self.late)}

    def _task(self) -> str:
        """SUITE/NAME from the name of the task's BDDL file, or else from this file's name and folder."""
        told = str(self._data.attrs.get("bddl_file_name", ""))
        place = pathlib.PurePosixPath(told) if told else pathlib.PurePosixPath(self.path.absolute().as_posix())
        return task_of(place)

    def _instruction(self, demo: Any, where: str) -> str:
        """For a task of a suite the benchmark's words, as environments and openpi's data have; else the file's."""
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

    def _column_of(self, camera: str) -> str:
        return f"obs/{CAMERAS[camera]}" if camera in CAMERAS else ""

    def _cameras_of(self, name: str) -> list[str]:
        try:
            return [camera for camera, stored in CAMERAS.items() if stored in self._demo(name)["obs"]]
        except Exception:  # noqa: BLE001 - told when the episode is read
            return []

    def _pictures_of(self, name: str) -> list[str]:
        known = CAMERAS.values()
        return [picture for picture in super()._pictures_of(name) if picture not in known]
