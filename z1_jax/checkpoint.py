"""Checkpoints on disk: named parts of arrays and one JSON document per step (Orbax v1).

Each leaf's CRC-32 is stored with it, so a damaged file is noticed. Orbax's errors run over hundreds of lines; here
each becomes one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import hashlib
import itertools
import json
import logging
import pathlib
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, cast

import jax
import numpy as np

from z1_jax import distributed, processes
from z1_jax.config.schema import ConfigError
from z1_jax.errors import shortened
from z1_jax.files import require_plain, write_whole
from z1_jax.interrupt import held

Tree = Any
T = TypeVar("T")
_FILES = "files.json"  # in each checkpoint: its files' sizes and checksums
_HASHED_BYTES = 64 << 20


class CheckpointError(ConfigError):
    """A checkpoint that is absent, damaged, or of another shape than asked for."""


def _leaves(tree: Tree) -> dict[str, Any]:
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _crc(leaf: Any) -> int:
    return zlib.crc32(np.ascontiguousarray(distributed.whole(leaf)).view(np.uint8).reshape(-1).data)


def _file_entry(path: pathlib.Path) -> list[int]:
    """Size and CRC-32; −1 for a large file, whose arrays' own checksums must do."""
    size = path.stat().st_size
    return [size, zlib.crc32(path.read_bytes()) if size <= _HASHED_BYTES else -1]


def _write_file_list(folder: pathlib.Path) -> None:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != _FILES]
    entries = {path.relative_to(folder).as_posix(): _file_entry(path) for path in files}
    write_whole(folder / _FILES, json.dumps(entries))


def _check_files(folder: pathlib.Path) -> None:
    """Compares the files with the list that was written with them: Orbax opens all parts to read one.

    Raises:
        ValueError: names the first file that differs.
    """
    if not (folder / _FILES).is_file():
        return  # killed before the list was written; the arrays have checksums of their own
    try:
        listed = dict(json.loads((folder / _FILES).read_text()))
    except (ValueError, TypeError, RecursionError):
        raise ValueError(f"{_FILES} cannot be read") from None
    for name, entry in listed.items():
        if not (folder / name).is_file():
            raise ValueError(f"{name} is missing")
        if _file_entry(folder / name) != entry:
            raise ValueError(f"{name} was changed after it was written")


