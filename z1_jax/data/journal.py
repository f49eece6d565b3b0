"""Episodes that were collected so far, in one append-only file: an interrupted collection goes on where it stopped.

Each entry carries its length and checksum; what a kill left half written at the end is cut off and collected again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import pathlib
import struct
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from z1_jax.data.dataset import Episode
from z1_jax.errors import UserError
from z1_jax.files import lock

_HEADER = struct.Struct("<QI")  # bytes of the payload, its CRC-32
_FACTS = ("task", "seed", "instruction", "success", "control_steps")


@dataclasses.dataclass(frozen=True)
class JournaledEpisode:
    """An episode as read back; see `z1_jax.data.dataset.Episode`."""

    task: str
    seed: int
    instruction: str
    success: bool
    control_steps: int
    images: dict[str, np.ndarray]
    state: np.ndarray
    actions: np.ndarray


class EpisodeJournal:
    """The journal at `path`, made when it is missing.

    Args:
        source: what makes the episodes (JSON); all of one journal have the same.

    Attributes:
        tried: episodes in the journal.
        kept: those of them that succeeded; only these keep their arrays.

    Raises:
        UserError: the file belongs to another source, or is no journal.
    """

    def __init__(self, path: pathlib.Path, source: Mapping[str, Any]):
        self.path = pathlib.Path(path)
        self.tried = self.kept = 0
        head = json.dumps(dict(source), sort_keys=True).encode()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.touch()
            self._file = self.path.open("r+b")
        except OSError as error:
            raise UserError(f"{self.path} cannot be written ({error.strerror}); collect elsewhere") from error
        try:
            self._resume(head)
        except BaseException:
            self._file.close()
            raise

    def _resume(self, head: bytes) -> None:
        """Counts what is there and stands behind it."""
        lock(self._file, self.path)
        end, other = 0, b""
        for number, (end, payload) in enumerate(self._entries()):  # noqa: B007 - the last `end` is used below
            if number and other:
                raise UserError(
                    f"{self.path} holds episodes of an earlier command with {_difference_of_heads(other, head)}; give "
                    "that command again, delete the file, or collect elsewhere"
                )
            if number:
                self.tried += 1
                self.kept += _facts(payload)["success"]
            elif payload != head:
                other = payload
        if other:  # an earlier command that stopped before its first episode: nothing is lost
            self._file.truncate(0)
            self._file.seek(0)
            self._write(head)
            return
        if end == 0 and not _entry(head).startswith(self.path.read_bytes()[:1000]):
            raise UserError(f"{self.path} is no journal of episodes; move it away, or collect elsewhere")
        self._file.truncate(end)
        self._file.seek(end)
        if end == 0:
            self._write(head)

    def episodes(self) -> Iterator[JournaledEpisode]:
        """The successful episodes, in the order of their collection."""
        for number, (_, payload) in enumerate(self._entries()):
            if number and _facts(payload)["success"]:
                yield _unpack(payload)

    def append(self, episode: Episode) -> None:
        """Adds an episode; it is on its way to the disk when this returns."""
        self._write(_pack(episode))
        self.tried += 1
        self.kept += bool(episode.success)

    def leave_out(self, reason: str) -> None:
        """Notes an episode that is not wanted for a reason worth a line; it counts as tried."""
        self._write(json.dumps({"success": False, "left_out": reason}).encode() + b"\n")
        self.tried += 1

    def left_out(self) -> list[str]:
        """The reasons given to `leave_out`, in order."""
        facts = [_facts(payload) for number, (_, payload) in enumerate(self._entries()) if number]
        return [entry["left_out"] for entry in facts if "left_out" in entry]

    def close(self) -> None:
        with contextlib.suppress(OSError):  # every write was flushed, or its failure told
            self._file.close()

    def remove(self) -> None:
        """Deletes the file: the dataset that it was for is written."""
        self.close()
        self.path.unlink()

    def __enter__(self) -> EpisodeJournal:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _write(self, payload: bytes) -> None:
        try:
            self._file.write(_entry(payload))
            self._file.flush()
        except OSError as error:
            raise UserError(
                f"{self.path} cannot be written ({error.strerror}); what it holds stays, and the same command goes on"
            ) from error

    def _entries(self) -> Iterator[tuple[int, bytes]]:
        """(end, payload) of each whole entry; stops at the first that is not."""
        whole = self.path.stat().st_size
        with self.path.open("rb") as file:
            while len(header := file.read(_HEADER.size)) == _HEADER.size:
                size, checksum = _HEADER.unpack(header)
                payload = file.read(min(size, whole))  # of what is no entry the size may be anything
                if len(payload) != size or zlib.crc32(payload) != checksum:
                    return
                yield file.tell(), payload


def _entry(payload: bytes) -> bytes:
    return _HEADER.pack(len(payload), zlib.crc32(payload)) + payload


def difference(got: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """The first difference between a source and the wanted one, in words; empty if there is none."""
    for key, value in wanted.items():
        if got.get(key) != value:
            return f"{key} {got.get(key)!r:.200}, asked for {value!r:.200}"
    return ""


def _difference_of_heads(theirs: bytes, mine: bytes) -> str:
    try:
        return difference(json.loads(theirs), json.loads(mine)) or "another source"
    except (ValueError, AttributeError):
        return "another source"


def _pack(episode: Episode) -> bytes:
    """One line of JSON; after it, for a success, the compressed arrays."""
    facts = {name: getattr(episode, name) for name in _FACTS}
    facts |= {"seed": int(episode.seed), "success": bool(episode.success), "control_steps": int(episode.control_steps)}
    line = json.dumps(facts).encode() + b"\n"
    if not episode.success:
        return line
    out = io.BytesIO()
    images: dict[str, Any] = {f"images/{camera}": frames for camera, frames in episode.images.items()}
    np.savez(out, state=episode.state, actions=episode.actions, **images)
    return line + zlib.compress(out.getvalue(), level=1)


def _facts(payload: bytes) -> dict[str, Any]:
    return json.loads(payload[: payload.index(b"\n")])


def _unpack(payload: bytes) -> JournaledEpisode:
    packed = payload[payload.index(b"\n") + 1 :]
    with np.load(io.BytesIO(zlib.decompress(packed)), allow_pickle=False) as arrays:
        images = {name.removeprefix("images/"): arrays[name] for name in arrays if name.startswith("images/")}
        return JournaledEpisode(**_facts(payload), images=images, state=arrays["state"], actions=arrays["actions"])
