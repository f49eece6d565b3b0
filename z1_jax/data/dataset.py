"""Demonstrations on disk: a TFDS dataset in array_record format, written and read without TensorFlow.

One record a decision: the images and the state that the policy sees, and the action chunk that followed. Beside the
records stand the episode table, the normalisation statistics and a manifest. Knows no environment and no model.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import itertools
import json
import os
import pathlib
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from PIL import Image

from z1_jax.data.normalize import NormStats, StatsAccumulator, load_norm_stats, save_norm_stats
from z1_jax.data.relative import RelativeActions
from z1_jax.errors import UserError, first_line
from z1_jax.files import clear, writing

FORMAT = 2
_MANIFEST, _EPISODES, _STATS = "manifest.json", "episodes.jsonl", "norm_stats.json"
_RECORDS, _DOWNLOADS = "demonstrations", "downloads"  # folders that TFDS makes
HASHED_BYTES = 1 << 20  # files up to this size are hashed when opened; array_record checks the records when read
_PNG_LEVEL = 1  # half the time of the default for a tenth more bytes


class Episode(Protocol):
    """What `write_dataset` takes: N decisions of one demonstration, raw units."""

    @property
    def images(self) -> Mapping[str, np.ndarray]: ...  # camera -> uint8 [N, S, S, 3], rendered before each decision

    @property
    def state(self) -> np.ndarray: ...  # float32 [N, state_dim]

    @property
    def actions(self) -> np.ndarray: ...  # float32 [N, H, action_dim]: the chunk of each decision

    @property
    def instruction(self) -> str: ...

    @property
    def task(self) -> str: ...

    @property
    def seed(self) -> int: ...

    @property
    def success(self) -> bool: ...

    @property
    def control_steps(self) -> int: ...


@dataclasses.dataclass(frozen=True)
class EpisodeRow:
    """One line of the episode table."""

    episode: int
    task: str
    instruction: str
    seed: int
    success: bool
    steps: int  # control steps
    first_record: int
    records: int  # decisions

    @property
    def span(self) -> range:
        """Its records' places in the dataset."""
        return range(self.first_record, self.first_record + self.records)


@dataclasses.dataclass(frozen=True)
class Record:
    """One decision, raw units."""

    images: dict[str, np.ndarray]  # camera -> uint8 [S, S, 3]
    state: np.ndarray  # float32 [state_dim]
    actions: np.ndarray  # float32 [H, action_dim]
    instruction: str
    episode: int
    step: int  # index of the decision within its episode


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A complete dataset on disk; records are read when asked for."""

    path: pathlib.Path
    source: dict[str, Any]  # what made it, with which parameters, as given to `write_dataset`
    cameras: dict[str, tuple[int, ...]]  # camera -> (height, width, 3)
    state_dim: int
    chunk: int  # control steps of one action chunk, H
    action_dim: int
    episodes: tuple[EpisodeRow, ...]
    stats: dict[str, NormStats]  # of "state" and "actions"
    identity: str  # SHA-256 of source, episode table and records: the same demonstrations give the same, anywhere

    def __len__(self) -> int:
        """Records."""
        return self.episodes[-1].first_record + self.episodes[-1].records

    def __getitem__(self, index: int) -> Record:
        return self.records([index])[0]

    def records(self, indices: Sequence[int]) -> list[Record]:
        """The records at `indices`, decoded, in that order.

        Raises:
            IndexError: an index is not in 0..len - 1.
            ValueError: a record cannot be read back.
        """
        wanted = [int(index) for index in indices]
        if wanted and not 0 <= min(wanted) <= max(wanted) < len(self):
            raise IndexError(f"records {min(wanted)}..{max(wanted)} asked for; the dataset has 0..{len(self) - 1}")
        return [self._record(raw) for raw in self._raw(wanted)]

    def _raw(self, wanted: Sequence[int]) -> Sequence[Mapping[str, Any]]:
        try:
            return list(self._records.__getitems__(list(wanted)))
        except Exception as error:  # array_record, protobuf and Pillow each have their own
            raise UserError(
                f"dataset {self.path} is damaged: its records cannot be read ({first_line(error)}); make it again"
            ) from None

    def episodes_of(self, tasks: Sequence[Sequence[str]]) -> Sequence[EpisodeRow]:
        """The episodes of a run's tasks; all where one of these is missing, or there are none.

        Args:
            tasks: each by the names that it has: its own, which is looked for first, then others.
        """
        known = {row.task for row in self.episodes}
        each = [known.intersection(names[:1]) or known.intersection(names) for names in tasks]
        if not each or not all(each):
            return self.episodes
        own = set().union(*each)
        return [row for row in self.episodes if row.task in own]

    def records_of(self, tasks: Sequence[Sequence[str]]) -> np.ndarray | None:
        """The records int [n] of those episodes, ascending; None: all. `tasks`: as in `episodes_of`."""
        own = self.episodes_of(tasks)
        return None if len(own) == len(self.episodes) else np.concatenate([row.span for row in own])

    def numbers(self, at_once: int = 1024) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(states float32 [n, state_dim], actions float32 [n, H, action_dim]) of all records; no image is decoded.

        Raises:
            ValueError: a record cannot be read back.
        """
        for start in range(0, len(self), at_once):
            rows = self._raw(range(start, min(start + at_once, len(self))))
            yield np.stack([row["state"] for row in rows]), np.stack([row["actions"] for row in rows])

    def relative_statistics(self, relative: RelativeActions) -> NormStats:
        """Statistics of the action chunks as offsets from their states: what openpi computes behind DeltaActions."""
        found = StatsAccumulator()
        for states, actions in self.numbers():
            found.update(relative.offsets(actions, states))
        return found.result()

    @functools.cached_property
    def _records(self) -> Any:
        """Random access to the records, images still encoded. Opened on first use: importing TFDS takes a second."""
        import tensorflow_datasets as tfds

        decoders = {"images": {camera: tfds.decode.SkipDecoding() for camera in self.cameras}}
        return tfds.builder_from_directory(str(_tfds_path(self.path))).as_data_source(split="train", decoders=decoders)

    def _record(self, raw: Mapping[str, Any]) -> Record:
        episode = int(raw["episode"])
        return Record(
            images={camera: _decode(data) for camera, data in raw["images"].items()},
            state=raw["state"],
            actions=raw["actions"],
            instruction=self.episodes[episode].instruction,
            episode=episode,
            step=int(raw["step"]),
        )


