"""Paths as users write them, files and folders that are made aside, and locks, freed however a process ends."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pathlib
import shutil
from collections.abc import Iterator, Set
from typing import IO, Any, TypeVar

from z1_jax.errors import UserError, first_line

T = TypeVar("T")
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


def require_plain(path: pathlib.Path) -> None:
    """Refuses a path that Orbax takes for a pattern: it would write below it and not read it again.

    Raises:
        UserError: one line.
    """
    if any(character in "[]" for character in str(path)):
        raise UserError(f"{path} has [ or ] in a name, where no checkpoint can be kept; choose another place")


def write_whole(path: pathlib.Path, content: str | bytes) -> None:
    """Writes a file under another name and then gives it its own: a kill leaves the old file or the new one."""
    aside = partial_path(path)
    with writing(path):
        aside.write_bytes(content.encode() if isinstance(content, str) else content)
        aside.replace(path)


@contextlib.contextmanager
def writing(path: pathlib.Path) -> Iterator[None]:
    """Names the path in an error that does not: a full disk shows at a file that is open, whose name is not told."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def read_json(path: pathlib.Path, kind: type[T], default: T) -> T:
    """A JSON file that this project wrote: a list or an object; `default` where there is none.

    Raises:
        UserError: it is damaged, or something else.
    """
    if not os.path.lexists(path):
        return default
    require_file(path)
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({first_line(error)}): restore it, or delete it") from None
    if not isinstance(content, kind):
        wanted = "a list" if kind is list else "an object"
        raise UserError(f"{path} is damaged: it holds no JSON of {wanted}; restore it, or delete it")
    return content


def require_file(path: pathlib.Path) -> None:
    """Refuses what stands under the name of a file and is none; one that is missing is fine.

    Raises:
        UserError: one line.
    """
    if os.path.lexists(path) and not path.is_file():
        raise UserError(f"{path} is no file: move it away")


def partial_path(path: pathlib.Path) -> pathlib.Path:
    """Where `write_whole` writes before the file is whole."""
    return path.with_name(path.name + ".tmp")


def clear(folder: pathlib.Path, ours: Set[str]) -> None:
    """Removes what a killed process left in a folder, and nothing else that may stand under that name.

    Args:
        ours: names that such a process leaves.

    Raises:
        UserError: something else does.
    """
    if not folder.exists():
        return
    strange = sorted({entry.name for entry in folder.iterdir()} - ours) if folder.is_dir() else ["no folder"]
    if strange:
        raise UserError(f"{folder} is needed for a while and holds {strange[0]}: move it away")
    shutil.rmtree(folder)


def lock(file: IO[Any], what: pathlib.Path, owner: str = "", wait: bool = False) -> None:
    """Locks an open file until it is closed. Does nothing where the file system has no locks.

    Args:
        wait: until another process lets it go.

    Raises:
        UserError: another process has it.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
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
    require_file(path)
    file = path.open("a+", errors="replace")
    file.seek(0)
    try:
        lock(file, directory, file.read(20).strip())
    except UserError:
        file.close()
        raise
    with writing(path):
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
    _held[path] = file
