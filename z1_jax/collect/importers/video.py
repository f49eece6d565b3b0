"""Reads the frames of an episode from a video file.

The presentation time at which the tables let the episode begin gives its first frame. The others follow in order of
presentation, one for each row. So neither a start offset, nor frames stored out of order, nor times rounded to the
container's ticks, nor a rate of 29.97 instead of 30 moves a frame to another step. The tables are checked against the
file first, and an episode that could begin at either of two frames is refused.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from z1_jax.collect.importers.base import BadData, need
from z1_jax.errors import first_line

_RATE_TOLERANCE = 0.01  # relative, and half a frame: containers round rates and times
_HALF = 0.5 + 1e-3  # of a frame: nearer to one frame than to any other; time stamps are float32


@dataclasses.dataclass(frozen=True)
class Stretch:
    """One episode's part of a video file, by the tables."""

    episode: int
    length: int  # rows
    start_s: float
    stop_s: float | None = None  # None: the tables do not say


@dataclasses.dataclass(frozen=True)
class VideoPlace:
    """Where the frames of an episode lie."""

    file: str  # relative to the dataset
    own: Stretch
    every: tuple[Stretch, ...]  # all episodes of the file, `own` among them
    complete: bool  # whether the tables list all of the dataset's episodes


@dataclasses.dataclass(frozen=True)
class Video:
    """The presentation times of a video file's frames."""

    path: pathlib.Path
    ticks: np.ndarray  # int64 [frames], rising
    tick_s: float

    @property
    def times(self) -> np.ndarray:
        """Seconds, [frames]."""
        return self.ticks * self.tick_s


def read_frames(
    root: pathlib.Path, place: VideoPlace, first_s: float, fps: float, stride: int, span: tuple[int, int] | None = None
) -> np.ndarray:
    """Frames 0, stride, 2 stride, … of an episode, or of the steps `span` of it: uint8 [n, H, W, 3].

    All of its frames must be there; only the wanted ones are converted to RGB.

    Args:
        root: the dataset's directory.
        first_s: time stamp of the episode's first row.
        fps: rows a second.

    Raises:
        BadData: the file is missing, damaged, of another frame rate, lacks frames, or disagrees with the tables.
    """
    path, where = root / place.file, f"{root}, episode {place.own.episode}"
    if not path.is_file():
        raise BadData(f"{where}: the video {path} is missing; get it anew")
    av = need("av", "av", path)
    try:
        facts = path.stat()
        video = _open(path, facts.st_size, facts.st_mtime_ns)
        first = first_frame(video, place, first_s, fps, where)
        start, stop = span or (0, place.own.length)
        return _decode(video, first, place.own.length, range(start, stop, stride), where)
    except BadData:
        raise
    except (av.FFmpegError, OSError, IndexError, TypeError, ValueError) as error:
        raise BadData(f"{where}: the video {path} cannot be decoded ({first_line(error)}); get it anew") from None


@functools.lru_cache(maxsize=16)  # the cameras' files of the episodes that follow
def _open(path: pathlib.Path, size: int, modified_ns: int) -> Video:
    """Reads the presentation times from the packets; nothing is decoded."""
    with need("av", "av", path).open(str(path)) as container:
        stream = container.streams.video[0]
        ticks = [packet.pts for packet in container.demux(stream) if packet.size and not packet.is_discard]
        return Video(path, np.sort(np.array(ticks, np.int64)), float(stream.time_base))


