"""From the arrays of one raw episode to the decisions that a dataset holds: checks, strides, chunks and resizing."""

from __future__ import annotations

import dataclasses

import numpy as np

from z1_jax.collect.importers.base import BadData, EpisodeRef, RawEpisode, Source, reading
from z1_jax.data.journal import JournaledEpisode
from z1_jax.data.transforms import parse_image, resize_with_pad


@dataclasses.dataclass(frozen=True)
class Shapes:
    """What every episode of one dataset shares."""

    cameras: tuple[str, ...]
    action_dim: int
    state_dim: int
    stride: int  # control steps between decisions
    chunk: int  # control steps of a decision's action chunk
    image_size: int  # pixels of the stored square frames; 0: as the source has them


def read_episode(
    source: Source, episode: EpisodeRef, number: int, shapes: Shapes, instruction: str | None = None
) -> JournaledEpisode:
    """The episode as decisions. Where it ends within a chunk, its last action is repeated.

    Args:
        number: recorded where simulated episodes have their seed.
        instruction: replaces the source's own.

    Raises:
        BadData: it cannot be read, is empty, has other widths, or holds numbers that are not finite.
    """
    where = f"{source.path}, {episode.name}"
    with reading(where):
        raw = source.read(episode, shapes.cameras, shapes.stride, instruction)
    _check(raw, where, shapes)
    steps = np.arange(0, len(raw.actions), shapes.stride)
    following = np.minimum(steps[:, None] + np.arange(shapes.chunk), len(raw.actions) - 1)
    return JournaledEpisode(
        task=episode.task,
        seed=number,
        instruction=raw.instruction,
        success=True,  # demonstrations are published as such
        control_steps=len(raw.actions),
        images={camera: _frames(raw.images[camera], f"{where}, {camera}", shapes) for camera in shapes.cameras},
        state=raw.state[steps].astype(np.float32),
        actions=raw.actions[following].astype(np.float32),
    )


def _check(raw: RawEpisode, where: str, shapes: Shapes) -> None:
    if not len(raw.actions):
        raise BadData(f"{where} is empty; expected at least one step")
    for name, values, width in (("actions", raw.actions, shapes.action_dim), ("state", raw.state, shapes.state_dim)):
        if values.ndim != 2 or values.shape[1] != width:
            raise BadData(f"{where}: {name} have shape {list(values.shape)}, expected [steps, {width}] as its fellows")
        if len(values) != len(raw.actions):
            raise BadData(f"{where}: {name} have {len(values)} steps, its actions {len(raw.actions)}")
        if values.dtype.kind not in "fiu":
            raise BadData(f"{where}: {name} are {values.dtype}, expected numbers")
        with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite
            bad = np.flatnonzero(~np.isfinite(values.astype(np.float32)).all(axis=1))
        if len(bad):
            raise BadData(f"{where}: {name} not finite at step {bad[0]} ({len(bad)} of {len(values)} steps are bad)")
    if not raw.instruction.strip():
        raise BadData(f"{where} has an empty instruction")


def _frames(frames: np.ndarray, where: str, shapes: Shapes) -> np.ndarray:
    try:
        parsed = [parse_image(frame) for frame in frames]
    except ValueError as error:
        raise BadData(f"{where}: {error}") from None
    size = shapes.image_size
    return np.stack([resize_with_pad(frame, size, size) for frame in parsed] if size else parsed)
