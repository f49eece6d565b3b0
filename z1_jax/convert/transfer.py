"""Moves a model's pieces from one checkpoint to another, a few at a time; checks, casts and counts them on the way."""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import hashlib
import json
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from jaxtyping import Shaped

from z1_jax.convert.arrays import Piece, Style
from z1_jax.convert.store import DTYPES, FormatError, Index, Reader, TensorInfo, Writer

DTYPE_CHOICES = ("float32", "bfloat16", "source")
BLOCK_BYTES = 64 << 20  # of float32: larger pieces are stored, and where the axes allow it moved, in blocks of rows
_AHEAD = 3  # blocks that are read while one is written


@dataclasses.dataclass(frozen=True)
class End:
    """One end of a transfer: its style of names, and how to turn them into the names in the files."""

    style: Style
    rename: Callable[[str], str] = lambda name: name


@dataclasses.dataclass
class PartSummary:
    """A row of the table: vision, language or expert."""

    tensors: int = 0  # in the source
    parameters: int = 0
    source_dtypes: set[str] = dataclasses.field(default_factory=set)
    dtypes: set[str] = dataclasses.field(default_factory=set)
    crcs: dict[str, int] = dataclasses.field(default_factory=dict)  # array of ours -> CRC-32 of its values

    @property
    def checksum(self) -> str:
        """Checksum of the values: equal values in equal dtypes give the same one in every format."""
        return hashlib.sha256(json.dumps(self.crcs, sort_keys=True).encode()).hexdigest()[:12]