def first_frame(video: Video, place: VideoPlace, first_s: float, fps: float, where: str) -> int:
    """Number of the episode's first frame, counted from 0 in order of presentation.

    If the episodes' lengths add up to the frames of the file, the number follows from the lengths, and the time must
    agree. Otherwise the time decides. It can be read in three ways, which must give the same frame: as the file's own
    time, counted from the file's first frame, and as a number of frames at the table's rate.

    Raises:
        BadData: the tables and the file disagree.
    """
    frames, length = len(video.ticks), place.own.length
    _check_rate(video, fps, where)
    _check_stretch(video, place.own, first_s, fps, where)
    start_s = place.own.start_s + first_s
    found = _readings(video, start_s, fps)
    if len(place.every) == 1 and place.complete:
        first = frames - length
        if first not in found:
            _check_end(video, place, min(found), where)
            expected = f"{length} rows" if start_s * fps < 0.5 else f"{length} rows that begin at {start_s:g} s"
            raise BadData(
                f"{where}: the video {video.path} holds {frames} frames for {expected}, expected "
                f"{round(start_s * fps) + length}: where the others belong is not told"
            )
    elif sum(stretch.length for stretch in place.every) == frames:
        numbers = _numbers_in_full(video, place, fps)
        first = min(numbers)
        if first not in found or len(numbers) > 1:
            expected = " or ".join(f"{n}, {n / fps:g} s" for n in sorted(numbers))
            taken = " or ".join(map(str, sorted(numbers)))
            raise BadData(
                f"{where}: from_timestamp in meta/episodes and time stamps begin at {start_s:g} s of {video.path}, "
                f"expected frame {expected}: the file has exactly the {frames} frames of its "
                f"{len(place.every)} episodes, and those before this one take up {taken}"
            )
    else:
        _check_end(video, place, min(found), where)
        _check_neighbours(video, place, fps, where)
        if len(found) > 1:
            raise BadData(
                f"{where}: its frames begin at {start_s:g} s of {video.path}, which may be frame "
                f"{' or '.join(map(str, sorted(found)))}: the file begins at {video.times[0]:g} s and has "
                f"{_rate(video.times):.6g} frames a second, expected 0 s and {fps:g}"
            )
        (first,) = found
    _check_even(video.times[first : first + length], first, fps, video, where)
    return first


def _readings(video: Video, second: float, fps: float) -> set[int]:
    """The frames that a time of the tables may mean, in the three ways that `first_frame` lists."""
    found = {round(second * fps)}
    for times in (video.times, video.times - video.times[0]):
        if times[0] - _HALF / fps <= second <= times[-1] + _HALF / fps:
            found.add(int(np.abs(times - second).argmin()))
    return found


def _numbers_in_full(video: Video, place: VideoPlace, fps: float) -> set[int]:
    """The first frame of `own` in a file that has exactly the frames of its episodes, in order of time or of number.

    The order that agrees with more of the episodes' times is taken, so that one wrong time affects its episode alone.
    Two numbers: both orders agree with as many.
    """
    best, least = set[int](), len(place.every) + 1
    for key in (lambda s: (s.start_s, s.episode), lambda s: s.episode):
        order: Sequence[Stretch] = sorted(place.every, key=key)
        before = [0, *itertools.accumulate(stretch.length for stretch in order)]
        off = sum(n not in _readings(video, s.start_s, fps) for s, n in zip(order, before, strict=False))
        if off <= least:
            best = {*(best if off == least else ()), before[order.index(place.own)]}
            least = off
    return best


def _check_end(video: Video, place: VideoPlace, first: int, where: str) -> None:
    frames, length = len(video.ticks), place.own.length
    if frames < first + length:
        there = max(frames - first, 0)
        raise BadData(f"{where}: the video {video.path} ends after {there} of {length} frames; get it anew")


def _check_rate(video: Video, fps: float, where: str) -> None:
    if not len(video.ticks):
        raise BadData(f"{where}: the video {video.path} holds no frames; get it anew")
    steps = np.diff(video.times)
    even = steps[np.abs(steps - np.median(steps)) < np.median(steps) / 2]  # holes are told of the episodes they are in
    if len(even) and abs(even.mean() * fps - 1) > _RATE_TOLERANCE + 0.5 / len(even):
        raise BadData(f"{where}: the video {video.path} has {1 / even.mean():g} frames a second, its dataset {fps:g}")


def _check_stretch(video: Video, own: Stretch, first_s: float, fps: float, where: str) -> None:
    """Checks that from_timestamp to to_timestamp is as long as the rows."""
    if own.stop_s is None:
        return
    wanted = first_s * fps + own.length
    # Writers take it from the rows or from the video, whose rate may be slightly another.
    over = min(((own.stop_s - own.start_s) * rate - wanted for rate in (fps, _rate(video.times))), key=abs)
    told = f"from_timestamp {own.start_s:g} to to_timestamp {own.stop_s:g} s in meta/episodes"
    if over < -_HALF:
        begin_s = own.start_s + first_s
        raise BadData(
            f"{where}: its time stamps want frames from {begin_s:g} to {begin_s + own.length / fps:g} s of "
            f"{video.path}, expected them within {told}"
        )
    if over > _HALF:
        raise BadData(f"{where}: {told} is {wanted + over:.4g} frames of {video.path}, expected {wanted:.4g}")