def write_dataset(
    path: str | pathlib.Path, episodes: Iterable[Episode], manifest: Mapping[str, Any], *, jpeg: int = 0
) -> Dataset:
    """Writes a dataset to the new directory `path`; `manifest` (JSON) says what made it.

    Episodes are consumed one by one, and the manifest is read after the last one: it may tell what was left out. All is
    written to `<path>.partial` and renamed at the end, so a killed run leaves no half dataset under the name.

    Args:
        jpeg: quality, 1..100, of frames stored as JPEG (4:2:0, as videos); 0 stores PNG, which loses nothing.

    Raises:
        ValueError: the path exists, there are no episodes, or an episode does not fit the others.
    """
    path = pathlib.Path(path).absolute()
    if path.exists():
        raise UserError(f"{path} exists already; give another path or remove it")
    stream = iter(episodes)
    first = next(stream, None)
    if first is None:
        raise UserError(f"cannot write dataset {path}: no episodes; expected at least one")
    partial = _partial_path(path)
    clear(partial, {_RECORDS, _DOWNLOADS, _STATS, _EPISODES, _MANIFEST})
    partial.mkdir(parents=True)
    writer = _EpisodeWriter(first, jpeg)
    _write_records(partial, writer, itertools.chain([first], stream))
    with writing(partial):
        _write_tables(partial, writer, manifest)
    os.rename(partial, path)
    return open_dataset(path)


def _write_tables(partial: pathlib.Path, writer: _EpisodeWriter, manifest: Mapping[str, Any]) -> None:
    """All that stands beside the records."""
    shutil.rmtree(partial / _DOWNLOADS, ignore_errors=True)  # TFDS makes it, empty
    save_norm_stats(partial / _STATS, {key: value.result() for key, value in writer.stats.items()})
    lines = [json.dumps(dataclasses.asdict(row)) + "\n" for row in writer.rows]
    (partial / _EPISODES).write_text("".join(lines))
    content = {
        "format": FORMAT,
        "source": dict(manifest),
        "cameras": {camera: list(shape[1:]) for camera, shape in writer.image_shapes.items()},
        "state_dim": writer.state_dim,
        "chunk": writer.chunk_shape[0],
        "action_dim": writer.chunk_shape[1],
        "episodes": len(writer.rows),
        "records": writer.count,
        "records_sha256": writer.digest.hexdigest(),
        "files": {str(f.relative_to(partial)): _file_entry(f) for f in sorted(partial.rglob("*")) if f.is_file()},
    }
    (partial / _MANIFEST).write_text(json.dumps(content, indent=2) + "\n")


