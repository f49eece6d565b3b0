"""The interface of every format: a source lists episodes, reads the arrays of one, and refuses a bad one."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from z1_jax.errors import UserError, first_line

ENDS_BYTES = 1 << 20  # of a large file's beginning and end, that its checksum covers


class BadData(UserError):
    """A file or an episode that cannot be used; `--skip-bad` leaves it out. The message is one line with its name."""


@dataclasses.dataclass(frozen=True)
class Columns:
    """How a source is read where its columns are not called as its format calls them."""

    state: tuple[str, ...] = ()  # columns, joined in this order; empty: the format's own, as in the other two
    actions: tuple[str, ...] = ()
    images: tuple[tuple[str, str], ...] = ()  # (camera, column)
    tolerance_s: float = 0.0  # LeRobot: seconds that a time stamp may be off; 0: a tenth of a frame
    split_tasks: bool = False  # LeRobot: an episode in which the task changes becomes one of each task


STANDARD = Columns()


@dataclasses.dataclass(frozen=True)
class EpisodeRef:
    """One episode that a source lists, before its arrays are read."""

    number: int  # the source's own
    name: str  # as the source calls it: "demo_3", "episode 7"
    task: str  # RoboCasa's name of the task; where the source tells none, the instruction
    span: tuple[int, int] | None = None  # control steps start … stop of it; None: all of it


@dataclasses.dataclass(frozen=True)
class RawEpisode:
    """One demonstration of N control steps, raw units; frames only of every `stride`-th step."""

    images: dict[str, np.ndarray]  # camera -> uint8 [ceil(N / stride), H, W, 3], upright
    state: np.ndarray  # [N, state_dim], parts in the order of `orders.STATE_PARTS` where the source names them
    actions: np.ndarray  # [N, action_dim], parts in the order of `orders.ACTION_PARTS` where the source names them
    instruction: str


class Source(Protocol):
    """A file or directory of demonstrations."""

    path: pathlib.Path
    episodes: tuple[EpisodeRef, ...]
    cameras: tuple[str, ...]
    action_dim: int
    state_dim: int
    fps: float | None  # control steps a second; None: the source does not say
    order: str  # what was done to the parts of actions and state, in words
    frames: tuple[str, ...]  # how each camera's are stored: "front: video, h264, 640×480"
    pictures: tuple[str, ...]  # columns that look like frames, but whose names are not read
    flaws: tuple[str, ...]  # one line for each damage that concerns no listed episode

    def facts(self) -> dict[str, Any]:
        """Its identity as JSON: path, format, version, counts, checksum."""

    def read(
        self, episode: EpisodeRef, cameras: Sequence[str], stride: int, instruction: str | None = None
    ) -> RawEpisode:
        """The arrays of one episode.

        Args:
            instruction: replaces the source's own, which may then be missing.

        Raises:
            BadData: they cannot be read or do not fit together.
        """


def need(module: str, package: str, path: pathlib.Path) -> Any:
    """Imports a module of the extra `data`.

    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError(f"reading {path} needs the package {package}: pip install 'z1-jax[data]'") from None


@contextlib.contextmanager
def reading(what: str) -> Iterator[None]:
    """Turns any exception while `what` is read into BadData, since a damaged file may break a reader anywhere.

    Raises:
        BadData: one line with the error's type. A UserError keeps its own words.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise BadData(f"{what} cannot be read ({type(error).__name__}: {first_line(error)}); get it anew") from error


def checksum(paths: Iterable[pathlib.Path]) -> str:
    """SHA-256 of the files' sizes and contents; of a file above 2 MiB only its first and last MiB count."""
    digest = hashlib.sha256()
    for path in paths:
        size = path.stat().st_size
        digest.update(size.to_bytes(8, "little"))
        with path.open("rb") as file:
            if size <= 2 * ENDS_BYTES:
                digest.update(file.read())
            else:
                digest.update(file.read(ENDS_BYTES))
                file.seek(-ENDS_BYTES, 2)
                digest.update(file.read())
    return digest.hexdigest()


def check_length(where: str, what: str, got: int, expected: int) -> None:
    """Refuses a column that is not as long as the episode.

    Raises:
        BadData: names it.
    """
    if got != expected:
        raise BadData(f"{where}: {what} has {got} steps, expected the {expected} of its actions")
