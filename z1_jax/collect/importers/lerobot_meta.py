"""The tables in a LeRobot directory's `meta`: episodes, tasks, features, and where each episode's files lie."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from z1_jax.collect.importers.base import BadData, need, reading
from z1_jax.collect.importers.video import Stretch, VideoPlace
from z1_jax.errors import first_line

VERSIONS = ("v2.0", "v2.1", "v3.0")
_IMAGES = "observation.images."


@dataclasses.dataclass(frozen=True)
class Entry:
    """One line of the table of episodes."""

    index: int
    length: int  # frames
    tasks: tuple[str, ...]
    place: Mapping[str, Any]  # v3: the row, which names its files


@dataclasses.dataclass(frozen=True)
class Meta:
    """What the reader needs from `meta`."""

    version: str
    fps: float
    features: Mapping[str, Mapping[str, Any]]
    data_path: str  # a format string, as `video_path`
    video_path: str
    chunk_size: int  # v2: episodes in a chunk directory
    splits: Mapping[str, str]  # name -> "first:end"
    tasks: Mapping[int, Any]  # texts, where the table is intact
    entries: tuple[Entry, ...]
    modality: Mapping[str, Any]  # meta/modality.json; empty without
    task: str  # RoboCasa's name of the task; empty where the directory does not tell
    tables: tuple[pathlib.Path, ...]  # the files that were read
    flaws: tuple[str, ...]
    _stretches: dict[str, dict[tuple[int, int], tuple[Stretch, ...]]] = dataclasses.field(default_factory=dict)

    def camera_keys(self) -> dict[str, str]:
        """Camera -> the feature that holds its frames."""
        depth = self.depth_keys()
        keys = [
            key for key, feature in self.features.items() if feature["dtype"] in ("video", "image") and key not in depth
        ]
        names = {key: key.removeprefix(_IMAGES) for key in keys}
        for name, entry in self.modality.get("video", {}).items():
            names |= {key: name for key in keys if key == entry.get("original_key", name)}
        return {name: key for key, name in names.items()}

    def depth_keys(self) -> list[str]:
        """Features whose frames hold distances instead of colours."""
        told = {key: feature.get("info") or feature.get("video_info") or {} for key, feature in self.features.items()}
        return [k for k, info in told.items() if info.get("video.is_depth_map") or info.get("is_depth_map")]

    def data_file(self, entry: Entry) -> str:
        """The parquet file of an episode, relative to the directory."""
        if entry.place:
            place = {f"{k}_index": int(entry.place[f"data/{k}_index"]) for k in ("chunk", "file")}
            return self.data_path.format(**place)
        return self.data_path.format(episode_chunk=entry.index // self.chunk_size, episode_index=entry.index)

    def video_place(self, entry: Entry, key: str) -> VideoPlace:
        """The video file of an episode's camera, and where the tables place episodes in it."""
        if not entry.place:
            chunk = entry.index // self.chunk_size
            file = self.video_path.format(episode_chunk=chunk, video_key=key, episode_index=entry.index)
            own = Stretch(entry.index, entry.length, 0.0)
            return VideoPlace(file, own, (own,), True)
        fellows = self._by_file(key)[_video_number(entry, key)]
        place = dict(zip(("chunk_index", "file_index"), _video_number(entry, key), strict=True))
        own = next(stretch for stretch in fellows if stretch.episode == entry.index)
        return VideoPlace(self.video_path.format(video_key=key, **place), own, fellows, not self.flaws)

    def _by_file(self, key: str) -> dict[tuple[int, int], tuple[Stretch, ...]]:
        """(chunk, file) -> the episodes in that video."""
        if key not in self._stretches:
            found: dict[tuple[int, int], list[Stretch]] = {}
            for entry in self.entries:
                start_s, stop_s = (entry.place.get(f"videos/{key}/{end}_timestamp") for end in ("from", "to"))
                if start_s is not None:
                    stretch = Stretch(
                        entry.index, entry.length, float(start_s), None if stop_s is None else float(stop_s)
                    )
                    found.setdefault(_video_number(entry, key), []).append(stretch)
            self._stretches[key] = {number: tuple(stretches) for number, stretches in found.items()}
        return self._stretches[key]


def _video_number(entry: Entry, key: str) -> tuple[int, int]:
    """(chunk, file) of the video of a camera, v3."""
    return int(entry.place[f"videos/{key}/chunk_index"]), int(entry.place[f"videos/{key}/file_index"])