def open_dataset(path: str | pathlib.Path) -> Dataset:
    """Opens a dataset; checks that every file is there, of the right size, and that the tables are intact.

    Raises:
        ValueError: nothing is there, it was only half written, or it is damaged.
    """
    path = pathlib.Path(path).absolute()
    if not (path / _MANIFEST).is_file():
        if (path / "config.json").is_file():  # of a run
            own = path / "demonstrations"
            there = f"its own is {own}" if (own / _MANIFEST).is_file() else "it has collected none"
            raise UserError(f"dataset {path} is a run directory, {there}; expected a directory with {_MANIFEST}")
        half = _partial_path(path).exists() or (path.is_dir() and any(path.iterdir()))
        state = "was only half written" if half else "does not exist"
        raise UserError(f"dataset {path} {state}; expected a directory with {_MANIFEST}, as z1_jax.collect makes")
    try:
        try:
            content = json.loads((path / _MANIFEST).read_bytes())
        except ValueError as error:
            raise ValueError(f"{_MANIFEST}: {error}") from None
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']}, expected {FORMAT}")
        for name, entry in content["files"].items():
            _check_file(path / name, entry)
        rows = tuple(EpisodeRow(**json.loads(line)) for line in (path / _EPISODES).read_text().splitlines())
        return Dataset(
            path=path,
            source=content["source"],
            cameras={camera: tuple(shape) for camera, shape in content["cameras"].items()},
            state_dim=content["state_dim"],
            chunk=content["chunk"],
            action_dim=content["action_dim"],
            episodes=rows,
            stats=load_norm_stats(path / _STATS),
            identity=_identity(content),
        )
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise UserError(f"dataset {path} is damaged ({first_line(error)}); make it again") from None


def _identity(content: Mapping[str, Any]) -> str:
    """A hash of the manifest without the record files, whose bytes differ: protobuf orders fields per process."""
    table = content["files"][_EPISODES]["sha256"]
    kept = {key: value for key, value in content.items() if key != "files"}
    return hashlib.sha256(json.dumps({**kept, "table": table}, sort_keys=True).encode()).hexdigest()


class _EpisodeWriter:
    """Turns episodes into records, and keeps the table and the statistics."""

    def __init__(self, first: Episode, jpeg: int):
        self.jpeg = jpeg
        self.image_shapes = {camera: np.shape(frames) for camera, frames in first.images.items()}
        self.state_dim = int(np.shape(first.state)[-1])
        self.chunk_shape = tuple(int(n) for n in np.shape(first.actions)[1:])
        self.stats = {"state": StatsAccumulator(), "actions": StatsAccumulator()}
        self.rows: list[EpisodeRow] = []
        self.count = 0
        self.digest = hashlib.sha256()  # of all records, in order

    def records(self, episode: Episode) -> Iterator[tuple[int, dict[str, Any]]]:
        """(key, TFDS example) of each decision."""
        number, index = self._check(episode), len(self.rows)
        self.stats["state"].update(episode.state)
        self.stats["actions"].update(episode.actions)
        self.rows.append(
            EpisodeRow(
                episode=index,
                task=episode.task,
                instruction=episode.instruction,
                seed=int(episode.seed),
                success=bool(episode.success),
                steps=int(episode.control_steps),
                first_record=self.count,
                records=number,
            )
        )
        self.count += number
        for step in range(number):
            example: dict[str, Any] = {
                "images": {camera: _encode(frames[step], self.jpeg) for camera, frames in episode.images.items()},
                "state": np.asarray(episode.state[step], np.float32),
                "actions": np.asarray(episode.actions[step], np.float32),
                "episode": index,
                "step": step,
            }
            for camera in self.image_shapes:
                self.digest.update(example["images"][camera])
            self.digest.update(example["state"].tobytes() + example["actions"].tobytes())
            yield self.count - number + step, example

    def _check(self, episode: Episode) -> int:
        """The episode's number of decisions."""
        number = len(episode.state)
        expected = {camera: (number, *shape[1:]) for camera, shape in self.image_shapes.items()}
        expected |= {"state": (number, self.state_dim), "actions": (number, *self.chunk_shape)}
        got = {camera: np.shape(frames) for camera, frames in episode.images.items()}
        got |= {"state": np.shape(episode.state), "actions": np.shape(episode.actions)}
        if got != expected or not number:
            raise ValueError(
                f"episode {len(self.rows)} has arrays {got}; expected {expected} and at least one decision"
            )
        types = {camera: str(np.asarray(frames).dtype) for camera, frames in episode.images.items()}
        if set(types.values()) != {"uint8"}:
            raise ValueError(f"episode {len(self.rows)} has images of types {types}; expected uint8 for each camera")
        return number