def rows_per_block(shape: tuple[int, ...]) -> int | None:
    """Rows of the blocks that a large piece is stored in; None: it is stored whole."""
    if not shape or math.prod(shape) * 4 <= BLOCK_BYTES:
        return None
    most = max(1, BLOCK_BYTES // (4 * math.prod(shape[1:])))
    even = next(rows for rows in range(most, 0, -1) if shape[0] % rows == 0)
    return even if even * 8 > most else most  # an uneven last block takes a whole block's space


def target_tensors(pieces: Sequence[Piece], end: End, dtype_of: Callable[[Piece], np.dtype]) -> dict[str, TensorInfo]:
    """What a writer of this end declares. An array whose pieces differ in dtype takes the widest."""
    found: dict[str, tuple[tuple[int, ...], tuple[int, ...], np.dtype]] = {}
    for piece in pieces:
        name, index = piece.place(end.style)
        leading, inner, dtype = found.get(name, ((0,) * len(index), (), dtype_of(piece)))
        leading = tuple(max(n, i + 1) for n, i in zip(leading, index, strict=True))
        dtype = dtype if dtype == dtype_of(piece) else DTYPES["float32"]
        found[name] = (leading, piece.shape_in(end.style), dtype)
    return {end.rename(name): TensorInfo((*a, *b), dtype) for name, (a, b, dtype) in found.items()}


def chunks(pieces: Sequence[Piece], end: End) -> dict[str, tuple[int, ...]]:
    """The blocks that an array store keeps each array in: those that `transfer` writes."""
    found = {}
    for piece in pieces:
        name, index = piece.place(end.style)
        shape = piece.shape_in(end.style)
        rows = rows_per_block(shape)
        found[end.rename(name)] = (1,) * len(index) + (shape if rows is None else (rows, *shape[1:]))
    return found


def transfer(
    pieces: Sequence[Piece],
    reader: Reader,
    source: End,
    writer: Writer | None,
    target: End,
    tensors: Mapping[str, TensorInfo],
    *,
    stored_crcs: Mapping[str, int | None] | None = None,
    progress: Callable[[int], None] = lambda nbytes: None,
) -> dict[str, PartSummary]:
    """Moves all pieces, those of each of our arrays in memory order; without a writer it only checks and counts them.

    Args:
        tensors: the target's, by its names, for their dtypes.
        stored_crcs: CRC-32 of the source's arrays, where it is ours.
        progress: called with the bytes of each block that was read.

    Returns:
        Part -> summary.

    Raises:
        FormatError: a value is not finite, an array fails its checksum, or either end cannot be read or written.
    """
    parts = {name: PartSummary() for name in ("vision", "language", "expert")}
    counted: set[str] = set()
    read_crcs: dict[str, int] = {}

    def work(job: tuple[Piece, slice | None]) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """(values as read with our axes, the same in the target's dtype, the same with the target's axes)."""
        piece, rows = job
        name, index = piece.place(source.style)
        raw = reader.read(source.rename(name), index + (() if rows is None else (rows,)))
        layout = piece.layout if source.style == "torch" else None
        raw = raw if layout is None else contiguous(layout.to_ours(raw, piece.shape))
        dtype = tensors[target.rename(piece.place(target.style)[0])].dtype
        values = raw.astype(dtype, copy=False)
        require_finite(values, source.rename(name))
        out = None
        if writer is not None:
            layout = piece.layout if target.style == "torch" else None
            out = values if layout is None else contiguous(layout.to_torch(values))
        return raw, values, out

    jobs = _jobs(pieces, source.style, target.style)
    for (piece, rows), (raw, values, out) in _ahead(work, jobs):
        name, index = piece.place(target.style)
        if writer is not None:
            block: Index = index + (() if rows is None else (rows,))
            writer.write(target.rename(name), block, out)
        summary, (leaf, _) = parts[piece.part], piece.ours
        summary.crcs[leaf] = zlib.crc32(_bytes(values), summary.crcs.get(leaf, 0))
        if stored_crcs is not None:
            same = raw.dtype == values.dtype
            read_crcs[leaf] = summary.crcs[leaf] if same else zlib.crc32(_bytes(raw), read_crcs.get(leaf, 0))
        summary.parameters += values.size
        summary.source_dtypes.add(str(raw.dtype))
        summary.dtypes.add(str(values.dtype))
        if (origin := piece.place(source.style)[0]) not in counted:
            counted.add(origin)
            summary.tensors += 1
        progress(raw.nbytes)
    for leaf, crc in (stored_crcs or {}).items():
        if crc is not None and read_crcs.get(leaf, crc) != crc:
            raise FormatError(f"{leaf} of the source fails its checksum: the checkpoint is damaged")
    return parts


def _jobs(pieces: Sequence[Piece], source: Style, target: Style) -> Iterator[tuple[Piece, slice | None]]:
    """Pieces, and blocks of rows of the large ones whose axes are the same on both sides."""
    for piece in pieces:
        rows = rows_per_block(piece.shape)
        if rows is None or (piece.layout is not None and "torch" in (source, target)):
            yield piece, None
            continue
        for start in range(0, piece.shape[0], rows):
            yield piece, slice(start, min(start + rows, piece.shape[0]))


def _ahead(work: Callable, jobs: Iterator) -> Iterator:
    """(job, its result) in order; two threads work ahead of the caller. NumPy and the disk release the lock."""
    pending: collections.deque = collections.deque()
    with concurrent.futures.ThreadPoolExecutor(2) as executor:
        try:
            for job in jobs:
                pending.append((job, executor.submit(work, job)))
                if len(pending) > _AHEAD:
                    job, future = pending.popleft()
                    yield job, future.result()
                    del future
            while pending:
                job, future = pending.popleft()
                yield job, future.result()
        finally:
            for _, future in pending:
                future.cancel()


def contiguous(view: Shaped[np.ndarray, "..."]) -> np.ndarray:
    """The array in C order, copied in tiles: a plain copy of a large transposed matrix misses the cache each time."""
    if view.flags.c_contiguous:
        return view
    out = np.empty(view.shape, view.dtype)
    if view.ndim == 2:
        _copy_tiles(out, view)
    elif view.ndim == 3 and view.strides[1] == view.shape[2] * view.strides[2]:  # the last two axes are one
        flat = (view.shape[0], -1)
        _copy_tiles(out.reshape(flat), view.reshape(flat))
    elif view.ndim == 3:
        for i in range(view.shape[0]):
            _copy_tiles(out[i], view[i])
    else:
        out[...] = view
    return out


def _copy_tiles(out: np.ndarray, view: np.ndarray) -> None:
    # Long in the target's rows, short in its columns: the fastest of the shapes tried, 3 to 5 times a plain copy.
    for i in range(0, view.shape[0], 512):
        for j in range(0, view.shape[1], 16):
            out[i : i + 512, j : j + 16] = view[i : i + 512, j : j + 16]


def require_finite(values: Shaped[np.ndarray, "..."], name: str) -> None:
    """Raises FormatError when a value is NaN or infinite."""
    if values.dtype == DTYPES["bfloat16"]:
        if not values.size or (values.view(np.uint16) & 0x7FFF).max() < 0x7F80:  # no exponent of ones
            return
    else:
        with np.errstate(over="ignore", invalid="ignore"):
            if np.isfinite(values.sum()):  # a sum hides no NaN and no infinity
                return
    bad = ~np.isfinite(values.astype(np.float32) if values.dtype == DTYPES["bfloat16"] else values)
    if bad.any():
        raise FormatError(
            f"{name} holds {int(bad.sum())} values that are not finite (NaN or Inf): damaged, or training diverged"
        )


def _bytes(values: np.ndarray) -> memoryview:
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8).data
