"""Between an environment's raw units and the model's inputs and outputs: resize, tokenise, normalise, pad.

NumPy in and out. Knows no dataset and no model, and of an environment only what an observation holds.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
from jaxtyping import Float, Shaped
from PIL import Image

from z1_jax.data.normalize import NormMode, NormStats
from z1_jax.data.relative import RelativeActions
from z1_jax.data.tokenizer import PromptTokenizer
from z1_jax.types import Observation


class RawObservation(Protocol):
    """What the policy sees, in the environment's units (see `envs.base.EnvObservation`)."""

    @property
    def images(self) -> Mapping[str, np.ndarray]: ...  # camera -> [H, W, 3] or [3, H, W]; see `parse_image`

    @property
    def state(self) -> np.ndarray: ...  # [state_dim]

    @property
    def instruction(self) -> str: ...


def parse_image(image: Shaped[np.ndarray, "_ _ _"]) -> np.ndarray:
    """uint8 [h, w, 3] of an image of any kind: channels first or last, integers 0..255 or floats 0..1 (LeRobot's).

    Floats are scaled by 255 and truncated, as in openpi.

    Raises:
        ValueError: another shape, or values out of range.
    """
    image = np.asarray(image)
    if image.ndim != 3 or 0 in image.shape or 3 not in (image.shape[0], image.shape[-1]):
        got = f"{image.dtype} {list(image.shape)}"
        raise ValueError(f"image is {got}; expected [height, width, 3] or [3, height, width]")
    if image.shape[-1] != 3:
        image = image.transpose(1, 2, 0)
    if image.dtype == np.uint8:
        return image
    highest, kind = (1.0, "0..1") if np.issubdtype(image.dtype, np.floating) else (255, "0..255")
    if image.dtype.kind not in "fui" or not (image.min() >= 0 and image.max() <= highest):
        raise ValueError(
            f"image is {image.dtype} with values {image.min()}..{image.max()}; expected {kind} "
            "(uint8 or integers 0..255, floats 0..1)"
        )
    return (image * 255 if highest == 1.0 else image).astype(np.uint8)


def resize_with_pad(image: Shaped[np.ndarray, "h w 3"], height: int, width: int) -> np.ndarray:
    """[h, w, 3] to [height, width, 3]: bilinear, aspect kept, centred on black.

    uint8 0..255 gives openpi-client's pixels; float32 in [-1, 1] those of openpi's model, black being -1. An image that
    already fits is returned as it is.

    Raises:
        ValueError: the image has another dtype or shape.
    """
    if image.dtype not in (np.uint8, np.float32) or image.ndim != 3 or image.shape[-1] != 3 or 0 in image.shape:
        raise ValueError(
            f"image is {image.dtype} {list(image.shape)}; expected uint8 or float32 in [-1, 1], [height, width, 3]"
        )
    if image.shape[:2] == (height, width):
        return image
    ratio = max(image.shape[1] / width, image.shape[0] / height)
    size = max(1, int(image.shape[1] / ratio)), max(1, int(image.shape[0] / ratio))
    top, left = (height - size[1]) // 2, (width - size[0]) // 2
    black = 0 if image.dtype == np.uint8 else -1
    out = np.full((height, width, 3), black, image.dtype)
    out[top : top + size[1], left : left + size[0]] = _resize(image, size)
    return out


def _resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    bilinear = Image.Resampling.BILINEAR
    if image.dtype == np.uint8:
        return np.asarray(Image.fromarray(image).resize(size, bilinear))
    channels = [Image.fromarray(np.ascontiguousarray(image[..., c])).resize(size, bilinear) for c in range(3)]
    return np.clip(np.stack([np.asarray(channel) for channel in channels], axis=-1), -1.0, 1.0)


