"""Messages of openpi's protocol: msgpack with plain arrays. Nothing is unpickled; other types are refused.

An array is {b"__ndarray__": True, b"data": bytes, b"dtype": str, b"shape": […]}, as openpi-client packs it. Knows no
policy and no socket.
"""

from __future__ import annotations

import importlib
import math
import re
from types import ModuleType
from typing import Any

import numpy as np

from z1_jax.errors import UserError, first_line

EXTRA = "pip install 'z1-jax[serve]'"
# Limits on the counts that a message states. msgpack allocates by them before it reads, at each level of nested arrays.
MOST_ITEMS, MOST_KEYS, MOST_CHARACTERS, MOST_AXES = 4096, 256, 1 << 16, 8
_PLAIN = re.compile(r"[<>|=]?(b1|[iu][1248]|f[248])")
_TEXT = re.compile(r"[<>=]?U([0-9]{1,4})")  # NumPy's own strings, where a prompt was put into an array


class MessageError(ValueError):
    """A message that cannot be read, or holds a type that is not plain: one line."""


def package(name: str) -> ModuleType:
    """A package of the extra `serve`.

    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"serving needs the package {name.partition('.')[0]}: install it with {EXTRA}") from error


def pack(value: Any) -> bytes:
    """A message of dicts, lists, text, numbers, None and arrays of numbers.

    Raises:
        MessageError: it holds another type.
    """
    try:
        return package("msgpack").packb(value, default=_packed)
    except (TypeError, ValueError, OverflowError) as error:
        raise MessageError(f"cannot be packed: {first_line(error)}") from error


def _packed(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        if not _PLAIN.fullmatch(value.dtype.str):
            raise TypeError(f"an array of dtype {value.dtype}; expected numbers")
        return {b"__ndarray__": True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape}
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"a {type(value).__name__}; expected plain values and arrays")


def unpack(message: bytes | str) -> Any:
    """The content of a message. Arrays are read-only views of it.

    Raises:
        MessageError: it is not msgpack, holds types that are not plain (such as object arrays), or states huge counts.
    """
    if isinstance(message, str):
        raise MessageError("got a text frame; expected msgpack in a binary frame")
    msgpack = package("msgpack")
    limits = {"max_array_len": MOST_ITEMS, "max_map_len": MOST_KEYS, "max_str_len": MOST_CHARACTERS, "max_ext_len": 0}
    try:
        return msgpack.unpackb(
            message, object_hook=_unpacked, raw=False, strict_map_key=True, max_bin_len=len(message), **limits
        )
    except MessageError:
        raise
    except Exception as error:  # of any kind: the bytes are a stranger's
        raise MessageError(
            f"is no msgpack that this server reads ({type(error).__name__}: {first_line(error)})"
        ) from None


def _unpacked(found: dict[Any, Any]) -> Any:
    if b"__ndarray__" in found:
        return _array(found.get(b"data"), found.get(b"dtype"), found.get(b"shape"))
    if b"__npgeneric__" in found:
        return _number(found.get(b"data"), found.get(b"dtype"))
    return found


def _dtype(name: Any) -> np.dtype[Any]:
    if not isinstance(name, str) or not _PLAIN.fullmatch(name):
        raise MessageError(f"holds an array of dtype {str(name)[:20]!r}; expected numbers, such as '<f4' or '|u1'")
    return np.dtype(name)


def _array(data: Any, dtype: Any, shape: Any) -> Any:
    if not isinstance(data, bytes):
        raise MessageError(f"holds an array whose data are {type(data).__name__}; expected bytes")
    if not isinstance(shape, list) or len(shape) > MOST_AXES or not all(type(n) is int and n >= 0 for n in shape):
        raise MessageError(f"holds an array of shape {str(shape)[:40]}; expected at most {MOST_AXES} sizes")
    if isinstance(dtype, str) and _TEXT.fullmatch(dtype) and not shape:
        return _text(data, dtype)
    kind = _dtype(dtype)
    if math.prod(shape) * kind.itemsize != len(data):
        raise MessageError(f"holds an array of shape {shape} and dtype {dtype} in {len(data)} bytes: they do not fit")
    return np.frombuffer(data, kind).reshape(shape)


def _text(data: bytes, dtype: str) -> str:
    if np.dtype(dtype).itemsize != len(data):
        raise MessageError(f"holds a text of dtype {dtype} in {len(data)} bytes: they do not fit")
    try:
        return data.decode("utf-32-be" if dtype.startswith(">") else "utf-32-le").rstrip("\0")
    except UnicodeDecodeError as error:
        raise MessageError(f"holds a text that is none ({first_line(error)})") from None


def _number(data: Any, dtype: Any) -> Any:
    if isinstance(data, str) and isinstance(dtype, str) and _TEXT.fullmatch(dtype):
        return data
    if not isinstance(data, (bool, int, float)):
        raise MessageError(f"holds a number that is a {type(data).__name__}; expected one")
    try:
        return _dtype(dtype).type(data)
    except (OverflowError, ValueError) as error:
        raise MessageError(f"holds a number that is not of dtype {dtype} ({first_line(error)})") from None
