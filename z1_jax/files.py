"""Paths as users write them, and locks: one process at a time on a directory or file, freed however that ends."""

from __future__ import annotations

import fcntl
import os
import pathlib
from typing import IO, Any

from z1_jax.errors import UserError

_held: dict[pathlib.Path, IO[str]] = {}


def absolute(path: str | pathlib.Path) -> pathlib.Path:
    """The absolute path, ~ expanded.

    Raises:
        UserError: there is no such home directory.
    """
    try:
        return pathlib.Path(path).expanduser().absolute()
    except RuntimeError:
        raise UserError(f"{path} is below a home directory that does not exist; write the path out") from None


def lock(file: IO[Any], what: pathlib.Path, owner: str = "") -> None:
    """Locks an open file until it is closed. Where the file system knows no locks, nothing is locked.

    Raises:
        UserError: another process has it.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        who = f"process {owner}" if owner else "another process"
        raise UserError(f"{what} is in use by {who}: wait until it ends, or stop it first") from None
    except OSError:
        pass


def hold(directory: pathlib.Path) -> None:
    """Locks a directory for the rest of this process.

    Raises:
        UserError: another process has it.
    """
    path = directory / ".lock"
    known = _held.get(path)
    if known is not None and path.exists() and os.path.samestat(os.fstat(known.fileno()), path.stat()):
        return
    file = path.open("a+")
    file.seek(0)
    try:
        lock(file, directory, file.read(20).strip())
    except UserError:
        file.close()
        raise
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    _held[path] = file