@dataclasses.dataclass(frozen=True)
class InputProcessor:
    """All that stands between an environment and the model; the same object serves SFT, RL, evaluation and serving.

    Raises:
        ValueError: the statistics lack a key, the environment's actions are wider than the model's, or an action is
            relative to a state that has fewer dimensions.
    """

    tokenizer: PromptTokenizer
    stats: Mapping[str, NormStats]  # keys "state" and "actions", raw units; of relative actions: of the offsets
    cameras: tuple[str | None, ...]  # environment camera of each slot (base, left wrist, right wrist); None: missing
    image_size: int  # pixels, S
    action_dim: int  # A: the model's width, at least the environment's
    norm_mode: NormMode = "quantile"
    state_in_prompt: bool = True
    clip: tuple[float, float] | None = None  # bounds of a raw action, where the environment has them
    prompt_state_dim: int | None = None  # width that the state in the prompt is padded to (as LeRobot does)
    relative: RelativeActions | None = None  # what the model predicts as offsets from the state

    def __post_init__(self) -> None:
        missing = {"state", "actions"} - set(self.stats)
        if missing:
            raise ValueError(f"normalisation statistics lack {sorted(missing)}; got {sorted(self.stats)}")
        if self.env_action_dim > self.action_dim:
            raise ValueError(
                f"action_dim={self.action_dim} is less than the actions' width {self.env_action_dim}; raise it"
            )
        if not any(self.cameras):
            raise ValueError(f"cameras={self.cameras!r} names no camera; expected at least one")
        if self.relative:
            self.relative.check(self.env_action_dim, self.stats["state"].dim)

    @property
    def env_action_dim(self) -> int:
        return self.stats["actions"].dim

    @property
    def prompt_length(self) -> int:
        return self.tokenizer.prompt_length

    @property
    def used_slots(self) -> tuple[int, ...]:
        """The slots with a camera: those that the arrays hold.

        openpi fills the others with black and masks them: that changes no action, and costs a pass of the vision tower.
        """
        return tuple(slot for slot, camera in enumerate(self.cameras) if camera)

    @property
    def moved_slots(self) -> tuple[int, ...]:
        """Places in the arrays whose images augmentation crops and rotates: the base camera's, if there is one."""
        return tuple(place for place, slot in enumerate(self.used_slots) if slot == 0)

    @functools.cached_property
    def counted_dims(self) -> np.ndarray:
        """bool [A]: dimensions that are real and move in the data; RL gives noise and log-probability to these only."""
        return np.pad(~self.stats["actions"].constant, (0, self.action_dim - self.env_action_dim))

    def observation(self, raw: Sequence[RawObservation]) -> Observation:
        """Model inputs of a batch of raw observations; the arrays are NumPy, the images uint8, one for each used slot.

        Raises:
            ValueError: a camera is missing or its image unusable, or a state has the wrong width or is not finite.
        """
        cameras = [self.cameras[slot] for slot in self.used_slots]
        images = np.empty((len(raw), len(cameras), self.image_size, self.image_size, 3), np.uint8)
        for row, observation in zip(images, raw, strict=True):
            for place, camera in enumerate(cameras):
                row[place] = self._image(observation.images, camera)
        tokens, token_mask = self.prompts([o.instruction for o in raw], np.stack([o.state for o in raw]))
        return Observation(images, np.ones(images.shape[:2], bool), tokens, token_mask)

    def prompts(self, instructions: Sequence[str], states: Float[np.ndarray, "B D"]) -> tuple[np.ndarray, np.ndarray]:
        """(tokens int32 [B, L], mask bool [B, L]) of instructions [B] and raw states [B, state_dim]."""
        if not self.state_in_prompt:
            return self.tokenizer.encode_batch(instructions, None)
        # Binned in double precision: rounding to float32 first would move values over the edge of a bin.
        values = self._normalised_states(states)
        padding = max(0, (self.prompt_state_dim or 0) - values.shape[1])
        return self.tokenizer.encode_batch(instructions, np.pad(values, ((0, 0), (0, padding))))

    def model_states(self, states: Float[np.ndarray, "B D"]) -> np.ndarray:
        """Raw states [B, state_dim] normalised, float32.

        Raises:
            ValueError: wrong width, or a value that is not finite.
        """
        return self._normalised_states(states).astype(np.float32)

    def _normalised_states(self, states: np.ndarray) -> np.ndarray:
        expected = self.stats["state"].dim
        if states.ndim != 2 or states.shape[1] != expected:
            raise ValueError(
                f"states have shape {list(states.shape)}; expected [batch, {expected}] as in the statistics"
            )
        if not np.isfinite(states).all():
            raise ValueError(f"states of rows {np.flatnonzero(~np.isfinite(states).all(1)).tolist()} are not finite")
        return self.stats["state"].normalise(states, self.norm_mode)

    def model_actions(
        self, raw: Float[np.ndarray, "*N H A_env"], states: Float[np.ndarray, "*N D"] | None = None
    ) -> np.ndarray:
        """Raw actions [..., H, A_env] normalised and padded with zeros: float32 [..., H, A].

        Args:
            states: raw [..., state_dim], which the policy sees before each chunk; needed where actions are relative.

        Raises:
            ValueError: another width, or the states are needed and not given.
        """
        if raw.shape[-1] != self.env_action_dim:
            raise ValueError(f"actions have width {raw.shape[-1]}; expected {self.env_action_dim} as in the statistics")
        if self.relative:
            raw = self.relative.offsets(raw, _needed(states))
        out = np.zeros((*raw.shape[:-1], self.action_dim), np.float32)
        out[..., : self.env_action_dim] = self.stats["actions"].normalise(raw, self.norm_mode)
        return out

    def env_actions(
        self, actions: Float[np.ndarray, "*N H A"], states: Float[np.ndarray, "*N D"] | None = None
    ) -> np.ndarray:
        """The model's actions [..., H, A] in raw units: float32 [..., H, A_env]; constant ones are held.

        Args:
            states: raw [..., state_dim], which the policy saw; needed where actions are relative.

        Raises:
            ValueError: the states are needed and not given.
        """
        real = np.asarray(actions, np.float64)[..., : self.env_action_dim]
        out = self.stats["actions"].unnormalise(real, self.norm_mode)
        if self.relative:
            out = self.relative.targets(out, _needed(states))
        return (out if self.clip is None else np.clip(out, *self.clip)).astype(np.float32)

    def _image(self, images: Mapping[str, np.ndarray], camera: str) -> np.ndarray:
        if camera not in images:
            raise ValueError(
                f"observation has no camera {camera!r}; got {sorted(images)}; name one of these, or None for no camera"
            )
        try:
            return resize_with_pad(parse_image(images[camera]), self.image_size, self.image_size)
        except ValueError as error:
            raise ValueError(f"camera {camera!r}: {error}") from None


def _needed(states: np.ndarray | None) -> np.ndarray:
    if states is None:
        raise ValueError("this policy's actions are relative to the state: give the raw states that it sees")
    return states