def read_meta(path: pathlib.Path) -> Meta:
    """Reads the `meta` directory of `path`. Damage that leaves the rest readable is listed in `flaws`.

    Raises:
        BadData: info.json or a whole table is missing, unreadable, or of an unknown version.
        UserError: pyarrow is not installed.
    """
    folder = path / "meta"
    info = _json(folder / "info.json")
    version = str(info.get("codebase_version"))
    if version not in VERSIONS:
        raise BadData(f"{folder / 'info.json'} is of LeRobot {version}, expected one of {', '.join(VERSIONS)}")
    flaws: list[str] = []
    modality = folder / "modality.json"
    tables = [folder / "info.json"]
    with reading(f"the tables in {folder}"):
        if version.startswith("v3"):
            tasks, entries, read = _tables_v3(path, folder, flaws)
        else:
            tasks, entries, read = _tables_v2(folder, flaws)
        tables += read
        listed = {entry.index for entry in entries}
        if len(listed) != info["total_episodes"]:
            flaws.append(
                f"{path} was only half written or half copied: meta/info.json counts {info['total_episodes']} "
                f"episodes, its table lists {len(listed)}"
            )
        if len(listed) < len(entries):
            flaws.append(f"{path}: its table lists {len(entries) - len(listed)} episodes twice; the last line counts")
        fps = float(info["fps"])
        if not fps > 0:
            raise BadData(f"{folder / 'info.json'}: fps is {info['fps']!r}, expected frames a second above 0")
        return Meta(
            version=version,
            fps=fps,
            features=info["features"],
            data_path=info["data_path"],
            video_path=info.get("video_path") or "",
            chunk_size=int(info.get("chunks_size", 1000)),
            splits=info.get("splits") or {},
            tasks=tasks,
            entries=tuple(sorted(entries, key=lambda entry: entry.index)),
            modality=_json(modality) if modality.is_file() else {},
            task=_robocasa_task(path),
            tables=(*tables, *[modality] * modality.is_file()),
            flaws=tuple(flaws),
        )


def _tables_v2(folder: pathlib.Path, flaws: list[str]) -> tuple[dict[int, str], list[Entry], list[pathlib.Path]]:
    files = [folder / "tasks.jsonl", folder / "episodes.jsonl"]
    tasks = {int(line["task_index"]): line["task"] for line in _lines(files[0], flaws)}
    entries = [
        Entry(int(line["episode_index"]), int(line["length"]), tuple(line["tasks"]), {})
        for line in _lines(files[1], flaws)
    ]
    return tasks, entries, files


def _tables_v3(
    path: pathlib.Path, folder: pathlib.Path, flaws: list[str]
) -> tuple[dict[int, str], list[Entry], list[pathlib.Path]]:
    parquet = need("pyarrow.parquet", "pyarrow", path)
    table = parquet.read_table(folder / "tasks.parquet")
    text = next(name for name in table.column_names if name != "task_index")  # pandas' index has no name of its own
    tasks = dict(zip(table.column("task_index").to_pylist(), table.column(text).to_pylist(), strict=True))
    files = sorted((folder / "episodes").rglob("*.parquet"))
    if not files:
        raise BadData(f"{path} was only half written: it has no meta/episodes/*/*.parquet; finish it with LeRobot")
    entries = []
    for file in files:
        try:
            names = [name for name in parquet.read_schema(file).names if not name.startswith("stats/")]
            rows = parquet.read_table(file, columns=names).to_pylist()
        except (OSError, ValueError) as error:
            flaws.append(f"{file} cannot be read ({first_line(error)}): its episodes are lost")
            continue
        entries += [Entry(int(r["episode_index"]), int(r["length"]), tuple(r["tasks"]), r) for r in rows]
    return tasks, entries, [folder / "tasks.parquet", *files]


def _lines(path: pathlib.Path, flaws: list[str]) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file. A last line that is cut off is added to `flaws`."""
    lines = [line for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    found = []
    for number, line in enumerate(lines):
        try:
            found.append(json.loads(line))
        except ValueError:
            if number != len(lines) - 1:
                raise
            flaws.append(f"{path} was only half written: line {number + 1} is cut off")
    return found


def _json(path: pathlib.Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise BadData(f"{path} cannot be read ({first_line(error)}); get it anew") from None


def _robocasa_task(path: pathlib.Path) -> str:
    """The simulator's name of the task, from what RoboCasa adds to LeRobot's layout."""
    try:
        return str(json.loads((path / "extras" / "dataset_meta.json").read_text())["env_args"]["env_name"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""
