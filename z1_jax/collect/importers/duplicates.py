"""Finds episodes that occur twice: a copied file, a dataset beside its copy, the same demonstrations in two formats."""

from __future__ import annotations

import hashlib

import numpy as np
from PIL import Image

from z1_jax.collect.importers.base import BadData
from z1_jax.data.journal import JournaledEpisode

_FRAMES, _SIDE = 4, 8  # of an episode and camera that are compared; pixels of their thumbnails
_SAME_LEVELS = 6.0  # of 255 on average: what compression changes. Scenes that were rendered anew differ by more


class Duplicates:
    """Finds an episode with the same numbers, instruction and nearly the same frames as an earlier one."""

    def __init__(self) -> None:
        self._known: dict[bytes, list[tuple[str, np.ndarray]]] = {}  # digest -> (where, thumbnails)

    def check(self, episode: JournaledEpisode, where: str) -> None:
        """
        Raises:
            BadData: names the earlier one.
        """
        frames = _thumbnails(episode)
        for earlier, known in self._known.get(_digest(episode), []):
            if known.shape == frames.shape and np.abs(known - frames).mean() <= _SAME_LEVELS:
                raise BadData(
                    f"{where} is a copy of {earlier} (same actions, states, frames and words), expected another "
                    "episode; --keep-duplicates imports it again"
                )

    def add(self, episode: JournaledEpisode, where: str) -> None:
        """Remembers an episode of the dataset."""
        self._known.setdefault(_digest(episode), []).append((where, _thumbnails(episode)))


def _digest(episode: JournaledEpisode) -> bytes:
    """Hash of what every format stores exactly. The instruction counts: some datasets are relabelled in other words."""
    digest = hashlib.sha256(f"{episode.control_steps} {episode.instruction}".encode())
    for values in (episode.state, episode.actions):
        digest.update(np.ascontiguousarray(values, np.float32).tobytes())
    return digest.digest()


def _thumbnails(episode: JournaledEpisode) -> np.ndarray:
    """Grey levels [cameras, frames, 8, 8] of a few frames."""
    chosen = np.unique(np.linspace(0, len(episode.state) - 1, _FRAMES).astype(int))
    return np.array(
        [
            [
                np.asarray(Image.fromarray(frames[i]).convert("L").resize((_SIDE, _SIDE), Image.Resampling.BOX))
                for i in chosen
            ]
            for _, frames in sorted(episode.images.items())
        ],
        np.float32,
    )
