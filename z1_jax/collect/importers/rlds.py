"""RLDS directories as TFDS writes them: features.json, dataset_info.json and TFRecord shards, an episode a record.

The records are read here and decoded by TFDS, without TensorFlow. OpenVLA's LIBERO datasets (`*_no_noops`) are known by
the file that each episode names: their pictures are turned already, their actions are the simulator's, −1 opens.
"""

from __future__ import annotations

import dataclasses
import io
import json
import pathlib
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from z1_jax.collect.importers import libero
from z1_jax.collect.importers.base import (
    STANDARD,
    BadData,
    Columns,
    EpisodeRef,
    RawEpisode,
    checksum,
    need,
)
from z1_jax.errors import UserError

FEATURES = "features.json"
_SHARD = re.compile(r"(?P<name>.+)-(?P<split>[^-]+)\.tfrecord-(?P<index>\d{5})-of-(?P<count>\d{5})")
_STEPS, _IN, _FILE = "steps", "observation/", ("episode_metadata", "file_path")
_STATE, _ACTION = "observation/state", "action"
_WORDS = ("language_instruction", "observation/natural_language_instruction", "observation/language_instruction")
_LIBERO = {"agentview": "observation/image", "robot0_eye_in_hand": "observation/wrist_image"}
_HEAD = struct.Struct("<QI")  # of a record: its length, and the checksum of these eight bytes
_TAIL = struct.Struct("<I")


def is_rlds(path: pathlib.Path) -> bool:
    """Whether a directory is what TFDS writes of a dataset with `steps`."""
    try:
        document = json.loads((path / FEATURES).read_text())
        return _STEPS in document["featuresDict"]["features"]
    except (OSError, ValueError, KeyError, TypeError):
        return False


@dataclasses.dataclass(frozen=True)
class _Record:
    shard: pathlib.Path
    offset: int  # of its first byte
    size: int


