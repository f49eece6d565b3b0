"""The arrays of an Orbax checkpoint, read and written in blocks through TensorStore, which Orbax itself stores with.

Orbax reads and writes whole trees only. To write a checkpoint in blocks, Orbax first saves one with the same names and
arrays of a single entry (tree, versions, commit marks); the real arrays, written beside it, then replace those.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import pathlib
import shutil
import threading
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Shaped

from z1_jax.convert import chunk_streams
from z1_jax.convert.store import FormatError, Index, TensorInfo

MANIFEST = "manifest.ocdbt"
TREE = "_METADATA"  # names and types of the arrays
_WHOLE_BYTES = 256 << 20  # stored chunks up to here are decoded whole; larger ones are read row by row
_BATCH_BYTES = 80 << 20  # written in one commit; a file above 64 MiB is not hashed at every opening


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


class OrbaxReader:
    """The arrays of one saved tree, by their keys joined with "/"."""

    def __init__(self, folder: pathlib.Path):
        """Opens every array; reads none.

        Raises:
            FormatError: the folder holds no Orbax tree, or one of its arrays cannot be opened.
        """
        import tensorstore as ts

        self.folder = folder.absolute()
        try:
            tree = json.loads((self.folder / TREE).read_text())
            keys = [tuple(str(k["key"]) for k in e["key_metadata"]) for e in tree["tree_metadata"].values()]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise FormatError(f"{folder} is no Orbax checkpoint: its {TREE} cannot be read ({error})") from None
        self._context = ts.Context({"cache_pool": {"total_bytes_limit": 0}, "file_io_concurrency": {"limit": 4}})
        self._stores: dict[str, Any] = {}
        self.tensors: dict[str, TensorInfo] = {}
        self._held: tuple[str, int, np.ndarray] | None = None
        self._streams: tuple[str, chunk_streams.RowStreams] | None = None
        self._lock = threading.Lock()
        driver = "zarr3" if tree.get("use_zarr3") else "zarr"
        for key in keys:
            name = "/".join(key)
            spec = {"driver": driver, "kvstore": self._kvstore(".".join(key))}
            with self._told(name):
                store = ts.open(spec, open=True, read=True, context=self._context).result()
            self._stores[name] = store
            self.tensors[name] = TensorInfo(tuple(store.shape), np.dtype(store.dtype.numpy_dtype))

    def _kvstore(self, array: str) -> dict[str, Any]:
        if (self.folder / MANIFEST).is_file():
            return {"driver": "ocdbt", "base": f"file://{self.folder}/", "path": f"{array}/"}
        return {"driver": "file", "path": f"{self.folder}/{array}/"}

    @contextlib.contextmanager
    def _told(self, name: str):
        try:
            yield
        except (ValueError, OSError) as error:
            raise FormatError(f"{self.folder} is damaged: {name} cannot be read ({_one_line(error)})") from None

    def read(self, name: str, index: Index = ()) -> np.ndarray:
        """An array, or a block of it. The rest of the decoded chunks is kept for the next call."""
        with self._lock, self._told(name):
            if not index:
                return np.asarray(self._stores[name].read().result())
            if (rows := self._streamed(name, index[0])) is not None:
                return rows[(slice(None) if isinstance(index[0], slice) else 0, *index[1:])]
            start, stop = self._chunk_rows(name, index[0])
            if self._held is None or self._held[:2] != (name, start) or len(self._held[2]) < stop - start:
                self._held = None  # freed before the next is read
                self._held = (name, start, np.asarray(self._stores[name][start:stop].read().result()))
            rows = self._held[2]
            first = index[0]
            shifted = slice(first.start - start, first.stop - start) if isinstance(first, slice) else first - start
            return rows[(shifted, *index[1:])]

    def _streamed(self, name: str, first: int | slice) -> np.ndarray | None:
        """Rows of an array with large chunks, read row by row; None if its chunks are small or of another encoding."""
        store, (start, stop) = self._stores[name], _range(first)
        chunk = max(1, store.chunk_layout.read_chunk.shape[0] or 1)
        whole = self.tensors[name].nbytes // store.shape[0] * chunk
        if whole <= _WHOLE_BYTES or chunk == 1 or start // chunk != (stop - 1) // chunk:
            return None
        if self._streams is None or self._streams[0] != name:
            self._held = self._streams = None  # freed before the next is read
            spec = chunk_streams.of(store.spec().to_json()["metadata"], self.tensors[name].dtype)
            if spec is None:
                return None
            self._streams = (name, chunk_streams.RowStreams(store.kvstore, spec))
        return self._streams[1].read(start, stop)

    def _chunk_rows(self, name: str, first: int | slice) -> tuple[int, int]:
        """The range of rows that has to be decoded together, because stored chunks hold them together."""
        store = self._stores[name]
        chunk = max(1, store.chunk_layout.read_chunk.shape[0] or 1)
        start, stop = _range(first)
        return start // chunk * chunk, min(math.ceil(stop / chunk) * chunk, store.shape[0])

    def close(self) -> None:
        self._held = self._streams = None
        self._stores.clear()


def _range(first: int | slice) -> tuple[int, int]:
    return (first.start, first.stop) if isinstance(first, slice) else (first, first + 1)


class OrbaxWriter:
    """Writes the arrays of a new checkpoint into a folder of their own; `move_into` puts them into the checkpoint."""

    def __init__(
        self, folder: pathlib.Path, tensors: Mapping[str, TensorInfo], chunks: Mapping[str, tuple[int, ...]], zarr: int
    ):
        """Declares the arrays; names are keys joined with "/". `chunks`: the blocks that they are written in."""
        import tensorstore as ts

        self.folder, self._zarr = folder.absolute(), zarr
        self._tensors, self._pending = dict(tensors), 0
        self.folder.mkdir(parents=True)
        self._context = ts.Context({"cache_pool": {"total_bytes_limit": 0}, "file_io_concurrency": {"limit": 4}})
        self._committing: Any = None
        # All in one commit: one for each array would leave hundreds of little files.
        opening = ts.Transaction()
        with self._told():
            stores = {
                name: ts.open(
                    self._spec(name, info, chunks[name]), create=True, context=self._context, transaction=opening
                ).result()
                for name, info in tensors.items()
            }
            opening.commit_sync()
        self._stores: dict[str, Any] = {name: store.with_transaction(None) for name, store in stores.items()}
        self._transaction = ts.Transaction()

    def _spec(self, name: str, info: TensorInfo, chunk: tuple[int, ...]) -> dict[str, Any]:
        path = name.replace("/", ".") + "/"
        kvstore = {"driver": "ocdbt", "base": f"file://{self.folder}/", "path": path}
        complete = {"store_data_equal_to_fill_value": True}  # Orbax takes an absent block for damage, not for zeros
        shape = list(info.shape)
        metadata: dict[str, Any]
        if self._zarr == 2:
            codes = {"float32": "<f4", "bfloat16": "bfloat16", "float16": "<f2", "float64": "<f8"}
            metadata = {"shape": shape, "chunks": list(chunk), "dtype": codes[str(info.dtype)], "compressor": None}
            return {"driver": "zarr", "kvstore": kvstore, "metadata": metadata, **complete}
        metadata = {
            "shape": shape,
            "data_type": str(info.dtype),
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunk)}},
            "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
        }
        return {"driver": "zarr3", "kvstore": kvstore, "metadata": metadata, **complete}

    @property
    def names(self) -> list[str]:
        return list(self._tensors)

    @contextlib.contextmanager
    def _told(self):
        try:
            yield
        except (ValueError, OSError) as error:
            if "No space left" in str(error):  # TensorStore tells the kind of an error in its text only
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from None
            raise FormatError(f"{self.folder.parent} cannot be written: {_one_line(error)}") from None

    def write(self, name: str, index: Index, values: Shaped[np.ndarray, "..."]) -> None:
        """Stores a block of an array, which must be whole chunks."""
        with self._told():
            store = self._stores[name].with_transaction(self._transaction)
            # Nobody changes the values any more: TensorStore need not copy them.
            (store[index] if index else store).write(values, can_reference_source_data_indefinitely=True).result()
            self._pending += values.nbytes
            if self._pending >= _BATCH_BYTES:
                self._commit()

    def _commit(self) -> None:
        import tensorstore as ts

        self._wait()
        self._committing = self._transaction.commit_async()  # the disk works while the next batch is read
        self._transaction, self._pending = ts.Transaction(), 0

    def _wait(self) -> None:
        if self._committing is not None:
            committing, self._committing = self._committing, None
            committing.result()

    def close(self) -> None:
        """Returns when everything is on the disk."""
        if self._stores:
            with self._told():
                self._commit()
                self._wait()
            self._stores.clear()

    def abandon(self) -> None:
        """Drops everything that is not written yet."""
        if self._stores:
            self._stores.clear()
            self._transaction.abort()
            with contextlib.suppress(ValueError, OSError):  # the folder goes away: nothing may be writing into it
                self._wait()

    def move_into(self, tree: pathlib.Path) -> None:
        """Puts the arrays into a tree that Orbax saved with the same names and arrays of one entry."""
        names = json.loads((tree / TREE).read_text())
        found = {"/".join(str(k["key"]) for k in entry["key_metadata"]) for entry in names["tree_metadata"].values()}
        if found != self._tensors.keys() or bool(names.get("use_zarr3")) != (self._zarr == 3):
            raise RuntimeError(f"{tree} was saved by Orbax in a form that this version does not know")
        for path in tree.iterdir():
            if path.name in (MANIFEST, "d", "array_metadatas") or path.name.startswith("ocdbt.process_"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        for path in self.folder.iterdir():
            path.rename(tree / path.name)
        self.folder.rmdir()


def save_frame(folder: pathlib.Path, names: Iterable[str]) -> None:
    """Saves arrays of one entry, named as "a/b/c", as openpi does into the new folder (PyTree handler, zarr 2)."""
    import orbax.checkpoint as ocp
    from flax import traverse_util

    tree = traverse_util.unflatten_dict({name: np.zeros(1, np.float32) for name in names}, sep="/")
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=False)
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(folder.absolute(), args=ocp.args.PyTreeSave(tree))
