"""The interface of every format: named arrays, read and written in blocks, so that few are in memory at a time."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Protocol

import ml_dtypes
import numpy as np
from jaxtyping import Shaped

from z1_jax.errors import UserError

Index = tuple[int | slice, ...]  # into the leading axes; a slice is the last one

DTYPES: Mapping[str, np.dtype] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
    "float64": np.dtype(np.float64),
}


class FormatError(UserError):
    """A checkpoint that cannot be read or written: absent, damaged, or of another model."""


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype of a stored array."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize


class Reader(Protocol):
    """Arrays of a checkpoint."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...

    def read(self, name: str, index: Index = ()) -> np.ndarray:
        """An array, or a block of it. Raises FormatError when the file is damaged."""
        ...

    def close(self) -> None: ...


class Writer(Protocol):
    """A checkpoint that is being written: all arrays are declared first."""

    def write(self, name: str, index: Index, values: Shaped[np.ndarray, "..."]) -> None:
        """Stores a block of an array."""
        ...

    def close(self) -> None:
        """Returns when everything is on the disk."""
        ...

    def abandon(self) -> None:
        """Closes the files unfinished, in whatever state they are. Does nothing after `close`."""
        ...
