"""LeRobot directories: v2.0 and v2.1 (a file an episode), v3.0 (many episodes a file), with videos or images.

RoboCasa v1.0 is v2.1 with `meta/modality.json`, whose parts are put into raw order; without it columns stay as stored.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from z1_jax.collect.importers import orders
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
from z1_jax.collect.importers.lerobot_meta import Entry, Meta, read_meta
from z1_jax.collect.importers.video import read_frames
from z1_jax.errors import UserError, first_line

STATE, ACTION = "observation.state", "action"
_TASK, _DESCRIPTION = "task_index", "annotation.human.task_description"  # columns: indices into the table of tasks
_EPISODE = "episode_index"
_COLOURS = ("1", "L", "LA", "P", "PA", "RGB", "RGBA")  # Pillow's modes of 8 bits a colour or less
_STAMP_TOLERANCE = 0.1  # of a frame: time stamps are float32
_RATE_TOLERANCE = 0.01  # relative, over a whole episode
_LARGEST = 0.9  # of a frame: stamps that are further off may be a lost frame


class LeRobotDirectory:
    """One LeRobot dataset (see `Source`).

    Args:
        columns: the names of its columns.
        split: a name under `splits` of meta/info.json; empty: all episodes.

    Raises:
        BadData: the tables cannot be read, or the dataset has no episodes.
        UserError: pyarrow is not installed, or there is no such split.
    """

    pictures: tuple[str, ...] = ()

    def __init__(self, path: pathlib.Path, split: str = "", columns: Columns = STANDARD):
        self.path, self._how = path, columns
        self._meta: Meta = read_meta(path)
        self.flaws = self._meta.flaws
        self.fps: float | None = self._meta.fps
        self._entries = {entry.index: entry for entry in self._split(split)}
        self.episodes = tuple(
            EpisodeRef(e.index, f"episode {e.index}", self._meta.task or (e.tasks[0] if e.tasks else ""))
            for e in self._entries.values()
        )
        if columns.split_tasks:
            self.episodes = tuple(segment for episode in self.episodes for segment in self._segments(episode))
        if not self.episodes:
            raise BadData(next(iter(self.flaws), f"{path} lists no episodes; expected at least one in {path}/meta"))
        self._state, self._actions = columns.state or (STATE,), columns.actions or (ACTION,)
        self._camera_keys = self._named_cameras(columns.images) if columns.images else self._meta.camera_keys()
        self.cameras = tuple(self._camera_keys)
        self.frames = tuple(self._stored(camera, key) for camera, key in self._camera_keys.items())
        self.action_dim = sum(self._width(key, "actions") for key in self._actions)
        self.state_dim = sum(self._width(key, "state") for key in self._state)
        parts = orders.ACTION_PARTS, orders.STATE_PARTS  # what is named is taken in the order that is told
        self._action_columns = None if columns.actions else self._columns("action", parts[0], ACTION, self.action_dim)
        self._state_columns = None if columns.state else self._columns("state", parts[1], STATE, self.state_dim)
        if columns.tolerance_s * self.fps >= _LARGEST:
            raise BadData(
                f"option --tolerance-s: {columns.tolerance_s:g} s is {columns.tolerance_s * self.fps:.2g} frames of "
                f"{path}, which hides lost frames; expected less than {_LARGEST / self.fps:.3g} s"
            )
        depth = self._meta.depth_keys()
        self.order = ", ".join(
            f"{name} {'in raw order by meta/modality.json' if found is not None else 'in the order that is stored'}"
            + f" in {' + '.join(given)}" * bool(given)
            for name, found, given in (
                ("actions", self._action_columns, columns.actions),
                ("state", self._state_columns, columns.state),
            )
        )
        self.order += "".join(f", {camera} from {column}" for camera, column in columns.images)
        self.order += f"; depth is left out: {', '.join(depth)}" * bool(depth)

    def facts(self) -> dict[str, Any]:
        return {
            "path": str(self.path),
            "format": "lerobot",
            "version": self._meta.version,
            "sha256_of_tables": checksum(self._meta.tables),
            "episodes": len(self.episodes),
            "frames": sum(entry.length for entry in self._entries.values()),
        }

    def read(
        self, episode: EpisodeRef, cameras: Sequence[str], stride: int, instruction: str | None = None
    ) -> RawEpisode:
        """See `Source`."""
        entry = self._entries[episode.number]
        path = self.path / self._meta.data_file(entry)
        where = f"{path}, {episode.name}"
        rows = self._rows(path, where, entry)
        actions, state = self._join(rows, self._actions, where), self._join(rows, self._state, where)
        if not len(actions):
            raise BadData(
                f"{where} is empty: no row has its episode_index, the table of episodes tells of {entry.length} steps"
            )
        check_length(where, "the table of episodes", entry.length, len(actions))
        first_s = self._first_stamp(rows, where)
        self._check_numbers(rows, where, first_s)
        steps = slice(*episode.span) if episode.span else slice(None)
        images = {}
        for camera in cameras:
            key = self._camera_keys[camera]
            if self._meta.features[key]["dtype"] == "video":
                if not self._meta.video_path:
                    raise BadData(f"{self.path}/meta/info.json has no video_path, yet {key} is a video")
                place = self._meta.video_place(entry, key)
                images[camera] = read_frames(self.path, place, first_s, self._meta.fps, stride, episode.span)
            else:
                images[camera] = self._stored_images(rows, key, where)[steps][::stride]
        if instruction is None:
            instruction = self._instruction(rows.slice(*_first_and_count(steps, len(rows))), where)
        return RawEpisode(
            images,
            (state if self._state_columns is None else state[:, self._state_columns])[steps],
            (actions if self._action_columns is None else actions[:, self._action_columns])[steps],
            instruction,
        )

    def _stored(self, camera: str, key: str) -> str:
        """How the frames of a camera are stored, as meta/info.json says."""
        feature = self._meta.features[key]
        info = feature.get("info") or feature.get("video_info") or {}
        codec = f", {info['video.codec']}" if info.get("video.codec") else ""
        shape = "×".join(map(str, feature.get("shape", ())))
        return f"{camera}: {feature['dtype']}{codec}, {shape}"

    def _segments(self, episode: EpisodeRef) -> list[EpisodeRef]:
        """The episode, or a part for each stretch of one task; whole if it cannot be read, which `read` will say."""
        parquet = need("pyarrow.parquet", "pyarrow", self.path)
        entry = self._entries[episode.number]
        path = self.path / self._meta.data_file(entry)
        try:
            column = _DESCRIPTION if _DESCRIPTION in parquet.read_schema(path).names else _TASK
            found = parquet.read_table(path, columns=[column], filters=[(_EPISODE, "==", entry.index)])
            tasks = [v[0] if isinstance(v, list) else v for v in found.column(column).to_pylist()]
        except (OSError, ValueError, KeyError):
            return [episode]
        starts = [0, *(step for step in range(1, len(tasks)) if tasks[step] != tasks[step - 1]), len(tasks)]
        if len(starts) <= 2:
            return [episode]
        return [
            dataclasses.replace(
                episode,
                name=f"{episode.name}, steps {start} to {stop - 1}",
                task=self._meta.task or str(self._meta.tasks.get(tasks[start], "")),
                span=(start, stop),
            )
            for start, stop in itertools.pairwise(starts)
        ]

    def _rows(self, path: pathlib.Path, where: str, entry: Entry) -> Any:
        parquet = need("pyarrow.parquet", "pyarrow", self.path)
        if not path.is_file():
            raise BadData(f"{where}: the file is missing; the dataset is half written or half copied: get it anew")
        try:
            present = set(parquet.read_schema(path).names)
            stored = [key for key, f in self._meta.features.items() if f["dtype"] != "video" and key in present]
            filters = [(_EPISODE, "==", entry.index)]
            rows = parquet.read_table(path, columns=stored, filters=filters)
            if not entry.place:  # v2: the file is the episode's own
                others = set(parquet.read_table(path, columns=[_EPISODE]).column(_EPISODE).to_pylist()) - {entry.index}
        except (OSError, ValueError, KeyError) as error:  # pyarrow's own errors are ValueErrors and OSErrors
            raise BadData(f"{where} cannot be read ({first_line(error)}); get it anew") from None
        if not entry.place and others:
            raise BadData(f"{where}: it holds rows of {_EPISODE} {sorted(others)[0]}, expected {entry.index} alone")
        return rows

    def _check_numbers(self, rows: Any, where: str, first_s: float) -> None:
        """Checks that frame_index and index rise by one, and that frame_index begins where the time stamps do."""
        for name in ("frame_index", "index"):
            if name not in rows.column_names:
                continue
            numbers = np.array(rows.column(name).to_pylist(), np.float64).ravel()
            wrong = np.flatnonzero(np.diff(numbers) != 1)
            if len(wrong):
                before, after = numbers[wrong[0] : wrong[0] + 2]
                raise BadData(f"{where}: {name} goes from {before:g} to {after:g} at row {wrong[0] + 1}, expected +1")
            if name == "frame_index" and numbers[0] not in (0, round(first_s * self._meta.fps)):
                raise BadData(
                    f"{where}: frame_index begins at {numbers[0]:g}, expected 0, or "
                    f"{round(first_s * self._meta.fps)} as its time stamps ({first_s:g} s)"
                )

    def _join(self, rows: Any, keys: Sequence[str], where: str) -> np.ndarray:
        """Columns of vectors side by side, [N, sum of widths]."""
        return np.concatenate([self._array(rows, key, where) for key in keys], axis=1)

    def _named_cameras(self, images: Sequence[tuple[str, str]]) -> dict[str, str]:
        known = self._meta.camera_keys().values()
        for _, column in images:
            if column not in known:
                shown = ", ".join(known) or "none"
                raise BadData(f"option --images: {self.path} has no column {column} of images; it has {shown}")
        return dict(images)

    def _array(self, rows: Any, key: str, where: str) -> np.ndarray:
        """A column of vectors [N, width], float64."""
        if key not in rows.column_names:
            raise BadData(f"{where} has no column {key}; expected it, as meta/info.json says")
        values = rows.column(key).to_pylist()
        expected = int(np.prod(self._meta.features[key]["shape"]))
        if any(value is None for value in values):
            raise BadData(f"{where}: {key} holds values that are no numbers")
        vectors = [value if isinstance(value, list) else [value] for value in values]
        wrong = {len(vector) for vector in vectors} - {expected}
        if wrong:
            raise BadData(f"{where}: {key} has width {sorted(wrong)[0]}, expected {expected} as in meta/info.json")
        try:
            return np.array(vectors, np.float64).reshape(len(vectors), expected)
        except (TypeError, ValueError):
            raise BadData(f"{where}: {key} holds values that are no numbers") from None

    def _first_stamp(self, rows: Any, where: str) -> float:
        """Seconds from the beginning of the episode's video to its first frame, by the time stamps, as LeRobot does."""
        if "timestamp" not in rows.column_names:
            return 0.0
        stamps = np.array(rows.column("timestamp").to_pylist(), np.float64).ravel()
        if not np.isfinite(stamps).all() or stamps[0] < -_STAMP_TOLERANCE / self._meta.fps:
            raise BadData(f"{where}: the first time stamp is {stamps[0]:g} s, or one is none; expected 0 s or later")
        if len(stamps) < 2:
            return float(stamps[0])
        steps = np.diff(stamps)
        off = float(np.abs(steps - 1 / self._meta.fps).max())
        tolerance_s = max(_STAMP_TOLERANCE / self._meta.fps, self._how.tolerance_s)
        if off > tolerance_s:
            worst = steps[np.argmax(np.abs(steps - 1 / self._meta.fps))]
            cure = f"; --tolerance-s={off * 1.01:.2g} takes stamps of a real clock" * (off * self._meta.fps < _LARGEST)
            raise BadData(
                f"{where}: time stamps {worst:.4g} s apart, expected {1 / self._meta.fps:.4g} s at the "
                f"{self._meta.fps:g} frames a second of meta/info.json{cure}"
            )
        rate = 1 / steps.mean()
        if abs(rate / self._meta.fps - 1) > _RATE_TOLERANCE + tolerance_s * self._meta.fps / len(steps):
            raise BadData(
                f"{where}: {rate:.4g} time stamps a second over the episode, expected the {self._meta.fps:g} of "
                "meta/info.json"
            )
        return float(stamps[0])

    def _stored_images(self, rows: Any, key: str, where: str) -> np.ndarray:
        if key not in rows.column_names:
            raise BadData(f"{where} has no images in column {key}; expected them, as meta/info.json says")
        try:
            frames = []
            for value in rows.column(key).to_pylist():
                data = value["bytes"] if value["bytes"] else (self.path / value["path"]).read_bytes()
                image = Image.open(io.BytesIO(data))
                if image.mode not in _COLOURS:
                    raise ValueError(f"mode {image.mode} is no picture of 8 bits a colour; depth cannot be imported")
                frames.append(np.asarray(image.convert("RGB")))
            return np.stack(frames)
        except (OSError, TypeError, KeyError, ValueError) as error:
            raise BadData(f"{where}: an image of {key} cannot be read ({first_line(error)}); get it anew") from None

    def _instruction(self, rows: Any, where: str) -> str:
        """The text of the one task that the rows name."""
        column = _DESCRIPTION if _DESCRIPTION in rows.column_names else _TASK
        if column not in rows.column_names:
            raise BadData(f"{where} has no column {_TASK}; expected the index of its instruction")
        found = {v[0] if isinstance(v, list) else v for v in rows.column(column).to_pylist()}
        if len(found) != 1 or not found <= set(self._meta.tasks):
            raise BadData(
                f"{where}: {column} is {sorted(found, key=str)[:5]}, expected one of the {len(self._meta.tasks)} tasks "
                f"for the whole episode{'; --task-changes=split makes an episode of each' * (len(found) > 1)}"
            )
        text = self._meta.tasks[found.pop()]
        if not isinstance(text, str):
            raise BadData(f"{where} has no instruction; the table of tasks has {text!r} for it, expected a text")
        return text

    def _columns(self, section: str, parts: orders.Parts, key: str, width: int) -> np.ndarray | None:
        named = self._meta.modality.get(section)
        try:
            return None if named is None else orders.columns(named, parts, width, key)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BadData(f"{self.path}/meta/modality.json, {section}: {first_line(error)}") from None

    def _width(self, key: str, option: str) -> int:
        """How many numbers a row of a column has. `option` is the flag that can name another column."""
        feature = self._meta.features.get(key)
        if feature is None:
            known = ", ".join(self._meta.features)
            raise BadData(
                f"{self.path}/meta/info.json has no feature {key}; it has {known}; "
                f"--{option}=NAME, or NAME,NAME to join several, says which to read"
            )
        if feature["dtype"] in ("video", "image", "string"):
            raise BadData(f"option --{option}: {key} of {self.path} is of {feature['dtype']}, expected numbers")
        return int(np.prod(feature["shape"]))

    def _split(self, split: str) -> Sequence[Entry]:
        if not split:
            return self._meta.entries
        bounds = self._meta.splits.get(split)
        if bounds is None:
            known = ", ".join(self._meta.splits) or "none"
            raise UserError(f"option --split: {self.path} has no split {split!r}; it has {known}")
        first, _, end = str(bounds).partition(":")
        if not (first.isdigit() and end.isdigit()):
            raise BadData(f"{self.path}/meta/info.json: split {split!r} is {bounds!r}, expected numbers first:end")
        return [entry for entry in self._meta.entries if int(first) <= entry.index < int(end)]


def _first_and_count(steps: slice, rows: int) -> tuple[int, int]:
    first, stop, _ = steps.indices(rows)
    return first, stop - first
