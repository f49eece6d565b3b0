"""Reads a large stored chunk row by row, where TensorStore would decode all of it at once.

Orbax stores an array that one device held as a single chunk: a stacked array of π0.5 is then a chunk of 4.8 GB. Such a
zarr chunk is in C order, uncompressed or compressed by zstd, so its rows follow each other.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

READ_BYTES = 4 << 20  # of a stored chunk at a time
_HELD = 2  # ranges of rows that are kept: two threads ask for neighbours in any order


class RowStreams:
    """The rows of one array, read forward. To go back, it starts again from the beginning.

    Args:
        kvstore: of TensorStore, at the array's folder.
        spec: its metadata as `of` returns it.
    """

    def __init__(self, kvstore: Any, spec: Mapping[str, Any]):
        self._kvstore, self._spec = kvstore, spec
        self._streams: list[tuple[tuple[slice, ...], Any]] = []
        self._block = -1  # chunks along the first axis
        self._next = 0  # the row that the streams are at
        self._held: list[tuple[int, np.ndarray]] = []  # (first row, rows)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows start … stop, which lie in one chunk of the first axis. Raises OSError for a damaged chunk."""
        for first, rows in self._held:
            if first <= start and stop <= first + len(rows):
                return rows[start - first : stop - first]
        block = start // self._spec["chunks"][0]
        if block != self._block or start < self._next:
            self._open(block)
        while self._next < start:  # in steps of the same size: the other thread asks for the skipped rows next
            self._read(min(start, self._next + stop - start))
        return self._read(stop)

    def _read(self, stop: int) -> np.ndarray:
        """The rows from where the streams are to `stop`."""
        shape, chunks, dtype = (self._spec[name] for name in ("shape", "chunks", "dtype"))
        del self._held[: max(0, len(self._held) - _HELD + 1)]
        rows = np.empty((stop - self._next, *shape[1:]), dtype)
        alone = len(self._streams) == 1 and chunks[1:] == shape[1:]
        for place, stream in self._streams:
            part = rows if alone else np.empty((len(rows), *chunks[1:]), dtype)
            _fill(stream, memoryview(part.reshape(-1).view(np.uint8)))  # type: ignore[arg-type]
            if not alone:  # chunks at the end reach beyond the array
                rows[(slice(None), *place)] = part[(slice(None), *(slice(0, s.stop - s.start) for s in place))]
        self._held.append((self._next, rows))
        self._next = stop
        return rows

    def _open(self, block: int) -> None:
        shape, chunks = self._spec["shape"], self._spec["chunks"]
        grid = [range(math.ceil(size / chunk)) for size, chunk in zip(shape[1:], chunks[1:], strict=True)]
        self._streams, self._held = [], []
        for index in itertools.product(*grid):
            place = tuple(
                slice(i * chunk, min((i + 1) * chunk, size))
                for i, chunk, size in zip(index, chunks[1:], shape[1:], strict=True)
            )
            raw: Any = _Stored(self._kvstore, self._spec["key"]((block, *index)))
            if self._spec["zstd"]:
                import pyarrow  # comes with tensorflow-datasets

                raw = pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, "r"), "zstd")
            self._streams.append((place, raw))
        self._block, self._next = block, block * chunks[0]


def of(metadata: Mapping[str, Any], dtype: np.dtype) -> dict[str, Any] | None:
    """What `RowStreams` needs of an array's zarr metadata (2 or 3); None for other codecs or another order."""
    if metadata.get("zarr_format") == 2 or "compressor" in metadata:
        compressor = (metadata.get("compressor") or {}).get("id")
        if metadata.get("order", "C") != "C" or metadata.get("filters") or compressor not in (None, "zstd"):
            return None
        if str(metadata.get("dtype", "<"))[:1] == ">":
            return None
        chunks, zstd, between = metadata["chunks"], compressor == "zstd", metadata.get("dimension_separator", ".")
        prefix = ""
    else:
        codecs = [codec["name"] for codec in metadata.get("codecs", ())]
        endian = [codec.get("configuration", {}).get("endian", "little") for codec in metadata.get("codecs", ())]
        grid, encoding = metadata.get("chunk_grid", {}), metadata.get("chunk_key_encoding") or {"name": "default"}
        if codecs not in (["bytes"], ["bytes", "zstd"]) or endian[0] != "little" or encoding["name"] != "default":
            return None
        chunks, zstd = grid["configuration"]["chunk_shape"], codecs[-1] == "zstd"
        between = encoding.get("configuration", {}).get("separator", "/")
        prefix = f"c{between}"
    return {
        "shape": tuple(metadata["shape"]),
        "chunks": tuple(chunks),
        "dtype": dtype,
        "zstd": zstd,
        "key": lambda index: prefix + between.join(map(str, index)),
    }


class _Stored:
    """The bytes of one value of a key-value store, as a file that is read forward.

    A plain object: through io.BufferedReader it was six times as slow.
    """

    closed = False  # pyarrow asks

    def __init__(self, kvstore: Any, key: str):
        self._kvstore, self._key = kvstore, key
        self._position, self._part, self._used = 0, b"", 0

    def read(self, count: int) -> bytes:
        """At most `count` bytes; none at the end. Raises OSError where the value is missing."""
        if self._used == len(self._part):
            self._part, self._used = self._fetch(), 0
        found = self._part[self._used : self._used + count]
        self._used += len(found)
        return found

    def _fetch(self) -> bytes:
        wanted = slice(self._position, self._position + READ_BYTES)
        try:
            found = self._kvstore.read(self._key, byte_range=wanted).result()
        except ValueError as error:
            if "OUT_OF_RANGE" not in str(error):
                raise OSError(str(error)) from None
            found = self._kvstore.read(self._key, byte_range=slice(self._position, None)).result()  # its end
        if found.state != "value":
            raise OSError(f"chunk {self._key} is missing")
        self._position += len(found.value)
        return found.value

    def close(self) -> None:
        self._part = b""


def _fill(stream: Any, view: memoryview) -> None:
    done = 0
    while done < len(view):
        part = stream.read(min(len(view) - done, READ_BYTES))
        if not part:
            raise OSError(f"a chunk ends after {done} of {len(view)} bytes")
        view[done : done + len(part)] = part
        done += len(part)