def _seal(document: Mapping[str, Any], checksums: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps([document, checksums], sort_keys=True).encode())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Holds back the pages that Orbax and asyncio log about a damaged file or a full disk: an error is one line.

    After an error for good: Orbax's threads go on, and log what each of them met.
    """
    loggers = [logging.getLogger("absl"), logging.getLogger("asyncio")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    except Exception:
        gc.collect()  # asyncio complains about a failed task when it is collected
        levels = [logging.CRITICAL for _ in loggers]
        raise
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@dataclasses.dataclass(frozen=True)
class Keep:
    """Which checkpoints stay when another one is written."""

    last: int = 2  # the newest, so many
    every: int = 0  # also those whose step divides by this; 0: none
    best: bool = False  # also the one that was saved with the highest success, of equal ones the newest


class Checkpoints:
    """The checkpoints of one training stage: DIRECTORY/<step>, those that `keep` says.

    Ctrl-C waits until a call is over: Orbax's event loops would lose it, or take it for a damaged file.
    """

    @held()
    def __init__(self, directory: pathlib.Path, keep: Keep = Keep()):
        # Orbax costs two seconds to import.
        from orbax.checkpoint import v1 as ocp

        self.directory = pathlib.Path(directory).absolute()
        policies = ocp.training.preservation_policies
        kept: list[Any] = [policies.LatestN(keep.last)]
        kept += [policies.EveryNSteps(keep.every)] if keep.every else []
        if keep.best:
            kept.append(policies.BestN(get_metric_fn=_success, n=1, keep_checkpoints_without_metrics=False))
        self._writer: Any = None

        def writer() -> Any:
            return ocp.training.Checkpointer(
                self.directory,
                preservation_policy=policies.AnyPreservationPolicy(kept),
                save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
                cleanup_tmp_directories=True,
            )

        self._make_writer = writer
        with _quiet():
            if processes.count() == 1:
                self._writer = self._checkpointer = writer()
            else:  # Orbax's writer waits for all processes wherever it is made; reading need not
                self._checkpointer = SoloReader(self.directory)

    def steps(self) -> list[int]:
        """Complete checkpoints, ascending."""
        return [checkpoint.step for checkpoint in self._checkpointer.checkpoints]

    @held()
    def save(
        self, step: int, parts: Mapping[str, Tree], document: Mapping[str, Any], success: float | None = None
    ) -> None:
        """Writes a checkpoint and returns when it is complete. A step that is there already is left as it is.

        Args:
            parts: name -> tree of arrays, e.g. {"params": …, "optimizer": …}.
            document: JSON values.
            success: by which the best checkpoint is chosen; None: this one cannot be it.
        """
        if step in self.steps():
            return
        checksums = {name: {key: _crc(leaf) for key, leaf in _leaves(tree).items()} for name, tree in parts.items()}
        self._save(step, parts, document, checksums, success)

    def best(self) -> tuple[int, float] | None:
        """Step and success of the best checkpoint that is there; None where none was saved with a success."""
        rated = [(_success(c.metrics), c.step) for c in self._checkpointer.checkpoints if c.metrics is not None]
        return max(rated)[::-1] if rated else None

    @held()
    def save_frame(
        self, step: int, part: str, crcs: Mapping[str, int], rest: Mapping[str, Tree], document: Mapping[str, Any]
    ) -> pathlib.Path:
        """As `save`, but for the arrays of one flat part: one entry stands for each, and the caller replaces them.

        Args:
            crcs: CRC-32 of each array that will stand there.
            rest: the other parts, saved as they are.

        Returns:
            The part's folder. Call `seal_files` when its arrays are in place.
        """
        parts = {part: {name: np.zeros(1, np.float32) for name in crcs}, **rest}
        checksums: dict[str, Any] = {part: {f"[{name!r}]": crc for name, crc in crcs.items()}}
        checksums |= {name: {key: _crc(leaf) for key, leaf in _leaves(tree).items()} for name, tree in rest.items()}
        self._save(step, parts, document, checksums)
        return self.directory / str(step) / part

    def seal_files(self, step: int) -> None:
        """Lists the files of a step anew."""
        _write_file_list(self.directory / str(step))

    def _save(
        self,
        step: int,
        parts: Mapping[str, Tree],
        document: Mapping[str, Any],
        checksums: Mapping[str, Any],
        success: float | None = None,
    ) -> None:
        require_plain(self.directory)
        try:
            metadata = {"document": dict(document), "crc32": checksums, "seal": _seal(document, checksums)}
            metadata["step"] = step
            with _quiet():
                metrics = None if success is None else {"success": success}
                if self._writer is None:
                    self._writer = self._make_writer()
                self._writer.save_checkpointables(step, dict(parts), custom_metadata=metadata, metrics=metrics)
            if processes.leads():
                _write_file_list(self.directory / str(step))
            processes.exchange(None)  # it is complete when this returns, in every process
            self._checkpointer.reload()
        except Exception as error:  # Orbax raises what its storage layers raise
            raise CheckpointError(
                f"checkpoint {self.directory / str(step)} cannot be written: {_short(error)}"
            ) from error

    @held()
    def document(self, step: int) -> dict[str, Any]:
        """The JSON document of a step."""
        return self._metadata(step)["document"]

    @held()
    def digest(self, step: int, parts: Sequence[str]) -> str:
        """A short hash of the named parts' checksums: the same content has the same digest."""
        stored = self._metadata(step)["crc32"]
        missing = [name for name in parts if name not in stored]
        if missing:
            raise CheckpointError(f"checkpoint {self.directory / str(step)} has no part {missing[0]!r}")
        text = json.dumps({name: stored[name] for name in parts}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @held()
    def checksums(self, step: int, part: str) -> dict[str, int | None]:
        """Array of a flat part -> its CRC-32, where one was stored. Empty for a part that is not there."""
        stored = self._metadata(step)["crc32"].get(part, {})
        return {key.removeprefix("['").removesuffix("']"): crc for key, crc in stored.items()}

    @held()
    def arrays(self, step: int, part: str) -> dict[str, jax.ShapeDtypeStruct]:
        """Shape and dtype of every array of a part, where the reader cannot know them."""
        try:
            _check_files(self.directory / str(step))
            with _quiet():
                stored = self._checkpointer.checkpointables_metadata(step).metadata[part]
            return {name: jax.ShapeDtypeStruct(tuple(leaf.shape), leaf.dtype) for name, leaf in stored.items()}
        except Exception as error:
            raise self._damaged(step, error) from error

    def _metadata(self, step: int) -> dict[str, Any]:
        if step not in self.steps():
            raise CheckpointError(f"no checkpoint {step} in {self.directory}; there: {self.steps() or 'none'}")
        try:
            _check_files(self.directory / str(step))
            with _quiet():
                metadata = dict(self._checkpointer.checkpointables_metadata(step).custom_metadata)
            seal = _seal(metadata["document"], metadata["crc32"])
        except Exception as error:
            raise self._damaged(step, error) from error
        if metadata.get("seal", seal) != seal:
            raise self._damaged(step, ValueError("its document fails its checksum"))
        held_step = metadata.get("step", _counted(metadata["document"], step))
        if held_step != step:
            raise CheckpointError(
                f"checkpoint {self.directory / str(step)} holds step {held_step}: the folder was copied or renamed; "
                f"remove it, or name it {held_step} again"
            )
        return metadata

    @held()
    def load(self, step: int, abstract: Mapping[str, Tree]) -> dict[str, Tree]:
        """Reads the named parts of a step, each leaf straight onto the sharding that its abstract leaf names.

        Raises:
            CheckpointError: the step is absent or damaged, or a leaf's shape is not what was asked for.
        """
        metadata = self._metadata(step)
        for name, tree in abstract.items():
            self._check_keys(step, name, metadata["crc32"].get(name), tree)
        loaded = _everywhere(lambda: self._loaded(step, abstract))
        for name, tree in abstract.items():
            wanted = _leaves(tree)
            for key, leaf in _leaves(loaded[name]).items():
                if tuple(leaf.shape) != tuple(wanted[key].shape):
                    raise CheckpointError(
                        f"checkpoint {self.directory / str(step)}: {name}{key} has shape {tuple(leaf.shape)}, expected "
                        f"{tuple(wanted[key].shape)}; it is of another architecture"
                    )
                expected = metadata["crc32"][name][key]
                if expected is not None and _crc(leaf) != expected:
                    raise self._damaged(step, ValueError(f"{name}{key} fails its checksum"))
        return loaded

    @held()
    def load_newest(
        self, abstract: Mapping[str, Tree] | Callable[[dict[str, Any]], Mapping[str, Tree]]
    ) -> tuple[int, dict[str, Tree], dict[str, Any]] | None:
        """The newest step that can be read: (step, parts, document), or None. Damaged ones are moved aside.

        Args:
            abstract: as for `load`, or what makes it of a step's document.
        """
        for step in reversed(self.steps()):
            try:
                document = _everywhere(functools.partial(self.document, step))
                return step, self.load(step, abstract(document) if callable(abstract) else abstract), document
            except CheckpointError as error:
                self.put_aside(step, error)
        return None

    def _loaded(self, step: int, abstract: Mapping[str, Tree]) -> dict[str, Tree]:
        try:
            with _quiet():
                return self._checkpointer.load_checkpointables(step, dict(abstract))
        except Exception as error:
            raise self._damaged(step, error) from error

    def _check_keys(self, step: int, name: str, stored: Mapping[str, Any] | None, tree: Tree) -> None:
        wanted = _leaves(tree)
        if stored is None:
            raise CheckpointError(f"checkpoint {self.directory / str(step)} has no part {name!r}")
        missing, extra = sorted(set(wanted) - set(stored)), sorted(set(stored) - set(wanted))
        if missing or extra:
            raise CheckpointError(
                f"checkpoint {self.directory / str(step)} is of another architecture: part {name!r} lacks "
                f"{len(missing)} arrays{_first(missing)} and has {len(extra)} unknown ones{_first(extra)}"
            )

    def _damaged(self, step: int, error: Exception) -> CheckpointError:
        folder = self.directory / str(step)
        if not (folder / _FILES).is_file():
            return CheckpointError(
                f"checkpoint {folder} is damaged, or none of this project's ({_short(error)}); one of openpi becomes "
                "ours by python -m z1_jax.convert SRC DST; delete a damaged one to go on from the one before"
            )
        return CheckpointError(
            f"checkpoint {folder} is damaged ({_short(error)}); delete that folder to go on from the one before"
        )

    def put_aside(self, step: int, error: CheckpointError) -> None:
        """Tells why a step cannot be used, and discards it."""
        print(f"warning: {str(error).partition('; ')[0]}; moved aside", flush=True)
        self.discard(step)

    @held()
    def discard(self, step: int) -> None:
        """Moves a damaged step out of the way, to <step>.damaged, so that the run can write it again."""
        folder = self.directory / str(step)
        if processes.leads() and folder.exists():
            names = (f"{step}.damaged{'' if n == 1 else f'-{n}'}" for n in itertools.count(1))
            folder.rename(next(path for path in map(folder.with_name, names) if not path.exists()))
        processes.exchange(None)
        with _quiet():
            self._checkpointer.reload()

    @held()
    def close(self) -> None:
        """Waits for whatever is being written."""
        self._checkpointer.close()
        if self._writer not in (None, self._checkpointer):
            self._writer.close()


def _everywhere(work: Callable[[], T]) -> T:
    """What `work` returns, where it fails in no process. Raises CheckpointError: its own, or another process's."""
    try:
        done, failed = work(), None
    except CheckpointError as error:
        done, failed = None, error
    if any(told := processes.exchange("" if failed is None else str(failed))):
        raise failed or CheckpointError(next(filter(None, told)))
    return cast(T, done)


class SoloReader:
    """What Orbax's Checkpointer reads, without waiting for other processes: each may read at another time."""

    def __init__(self, directory: pathlib.Path):
        from orbax.checkpoint import v1 as ocp

        self._directory, self._ocp = directory, ocp
        self.reload()

    def reload(self) -> None:
        """Looks which steps are there now."""
        folders = [path for path in self._directory.glob("*") if path.name.isdecimal()]
        complete = [path for path in folders if (path / "_CHECKPOINT_METADATA").is_file()]
        self.checkpoints = [_Step(int(path.name), path) for path in sorted(complete, key=lambda path: int(path.name))]

    def load_checkpointables(self, step: int, abstract: dict[str, Tree]) -> dict[str, Tree]:
        with self._alone():
            return self._ocp.load_checkpointables(self._directory / str(step), abstract)

    def checkpointables_metadata(self, step: int) -> Any:
        with self._alone():
            return self._ocp.checkpointables_metadata(self._directory / str(step))

    def _alone(self) -> Any:
        me = jax.process_index()
        options = self._ocp.options.MultiprocessingOptions(
            primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"alone_{me}"
        )
        return self._ocp.Context(multiprocessing_options=options)

    def close(self) -> None:
        """There is nothing to wait for."""


@dataclasses.dataclass(frozen=True)
class _Step:
    step: int
    folder: pathlib.Path

    @property
    def metrics(self) -> Any:
        """What it was saved with; None where it was saved without."""
        path = self.folder / "metrics" / "metrics"
        return json.loads(path.read_text()) if path.is_file() else None


def _success(metrics: Any) -> float:
    return float(metrics["success"])


def _counted(document: Mapping[str, Any], default: int) -> int:
    """The step of a checkpoint that does not hold its number: RL's iteration, or the batches that SFT has seen."""
    position = document.get("loader", {}).get("position")
    return document.get("iteration", position.get("next_index", default) if isinstance(position, dict) else default)


def _first(names: list[str]) -> str:
    return f" (first: {names[0]})" if names else ""


def _short(error: BaseException) -> str:
    while error.__cause__ is not None:  # Orbax wraps the reason several times
        error = error.__cause__
    told = str(error).partition("[source locations=")[0].partition("[tensorstore_spec=")[0]  # the reason stands before
    text = shortened(told, 400)
    plain = isinstance(error, (OSError, ValueError)) and text
    return text if plain else f"{type(error).__name__} {text}".strip()
