"""Short animated images of episodes, through Pillow: WebP where it can, GIF otherwise."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from PIL import Image

HOLD_MS = 1000  # the last frame stays, so that a viewer sees how the episode ended before it starts again


def write_video(path: str | os.PathLike, frames: np.ndarray, fps: float) -> Path:
    """Writes an endlessly repeating animation.

    Args:
      path: ends in .webp or .gif; its folder is created.
      frames: uint8 [N, height, width, 3], RGB, N >= 1.
      fps: frames a second of playback.

    Raises:
      ValueError: for another suffix, shape or type, or fps <= 0.
    """
    path, frames = Path(path), np.asarray(frames)
    suffix = path.suffix.lower()
    if suffix not in (".webp", ".gif"):
        raise ValueError(f"{path}: cannot write {path.suffix or 'a file without suffix'}: expected .webp or .gif")
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or not len(frames):
        raise ValueError(f"frames are {frames.dtype} {frames.shape}: expected uint8 [N, height, width, 3] with N >= 1")
    if not fps > 0:
        raise ValueError(f"got fps={fps}: expected a positive number, such as 20")
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [Image.fromarray(frame) for frame in frames]
    durations = [round(1000 / fps)] * (len(images) - 1) + [HOLD_MS]
    options = {"quality": 80, "method": 4} if suffix == ".webp" else {"optimize": True}
    aside = path.with_name(f"{path.stem}.partial{path.suffix}")  # a kill must leave no half video under the name
    images[0].save(aside, save_all=True, append_images=images[1:], duration=durations, loop=0, **options)
    os.replace(aside, path)
    return path
