"""The safetensors format, read and written in blocks: an 8-byte length, a JSON header, then the tensors' bytes.

The public library reads whole tensors, and has no bfloat16 in NumPy.
"""

from __future__ import annotations

import json
import math
import os
import pathlib
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Shaped

from z1_jax.convert.store import DTYPES, FormatError, Index, TensorInfo

_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}
_CODES = {DTYPES[name]: code for code, name in _NAMES.items()}
_MAX_HEADER = 100 << 20  # the format's own limit
INDEX = "model.safetensors.index.json"


class SafetensorsReader:
    """The tensors of one file, or of several that make up one checkpoint."""

    def __init__(self, *paths: pathlib.Path):
        """Opens the files and checks headers and sizes.

        Raises:
            FormatError: a file is truncated, is not in this format, or two hold the same tensor.
        """
        self.paths = paths
        self.tensors: dict[str, TensorInfo] = {}
        self.metadata: dict[str, str] = {}
        self._places: dict[str, tuple[int, int]] = {}
        self._files: list[int] = []
        for path in paths:
            file = os.open(path, os.O_RDONLY)
            self._files.append(file)
            start, header = _read_header(path, file)
            self.metadata |= header.pop("__metadata__", {})
            for name, entry in header.items():
                if name in self.tensors:
                    raise FormatError(f"{path}: tensor {name} is also in another file of the checkpoint")
                self.tensors[name] = TensorInfo(tuple(entry["shape"]), DTYPES[_NAMES[entry["dtype"]]])
                self._places[name] = (file, start + entry["data_offsets"][0])

    def read(self, name: str, index: Index = ()) -> np.ndarray:
        """A tensor, or a block of it that is contiguous in the file."""
        info = self.tensors[name]
        offset, shape = _block(info.shape, index)
        out = np.empty(shape, info.dtype)
        file, start = self._places[name]
        view = memoryview(out.reshape(-1).view(np.uint8))  # type: ignore[arg-type]
        position, got = start + offset * info.dtype.itemsize, 0
        while got < len(view):
            count = os.preadv(file, [view[got:]], position + got)
            if count == 0:
                raise FormatError(f"{self.paths[self._files.index(file)]} ended while {name} was read; copy it anew")
            got += count
        return out

    def close(self) -> None:
        while self._files:
            os.close(self._files.pop())


def open_sharded(index: pathlib.Path) -> SafetensorsReader:
    """The shards that an index file names.

    Raises:
        FormatError: a shard is missing, or index and shards do not agree.
    """
    try:
        listed: Mapping[str, str] = json.loads(index.read_text())["weight_map"]
        shards = sorted(set(listed.values()))
    except (ValueError, KeyError, AttributeError, TypeError):
        raise FormatError(f'{index} is not an index of safetensors; expected {{"weight_map": {{…}}}}') from None
    for shard in shards:
        if not (index.parent / shard).is_file():
            raise FormatError(f"{index.parent} lacks {shard}, one of the {len(shards)} shards that {index.name} names")
    reader = SafetensorsReader(*(index.parent / shard for shard in shards))
    if reader.tensors.keys() != listed.keys():
        name = min(reader.tensors.keys() ^ listed.keys())
        where = "only in the index" if name in listed else "in a shard but not in the index"
        reader.close()
        raise FormatError(f"{index} and its shards do not agree: {name} is {where}; fetch the checkpoint anew")
    return reader


class SafetensorsWriter:
    """A new file of declared tensors. Blocks may come in any order; those never written are zero."""

    def __init__(self, path: pathlib.Path, tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str]):
        header: dict[str, Any] = {"__metadata__": dict(metadata)}
        offset = 0
        for name, info in tensors.items():
            header[name] = {
                "dtype": _CODES[info.dtype],
                "shape": list(info.shape),
                "data_offsets": [offset, offset + info.nbytes],
            }
            offset += info.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._tensors, self._start = dict(tensors), 8 + len(text)
        self._offsets = {name: entry["data_offsets"][0] for name, entry in header.items() if name != "__metadata__"}
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        _write_all(self._file, memoryview(struct.pack("<Q", len(text)) + text), 0)
        os.ftruncate(self._file, self._start + offset)

    def write(self, name: str, index: Index, values: Shaped[np.ndarray, "..."]) -> None:
        """Stores a block that is contiguous in the file; `values` in the declared dtype."""
        info = self._tensors[name]
        offset, shape = _block(info.shape, index)
        if values.dtype != info.dtype or math.prod(shape) != values.size:
            raise ValueError(f"{name}: got {values.dtype} {values.shape}, expected {info.dtype} {shape}")
        data = memoryview(np.ascontiguousarray(values).reshape(-1).view(np.uint8))  # type: ignore[arg-type]
        _write_all(self._file, data, self._start + self._offsets[name] + offset * info.dtype.itemsize)

    def close(self) -> None:
        """Returns when everything is on the disk."""
        if self._file >= 0:
            os.fsync(self._file)
            self.abandon()

    def abandon(self) -> None:
        """Closes the file as it is, unfinished."""
        if self._file >= 0:
            file, self._file = self._file, -1
            os.close(file)


def _write_all(file: int, data: memoryview, position: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(file, data[done:], position + done)


def _block(shape: tuple[int, ...], index: Index) -> tuple[int, tuple[int, ...]]:
    """(first entry, shape) of the contiguous block at an index into the leading axes."""
    offset, inner = 0, shape
    for i in index:
        stride = math.prod(inner[1:])
        if isinstance(i, slice):
            start, stop, _ = i.indices(inner[0])
            return offset + start * stride, (stop - start, *inner[1:])
        offset, inner = offset + i * stride, inner[1:]
    return offset, inner


def _read_header(path: pathlib.Path, file: int) -> tuple[int, dict[str, Any]]:
    """(position of the first tensor, header). Raises FormatError."""
    size = os.fstat(file).st_size
    length = struct.unpack("<Q", os.pread(file, 8, 0))[0] if size >= 8 else _MAX_HEADER + 1
    if length > min(_MAX_HEADER, size - 8):
        raise FormatError(f"{path} is not a whole safetensors file ({size} bytes); fetch or copy it anew")
    try:
        header = json.loads(os.pread(file, length, 8))
        end = _check_entries(path, header)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(f"{path} has no safetensors header ({error}); fetch or copy it anew") from None
    if size != 8 + length + end:
        word = "truncated" if size < 8 + length + end else "longer than its header says"
        raise FormatError(f"{path} is {word}: {size:,} bytes, expected {8 + length + end:,}; fetch or copy it anew")
    return 8 + length, header


def _check_entries(path: pathlib.Path, header: Mapping[str, Any]) -> int:
    """Where the data end. Raises FormatError for an unknown dtype, or an entry whose bytes do not fit its shape."""
    end = 0
    entries = [(name, entry) for name, entry in header.items() if name != "__metadata__"]
    for name, entry in sorted(entries, key=lambda item: item[1]["data_offsets"]):
        start, stop = entry["data_offsets"]
        if entry["dtype"] not in _NAMES:
            raise FormatError(f"{path}: {name} has dtype {entry['dtype']}; expected one of {', '.join(_NAMES)}")
        nbytes = math.prod(entry["shape"]) * DTYPES[_NAMES[entry["dtype"]]].itemsize
        if start != end or stop - start != nbytes:
            raise FormatError(f"{path}: the header places {name} wrongly; fetch or copy the file anew")
        end = stop
    return end