def _write_records(directory: pathlib.Path, writer: _EpisodeWriter, episodes: Iterable[Episode]) -> None:
    """Writes all records as a TFDS dataset under `directory`, in order."""
    failures: list[Exception] = []

    def examples() -> Iterator[tuple[int, dict[str, Any]]]:
        try:
            for episode in episodes:
                yield from writer.records(episode)
        except Exception as error:  # TFDS would wrap it into pages
            failures.append(error)
            raise

    tfds, builder_class = _builder_class()
    builder = builder_class(writer, examples(), data_dir=str(directory), file_format="array_record")
    tfds.disable_progress_bar()
    try:
        with writing(directory):
            builder.download_and_prepare()
    except Exception as error:
        if failures:
            raise failures[0] from None
        if "write() failed" in str(error):  # array_record's words for a full disk
            raise UserError(
                f"{directory} cannot be written ({first_line(error)}); free space, and the same command goes on"
            ) from error
        raise
    finally:
        tfds.enable_progress_bar()


@functools.cache  # TFDS registers a builder's name, once
def _builder_class() -> tuple[Any, type]:
    import tensorflow_datasets as tfds  # a second to import

    class Info(tfds.core.DatasetInfo):
        """What TFDS looks for nowhere else: it would leave an empty folder in TMPDIR each time."""

        def initialize_from_bucket(self) -> None:
            pass

    class Demonstrations(tfds.core.GeneratorBasedBuilder):
        """Demonstrations of a robot, one record a decision."""

        VERSION = tfds.core.Version("1.0.0")

        def __init__(self, writer: _EpisodeWriter, examples: Iterator[tuple[int, dict[str, Any]]], **kwargs: Any):
            self._writer, self._examples = writer, examples
            super().__init__(**kwargs)

        def _info(self) -> tfds.core.DatasetInfo:
            images = {
                camera: tfds.features.Image(shape=shape[1:], encoding_format="jpeg" if self._writer.jpeg else "png")
                for camera, shape in self._writer.image_shapes.items()
            }
            features = {
                "images": images,
                "state": tfds.features.Tensor(shape=(self._writer.state_dim,), dtype=np.float32),
                "actions": tfds.features.Tensor(shape=self._writer.chunk_shape, dtype=np.float32),
                "episode": tfds.features.Scalar(np.int64),
                "step": tfds.features.Scalar(np.int64),
            }
            return Info(builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True)

        def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
            del dl_manager  # nothing is downloaded
            return {"train": self._generate_examples()}

        def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
            return self._examples

        def _log_download_bytes(self) -> None:
            """Nothing is downloaded: TFDS would say otherwise on stdout."""

        _log_download_done = _log_download_bytes

    return tfds, Demonstrations


def _tfds_path(path: pathlib.Path) -> pathlib.Path:
    return path / "demonstrations" / "1.0.0"


def _partial_path(path: pathlib.Path) -> pathlib.Path:
    return path.with_name(path.name + ".partial")


def _encode(frame: np.ndarray, jpeg: int) -> bytes:
    out = io.BytesIO()
    if jpeg:
        Image.fromarray(frame).save(out, "JPEG", quality=jpeg, subsampling="4:2:0")
    else:
        Image.fromarray(frame).save(out, "PNG", compress_level=_PNG_LEVEL)
    return out.getvalue()


def _decode(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


def _file_entry(path: pathlib.Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _check_file(path: pathlib.Path, entry: Mapping[str, Any]) -> None:
    if not path.is_file():
        raise ValueError(f"{path.name} is missing")
    size = path.stat().st_size
    if size != entry["bytes"]:
        raise ValueError(f"{path.name} has {size} bytes, expected {entry['bytes']}")
    if size <= HASHED_BYTES and _file_entry(path)["sha256"] != entry["sha256"]:
        raise ValueError(f"{path.name} was changed after it was written")