def _check_neighbours(video: Video, place: VideoPlace, fps: float, where: str) -> None:
    """Checks that no other episode has the same frames, and that the file ends where the last episode does."""
    path, frames = video.path, len(video.ticks)
    begin_s, end_s = _span(place.own, fps)
    expected, before_s = 0, 0.0
    for other in sorted(place.every, key=lambda stretch: stretch.start_s):
        its_begin_s, its_end_s = _span(other, fps)
        if other is not place.own and min(end_s, its_end_s) - max(begin_s, its_begin_s) > 0.5 / fps:
            raise BadData(
                f"{where}: meta/episodes gives it {begin_s:g} to {end_s:g} s of {path}, and episode {other.episode} "
                f"{its_begin_s:g} to {its_end_s:g} s; expected frames of its own"
            )
        expected += round((its_begin_s - before_s) * fps) + other.length
        before_s = its_end_s
    if frames < expected or (place.complete and frames > expected):
        raise BadData(
            f"{where}: the video {path} holds {frames} frames, expected the {expected} of its {len(place.every)} "
            f"episodes: where {'some are missing' if frames < expected else 'the others belong'} is not told"
        )


def _span(stretch: Stretch, fps: float) -> tuple[float, float]:
    """(begin, end) in seconds."""
    stop_s = stretch.stop_s
    return stretch.start_s, stretch.start_s + stretch.length / fps if stop_s is None else stop_s


def _check_even(times: np.ndarray, first: int, fps: float, video: Video, where: str) -> None:
    """Checks that no frame was dropped or doubled, and that the rate is the same over the whole episode."""
    steps = np.diff(times)
    if not len(steps):
        return
    worst = int(np.abs(steps * fps - 1).argmax())
    if abs(steps[worst] * fps - 1) >= 0.5:
        raise BadData(
            f"{where}: frame {first + worst + 1} of {video.path} is shown {steps[worst]:.4g} s after the one before, "
            f"expected {1 / fps:.4g} s: frames are missing or doubled"
        )
    if abs(steps.mean() * fps - 1) > _RATE_TOLERANCE + 0.5 / len(steps):
        raise BadData(
            f"{where}: the video {video.path} has {1 / steps.mean():g} frames a second in this episode, its dataset "
            f"{fps:g}"
        )


def _rate(times: np.ndarray) -> float:
    span = float(times[-1] - times[0])
    return (len(times) - 1) / span if span > 0 else np.inf


def _decode(video: Video, first: int, length: int, wanted: range, where: str) -> np.ndarray:
    """The `wanted` ones of the `length` frames from `first` on. All are decoded, so that damage in any is found."""
    numbers = {int(tick): number for number, tick in enumerate(video.ticks[first : first + length])}
    for sought in (True, False) if first else (False,):  # a seek that lands behind the frame: from the start
        frames, seen = _decode_from(video, int(video.ticks[first]) if sought else None, numbers, wanted)
        if seen == length:
            return np.stack([frames[number] for number in wanted])
    raise BadData(f"{where}: the video {video.path}: {seen} of {length} frames can be decoded; get it anew")


def _decode_from(
    video: Video, tick: int | None, numbers: dict[int, int], wanted: range
) -> tuple[dict[int, np.ndarray], int]:
    frames: dict[int, np.ndarray] = {}
    seen, last = 0, max(numbers)
    with need("av", "av", video.path).open(str(video.path)) as container:
        stream: Any = container.streams.video[0]
        stream.thread_type = "AUTO"
        if tick is not None:
            container.seek(tick, stream=stream)
        for frame in container.decode(stream):
            number = numbers.get(frame.pts)
            if number is not None:
                seen += 1
                if number in wanted:
                    frames[number] = frame.to_ndarray(format="rgb24")
            if frame.pts >= last:
                break
    return frames, seen
