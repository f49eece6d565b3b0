"""How answers come from a worker process: their arrays through memory that it shares with its parent.

A pickle's buffers lie out of band (protocol 5); the parent copies them once, so that no later answer changes what it
keeps. The memory is anonymous: it ends with the last process that holds it, whatever ends those.
"""

from __future__ import annotations

import dataclasses
import itertools
import mmap
import os
import pickle
from collections.abc import Sequence
from typing import Any

import numpy as np

from envs.base import ChunkResult, EnvObservation

ANSWERS = 2  # that may lie there at once: the parent reads one before the worker writes the next but one
_SMALL = 4096  # bytes; smaller arrays go with the rest
_ALIGNED = 64
_SEEN, _RESULT = (EnvObservation, type(None)), (ChunkResult, type(None))


def anonymous() -> list[int]:
    """File descriptors of the memory for a new worker; none where the system has no such files."""
    if not hasattr(os, "memfd_create"):
        return []
    return [os.memfd_create("z1-answers") for _ in range(ANSWERS)]


@dataclasses.dataclass(frozen=True)
class Reply:
    """What a worker answers to one request."""

    results: list[Any]  # one per item; shorter when an item failed
    simulate_s: float = 0.0  # seconds in reset, step_chunk, snapshot and restore
    render_s: float = 0.0  # seconds in observe and render
    error: str | None = None  # one line: the exception's type and text
    error_slot: int | None = None  # the slot at which it happened
    lasting: bool = False  # the environment is wrong: nothing can go on
    wrong: bool = False  # the request itself is wrong: a retry is pointless


class SharedAnswers:
    """One end of it.

    Args:
        fds: as `anonymous` gives them; none: everything goes through the pipe.
    """

    def __init__(self, fds: Sequence[int]) -> None:
        self._fds = list(fds)
        self._maps: dict[int, mmap.mmap] = {}
        self._turns = itertools.cycle(range(len(self._fds)))

    def pack(self, value: Any) -> bytes:
        """What to send through the pipe for a value; its large arrays are in the memory then."""
        if not self._fds:
            return pickle.dumps((0, 0, [], pickle.dumps(value, protocol=5)))
        if isinstance(value, Reply) and (flat := _flattened(value)):
            return self._pack_images(*flat) or pickle.dumps((0, 0, [], pickle.dumps(value, protocol=5)))
        views: list[memoryview] = []

        def in_band(buffer: pickle.PickleBuffer) -> bool:
            view = buffer.raw()
            if view.nbytes >= _SMALL:
                views.append(view)
            return view.nbytes < _SMALL

        data = pickle.dumps(value, protocol=5, buffer_callback=in_band)
        ends = list(itertools.accumulate(-(-view.nbytes // _ALIGNED) * _ALIGNED for view in views))
        turn = next(self._turns)
        spans = [
            (end - -(-view.nbytes // _ALIGNED) * _ALIGNED, view.nbytes) for end, view in zip(ends, views, strict=True)
        ]
        total = ends[-1] if ends else 0
        try:
            shared = self._mapped(turn, total, grow=True) if total else None
        except OSError:  # the system has no more such memory
            return pickle.dumps((turn, 0, [], pickle.dumps(value, protocol=5)))
        for (start, size), view in zip(spans, views, strict=True):
            assert shared is not None
            shared[start : start + size] = view
        return pickle.dumps((turn, total, spans, data))

    def _pack_images(self, plain: Any, images: list[np.ndarray]) -> bytes | None:
        """The same for images of one shape, beside what is left without them; None where there is no memory."""
        turn, total = next(self._turns), len(images) * images[0].nbytes
        try:
            shared = np.frombuffer(self._mapped(turn, total, grow=True), np.uint8, total)
        except OSError:
            return None
        for place, image in zip(shared.reshape(-1, *images[0].shape), images, strict=True):
            place[...] = image
        return pickle.dumps((turn, total, images[0].shape, plain))

    def unpack(self, message: bytes) -> Any:
        """The value of a message; nothing in it is shared."""
        turn, total, spans, data = pickle.loads(message)
        if not total:
            return pickle.loads(data)
        block = np.empty(total, np.uint8)
        block[:] = np.frombuffer(self._mapped(turn, total, grow=False), np.uint8, total)
        if isinstance(spans, tuple):
            return _rebuilt(data, block.reshape(-1, *spans))
        view = block.data
        return pickle.loads(data, buffers=[view[start : start + size] for start, size in spans])

    def close(self) -> None:
        """Leaves the memory."""
        for shared in self._maps.values():
            shared.close()
        for fd in self._fds:
            os.close(fd)
        self._maps, self._fds = {}, []

    def _mapped(self, turn: int, size: int, grow: bool) -> mmap.mmap:
        """The memory of a turn, at least so large."""
        if turn in self._maps and len(self._maps[turn]) >= size:
            return self._maps[turn]
        if grow:
            os.posix_fallocate(self._fds[turn], 0, size)
        access = mmap.ACCESS_WRITE if grow else mmap.ACCESS_READ
        self._maps[turn] = mmap.mmap(self._fds[turn], os.fstat(self._fds[turn]).st_size, access=access)
        return self._maps[turn]


def _flattened(reply: Reply) -> tuple[Any, list[np.ndarray]] | None:
    """A reply with observations as tuples, and their images; None for other replies.

    Pickling the objects themselves takes several times as long: NumPy describes each array's type anew.
    """
    images: list[np.ndarray] = []
    rows: list[Any] = []
    for answer in reply.results:
        result, seen = answer if type(answer) is tuple else (None, answer)
        if type(seen) not in _SEEN or type(result) not in _RESULT or not (seen is None or _sound(seen)):
            return None
        chunk = result and tuple(vars(result).values())
        if seen is None:
            rows.append((chunk,))
        else:
            images += seen.images.values()
            rows.append((chunk, *seen.images, seen.state.tobytes(), seen.instruction))
    if not images or any(image.shape != images[0].shape for image in images):
        return None
    return (rows, reply.simulate_s, reply.render_s, reply.error, reply.error_slot, reply.lasting, reply.wrong), images


def _sound(seen: EnvObservation) -> bool:
    """Whether an observation is what `_rebuilt` makes; a broken one travels as it is, to be told of."""
    return (
        type(seen.images) is dict
        and all(type(image) is np.ndarray and image.dtype == np.uint8 for image in seen.images.values())
        and type(seen.state) is np.ndarray
        and seen.state.dtype == np.float32
        and seen.state.ndim == 1
    )


def _rebuilt(plain: Any, images: np.ndarray) -> Reply:
    """The reply of what `_flattened` made of it, with images [n, S, S, 3]."""
    rows, *rest = plain
    each = iter(images)
    results: list[Any] = []
    for chunk, *rendered in rows:
        seen = None
        if rendered:
            *names, state, instruction = rendered
            seen = EnvObservation(
                {name: next(each) for name in names}, np.frombuffer(bytearray(state), np.float32), instruction
            )
        results.append((ChunkResult(*chunk), seen) if chunk else seen)
    return Reply(results, *rest)
