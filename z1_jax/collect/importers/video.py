"""Frames of an episode out of a video file, found by their time stamps."""

from __future__ import annotations

import pathlib

import numpy as np

from z1_jax.collect.importers.base import BadData, need
from z1_jax.errors import first_line

_RATE_TOLERANCE = 0.01  # relative: containers round frame rates


def read_frames(
    path: pathlib.Path, where: str, fps: float, steps: int, stride: int, start_s: float = 0.0
) -> np.ndarray:
    """Frames 0, stride, 2 stride, … of the `steps` frames that begin at `start_s`: uint8 [n, H, W, 3].

    All `steps` frames must be there; only the wanted ones are converted to RGB.

    Raises:
        BadData: the file is missing, damaged, of another frame rate, or lacks frames. `where` names the episode.
    """
    av = need("av", "av", path)
    if not path.is_file():
        raise BadData(f"{where}: the video {path} is missing; get it anew")
    frames: dict[int, np.ndarray] = {}
    seen = 0
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            rate = float(stream.average_rate or 0)
            if abs(rate - fps) > _RATE_TOLERANCE * fps:
                raise BadData(f"{where}: the video {path} has {rate:g} frames a second, its dataset {fps:g}")
            if start_s:
                container.seek(int(start_s / stream.time_base), stream=stream)
            for frame in container.decode(stream):
                index = round((float(frame.pts * stream.time_base) - start_s) * fps)
                if index >= steps:
                    break
                if index < 0:
                    continue  # between the key frame that was sought and the episode
                seen += index == seen
                if index % stride == 0:
                    frames[index] = frame.to_ndarray(format="rgb24")
    except BadData:
        raise
    except (av.FFmpegError, OSError, IndexError, TypeError, ValueError) as error:
        raise BadData(f"{where}: the video {path} cannot be decoded ({first_line(error)}); get it anew") from None
    if seen != steps:
        raise BadData(f"{where}: the video {path} ends after {seen} of {steps} frames; get it anew")
    return np.stack([frames[index] for index in range(0, steps, stride)])
