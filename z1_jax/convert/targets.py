"""Writes a checkpoint in any of the formats: into a folder beside its place, which is then moved there whole."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from z1_jax.checkpoint import Checkpoints
from z1_jax.convert import arrays, companions
from z1_jax.convert.orbax import OrbaxWriter, save_frame
from z1_jax.convert.safetensors import SafetensorsWriter
from z1_jax.convert.sources import Format
from z1_jax.convert.store import FormatError, TensorInfo, Writer
from z1_jax.convert.torch_names import LEROBOT_PREFIX
from z1_jax.convert.transfer import End, PartSummary
from z1_jax.files import clear, lock
from z1_jax.models.pi05 import Pi05Config

STEP = 0  # of a converted checkpoint of ours: DST/0
_ROOM = 4 << 20  # bytes beyond the tensors


def end_of(format: Format) -> End:
    """The names that a format gives to the arrays."""
    if format == "openpi":
        return End("openpi", lambda name: f"params/{name}/value")
    if format == "lerobot":
        return End("torch", lambda name: LEROBOT_PREFIX + name)
    return End("torch") if format == "openpi-pytorch" else End("ours")


@contextlib.contextmanager
def written_aside(place: pathlib.Path) -> Iterator[pathlib.Path]:
    """A folder to write into; it takes its place when all went well and is removed when anything did not.

    Raises:
        UserError: the place is taken, cannot be written, or another process is writing it.
    """
    if place.exists() or place.is_symlink():
        raise FormatError(f"{place} exists already; choose another DST or move it away")
    partial = place.with_name(place.name + ".partial")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        guard = open(place.with_name(f".{place.name}.lock"), "w")
    except OSError as error:
        raise FormatError(f"{place} cannot be written: {error.strerror}") from None
    with guard:
        lock(guard, place)
        clear(partial, {"new"})
        try:
            (partial / "new").mkdir(parents=True)
            yield partial / "new"
            if place.exists():
                raise FormatError(f"{place} appeared while the conversion ran; nothing was changed there")
            (partial / "new").rename(place)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise FormatError(f"{place} cannot be written: no space left on the disk") from None
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            pathlib.Path(guard.name).unlink(missing_ok=True)


def require_space(place: pathlib.Path, infos: Mapping[str, TensorInfo]) -> None:
    """Raises FormatError when the disk has no room for the arrays."""
    parent = next(folder for folder in place.parents if folder.exists())
    needed, free = sum(info.nbytes for info in infos.values()) + _ROOM, shutil.disk_usage(parent).free
    if needed > free:
        raise FormatError(
            f"{place} needs {needed / 1e9:.2f} GB, the disk of {parent} has {free / 1e9:.2f} GB free; "
            "make room or choose another DST"
        )


def open_writer(
    format: Format, folder: pathlib.Path, infos: Mapping[str, TensorInfo], chunks: Mapping[str, tuple[int, ...]]
) -> Writer:
    """A writer of the weights; `finish` puts the rest around them."""
    if format in ("ours", "openpi"):
        return OrbaxWriter(_stream(folder), infos, chunks, zarr=3 if format == "ours" else 2)
    prefix = LEROBOT_PREFIX if format == "lerobot" else ""
    embedding = infos[prefix + arrays.EMBEDDING]
    width = infos[f"{prefix}action_out_proj.weight"].shape[1]
    # Neither project's model uses this head, but both refuse a file without it. Never written: a hole of zeros.
    unused = {prefix + arrays.UNUSED_HEAD: TensorInfo((embedding.shape[0], width), embedding.dtype)}
    metadata = {"format": "pt", prefix + arrays.TIED_EMBEDDING: prefix + arrays.EMBEDDING}
    return SafetensorsWriter(folder / "model.safetensors", {**infos, **unused}, metadata)


def _stream(folder: pathlib.Path) -> pathlib.Path:
    return folder.parent / "arrays"


def finish(
    format: Format,
    folder: pathlib.Path,
    writer: Writer,
    config: Pi05Config,
    document: Mapping[str, Any],
    stats: companions.Stats | None,
    tokenizer: bytes | None,
    summaries: Mapping[str, PartSummary],
) -> None:
    """Writes what goes around the weights: the tree, configs, statistics, tokenizer."""
    writer.close()
    precision = "bfloat16" if any("bfloat16" in part.dtypes for part in summaries.values()) else "float32"
    if format == "ours":
        assert isinstance(writer, OrbaxWriter)
        crcs = {name: crc for part in summaries.values() for name, crc in part.crcs.items()}
        rest = {"assets": {"tokenizer": np.frombuffer(tokenizer, np.uint8)}} if tokenizer else {}
        checkpoints = Checkpoints(folder)
        writer.move_into(checkpoints.save_frame(STEP, "params", crcs, rest, document))
        checkpoints.seal_files(STEP)
        checkpoints.close()
        return
    if format == "openpi":
        assert isinstance(writer, OrbaxWriter)
        save_frame(folder / "params", writer.names)
        writer.move_into(folder / "params")
    if format == "openpi-pytorch":
        companions.write_openpi_config(folder, config, precision)
    if format == "lerobot":
        companions.write_lerobot(folder, config, stats, document, precision)
    else:
        companions.write_openpi(folder, stats, document)
    if tokenizer:
        (folder / companions.TOKENIZERS[0]).write_bytes(tokenizer)
    sidecar = {key: value for key, value in document.items() if key not in ("architecture", "norm_stats")}
    sidecar["norm_rules"] = {key: value["rule"] for key, value in document["norm_stats"].items()}
    (folder / companions.SIDECAR).write_text(json.dumps(sidecar, indent=1))
    for path in folder.rglob("*"):
        if path.is_file() and path.suffix in (".json", ".model"):
            with open(path, "rb") as file:
                os.fsync(file.fileno())