class RldsDirectory:
    """One RLDS dataset (see `Source`).

    Args:
        path: the folder of one version, e.g. libero_object_no_noops/1.0.0.
        split: a split of dataset_info.json; empty: all of them.
        columns: names of a step's entries, "observation/state" or just "state".

    Raises:
        BadData: it cannot be read, holds no episodes, or lacks what is named.
        UserError: the package of the checksums is not installed, or there is no such split.
    """

    pictures: tuple[str, ...] = ()

    def __init__(self, path: pathlib.Path, split: str = "", columns: Columns = STANDARD):
        self.path, self._how = path, columns
        need("google_crc32c", "google-crc32c", path)
        import tensorflow_datasets as tfds  # a second to import
        from flax import traverse_util

        self._features = tfds.features.FeaturesDict.from_config(str(path))
        self._steps = _flat(self._features[_STEPS].feature)
        encoded = {name: tfds.decode.SkipDecoding() for name, feature in self._steps.items() if _is_picture(feature)}
        self._decoders = {_STEPS: traverse_util.unflatten_dict(encoded, sep="/")}
        self._shards, self.flaws = self._found(split)
        self._records = [record for shard in self._shards for record in self._scan(shard)]
        if not self._records:
            raise BadData(next(iter(self.flaws), f"{path} holds no episodes; expected records in its .tfrecord files"))
        tasks = [self._task(number) for number in range(len(self._records))]
        self.episodes = tuple(EpisodeRef(number, f"episode {number}", task) for number, (task, _) in enumerate(tasks))
        self._of_libero = any(of_libero for _, of_libero in tasks)
        self.fps = libero.HZ if self._of_libero else None
        self._state = tuple(self._named(column, "--state") for column in columns.state or (_STATE,))
        self._actions = tuple(self._named(column, "--actions") for column in columns.actions or (_ACTION,))
        self._images = self._cameras()
        self.cameras = tuple(self._images)
        self.frames = tuple(f"{camera}: pictures of {column}" for camera, column in self._images.items())
        self.state_dim, self.action_dim = self._width(self._state), self._width(self._actions)
        self.order = (
            f"actions of {' + '.join(self._actions)} and state of {' + '.join(self._state)} as stored, the last step's "
            f"too{'; pictures are turned by 180 degrees already' * self._of_libero}"
        )

    def facts(self) -> dict[str, Any]:
        return {
            "path": str(self.path),
            "format": "rlds",
            "version": self.path.name,
            "sha256_of_ends": checksum([self.path / FEATURES, *self._shards]),
            "episodes": len(self.episodes),
            "bytes": sum(shard.stat().st_size for shard in self._shards),
        }

    def read(
        self, episode: EpisodeRef, cameras: Sequence[str], stride: int, instruction: str | None = None
    ) -> RawEpisode:
        """See `Source`."""
        where = f"{self.path}, {episode.name}"
        steps = list(self._decode(self._records[episode.number])[_STEPS])
        if not steps:
            raise BadData(f"{where} has no steps")
        images = {}
        for camera in cameras:
            if camera not in self._images:
                raise BadData(f"{where} has no images of {camera}; it has {', '.join(self._images) or 'no camera'}")
            encoded = [io.BytesIO(_at(step, self._images[camera])) for step in steps[::stride]]
            looks = [np.asarray(Image.open(file).convert("RGB")) for file in encoded]
            if len({look.shape for look in looks}) > 1:
                raise BadData(f"{where}: pictures of {camera} differ in size")
            images[camera] = np.stack(looks)
        state, actions = (
            np.concatenate([np.stack([np.atleast_1d(_at(s, column)) for s in steps]) for column in columns], axis=1)
            for columns in (self._state, self._actions)
        )
        return RawEpisode(images, state, actions, self._words(steps, where) if instruction is None else instruction)

    # --- columns ---------------------------------------------------------------------------------------------------

    def _named(self, column: str, option: str) -> str:
        """The full name of a step's entry, which may be given without "observation/"."""
        for name in (column, _IN + column):
            if name in self._steps:
                return name
        known = ", ".join(name for name in sorted(self._steps) if not _is_picture(self._steps[name]))
        raise BadData(f"option {option}: steps of {self.path} have no {column!r}; they have {known}")

    def _cameras(self) -> dict[str, str]:
        """Camera -> the entry of its pictures."""
        pictures = [name for name in sorted(self._steps) if _is_picture(self._steps[name])]  # unordered in the file
        if self._how.images:
            chosen = {camera: self._named(column, "--images") for camera, column in self._how.images}
            wrong = [name for name in chosen.values() if name not in pictures]
            if wrong:
                raise BadData(f"option --images: {wrong[0]} of {self.path} holds no pictures; {', '.join(pictures)} do")
            return chosen
        if self._of_libero and set(_LIBERO.values()) <= set(pictures):
            return dict(_LIBERO)
        return {name.removeprefix(_IN): name for name in pictures}

    def _width(self, columns: Sequence[str]) -> int:
        shapes = [self._steps[name].shape for name in columns]
        wrong = [(name, shape) for name, shape in zip(columns, shapes, strict=True) if len(shape) > 1]
        if wrong:
            raise BadData(f"{self.path}: {wrong[0][0]} has shape {list(wrong[0][1])} a step, expected numbers in a row")
        return sum(shape[0] if shape else 1 for shape in shapes)

    def _words(self, steps: Sequence[Any], where: str) -> str:
        for column in _WORDS:
            if column in self._steps:
                words = list(dict.fromkeys(_text(_at(step, column)) for step in steps))
                if len(words) > 1:
                    told = ", then ".join(map(repr, words[:3]))
                    raise BadData(f"{where} changes its instruction: {told}; give one with --instruction=TEXT")
                if words and words[0]:
                    return words[0]
        raise BadData(
            f"{where} has no instruction; expected {_WORDS[0]} in its steps, or --instruction=TEXT, or "
            "--instructions=TABLE for one an episode"
        )

    def _task(self, number: int) -> tuple[str, bool]:
        """(SUITE/NAME of a LIBERO file, or else the instruction; whether it is of such a file)."""
        try:
            example = self._decode(self._records[number])
            told = _libero_task(example)
            return told or self._words([example[_STEPS][0]], f"{self.path}, episode {number}"), told is not None
        except UserError:
            return "", False  # told when the episode is read

    # --- records ---------------------------------------------------------------------------------------------------

    def _found(self, split: str) -> tuple[list[pathlib.Path], tuple[str, ...]]:
        """(the shards in their order, a line for each that is missing)."""
        found = {path: match for path in sorted(self.path.iterdir()) if (match := _SHARD.fullmatch(path.name))}
        splits = sorted({match["split"] for match in found.values()})
        if split and split not in splits:
            raise UserError(f"option --split: {self.path} has no split {split!r}; it has {', '.join(splits) or 'none'}")
        found = {path: match for path, match in found.items() if split in ("", match["split"])}
        flaws = []
        for name in sorted({match["split"] for match in found.values()}):
            there = [match for match in found.values() if match["split"] == name]
            count = int(there[0]["count"])
            missing = sorted(set(range(count)) - {int(match["index"]) for match in there})
            if missing:
                flaws.append(f"{self.path}: shard {missing[0]} of the {count} of split {name} is missing; get it anew")
        return list(found), tuple(flaws)

    def _scan(self, shard: pathlib.Path) -> Iterator[_Record]:
        """Where the records of a shard lie; a damaged end is a flaw of the source."""
        whole = shard.stat().st_size
        with shard.open("rb") as file:
            at = 0
            while at < whole:
                file.seek(at)
                head = file.read(_HEAD.size)
                size, expected = _HEAD.unpack(head) if len(head) == _HEAD.size else (whole, 0)
                start = at + _HEAD.size
                at = start + size + _TAIL.size
                if at > whole or _checksum(head[:8]) != expected:
                    line = f"{shard} is cut off or damaged at byte {start - _HEAD.size}; get it anew"
                    self.flaws = (*self.flaws, line)
                    return
                yield _Record(shard, start, size)

    def _decode(self, record: _Record) -> Mapping[str, Any]:
        """One episode; pictures stay encoded."""
        with record.shard.open("rb") as file:
            file.seek(record.offset)
            data, tail = file.read(record.size), file.read(_TAIL.size)
        if len(tail) < _TAIL.size or _checksum(data) != _TAIL.unpack(tail)[0]:
            raise BadData(f"{record.shard}: the record at byte {record.offset} is damaged; get it anew")
        return self._features.deserialize_example_np(data, decoders=self._decoders)


def _libero_task(example: Mapping[str, Any]) -> str | None:
    """SUITE/NAME of the LIBERO file that an episode names; None where it names no such file."""
    metadata = example.get(_FILE[0])
    told = _text(metadata.get(_FILE[1], "")) if isinstance(metadata, Mapping) else ""
    task = libero.task_of(pathlib.PurePosixPath(told))
    return task if "/" in task else None


def _checksum(data: bytes) -> int:
    """TFRecord's masked CRC-32C."""
    import google_crc32c

    crc = google_crc32c.value(data)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def _flat(features: Any, prefix: str = "") -> dict[str, Any]:
    """Entries of a step by their paths: "observation/state"."""
    found: dict[str, Any] = {}
    for name, feature in features.items():
        if hasattr(feature, "items"):
            found |= _flat(feature, f"{prefix}{name}/")
        else:
            found[prefix + name] = feature
    return found


def _at(step: Any, path: str) -> Any:
    for part in path.split("/"):
        step = step[part]
    return step


def _is_picture(feature: Any) -> bool:
    return type(feature).__name__ == "Image" and feature.shape[-1] == 3


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
