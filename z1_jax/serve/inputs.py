"""Turns messages into observations and back, by a table of keys for each kind of client.

The tables are those of openpi's example clients. Knows no policy and no socket.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from envs.base import EnvObservation
from z1_jax.errors import UserError
from z1_jax.serve import aloha
from z1_jax.serve.wire import MessageError

OPTIONAL = ("noise_seed", "previous_actions", "delay", "age_ms")


@dataclasses.dataclass(frozen=True)
class InputTable:
    """The keys of a client's observations; a key "a/b" is the literal one, as openpi's clients send it."""

    name: str
    state: tuple[tuple[str, int | None], ...]  # keys whose values make up the state, and their widths; None: any
    cameras: tuple[str, ...] = ()  # of the slots: base, left wrist, right wrist; empty: as the policy calls them
    unused: tuple[str, ...] = ()  # cameras that the client sends and that no slot sees, as in openpi
    nested: bool = False  # images are in a dict under "images", channels first or last
    adapt_to_pi: bool = False  # states and actions are ALOHA's, the policy's are those of π0's pretraining


TABLES = {
    table.name: table
    for table in (
        # Ours: {"state": …, "images": {camera: …}, "prompt": …}
        InputTable("z1", (("state", None),), nested=True),
        # openpi's examples/libero, src/openpi/policies/libero_policy.py
        InputTable("libero", (("observation/state", 8),), ("observation/image", "observation/wrist_image")),
        # openpi's examples/droid, src/openpi/policies/droid_policy.py
        InputTable(
            "droid",
            (("observation/joint_position", 7), ("observation/gripper_position", 1)),
            ("observation/exterior_image_1_left", "observation/wrist_image_left"),
        ),
        # openpi's examples/aloha_sim and aloha_real with adapt_to_pi=False, src/openpi/policies/aloha_policy.py
        InputTable(
            "aloha",
            (("state", 14),),
            ("cam_high", "cam_left_wrist", "cam_right_wrist"),
            unused=("cam_low",),
            nested=True,
        ),
    )
}
TABLES["aloha_pi"] = dataclasses.replace(TABLES["aloha"], name="aloha_pi", adapt_to_pi=True)  # openpi's default


@dataclasses.dataclass(frozen=True)
class Asked:
    """What one message asks for."""

    observation: EnvObservation
    noise: tuple[int, ...] | None  # None: the server draws
    previous: np.ndarray | None  # float [L, action_dim], raw
    delay: int
    age_s: float  # of the observation when it was sent, by the client's clock


class Inputs:
    """A table with the cameras of a policy: reads messages (in the server) and writes them (in evaluations)."""

    def __init__(self, table: str, slots: Sequence[str | None], state_dim: int, prompt: str = ""):
        """Args:
        table: a name of TABLES.
        slots: the policy's camera of each slot; None: no camera.
        state_dim: width of the policy's state.
        prompt: the instruction where a message has none; empty: it must have one.

        Raises:
            UserError: the table does not exist, or its robot is not the policy's.
        """
        if table not in TABLES:
            raise UserError(f"inputs {table!r} do not exist, expected one of {', '.join(TABLES)}")
        self.table, self.prompt = TABLES[table], prompt
        self._widths = {key: width or state_dim for key, width in self.table.state}
        if (width := sum(self._widths.values())) != state_dim:
            raise UserError(
                f"inputs {table}: the client's state has width {width}, the policy's {state_dim}; "
                "choose the inputs of the robot that the policy was trained for"
            )
        used = [slot for slot, camera in enumerate(slots) if camera]
        if self.table.cameras and (missing := [slots[slot] for slot in used if slot >= len(self.table.cameras)]):
            raise UserError(
                f"inputs {table}: the client has no camera for {missing[0]}, which the policy sees in slot "
                f"{slots.index(missing[0])}; expected a policy of the slots 0 … {len(self.table.cameras) - 1}"
            )
        # policy's camera -> client's key
        self.cameras = {str(slots[slot]): self._key(slots[slot], slot) for slot in used}
        self.unseen = tuple(key for key in self.table.cameras if key not in self.cameras.values()) + self.table.unused

    def _key(self, camera: str | None, slot: int) -> str:
        return self.table.cameras[slot] if self.table.cameras else str(camera)

    @property
    def keys(self) -> list[str]:
        """The keys of an observation, cameras in a dict as images/CAMERA."""
        cameras = [f"images/{key}" if self.table.nested else key for key in self.cameras.values()]
        return [*self._widths, *cameras, "prompt"]

    def read(self, message: Any) -> Asked:
        """The observation and options of a message.

        Raises:
            MessageError: a key is missing or not known, or a value is of another kind.
        """
        if not isinstance(message, dict):
            raise MessageError(f"is a {type(message).__name__}; expected a dict of {', '.join(self.keys)}")
        images = self._mapping(message, "images") if self.table.nested else message
        self._check_names(message, images)
        state = [self._state(message, key, width) for key, width in self._widths.items()]
        prompt = message.get("prompt", self.prompt)
        if not isinstance(prompt, str) or not prompt.strip():
            raise MessageError(f"has prompt {str(prompt)[:40]!r}; expected the instruction, a text")
        pictures = {camera: self._image(images, key) for camera, key in self.cameras.items()}
        noise = message.get("noise_seed")
        return Asked(
            EnvObservation(pictures, self._policy_state(np.concatenate(state)), prompt),
            None if noise is None else _numbers("noise_seed", noise),
            self._previous(message.get("previous_actions")),
            _number("delay", message.get("delay", 0)),
            _seconds("age_ms", message.get("age_ms", 0)),
        )

    def answer(self, actions: Float[np.ndarray, "H D"]) -> np.ndarray:
        """The policy's actions as the client takes them."""
        return aloha.client_actions(actions) if self.table.adapt_to_pi else actions

    def write(self, observation: EnvObservation) -> dict[str, Any]:
        """The message of an observation, without options."""
        pictures = {key: observation.images[camera] for camera, key in self.cameras.items()}
        parts = np.split(np.asarray(observation.state), np.cumsum(list(self._widths.values()))[:-1])
        values: dict[str, Any] = dict(zip(self._widths, parts, strict=True))
        values |= {"images": pictures} if self.table.nested else pictures
        return {**values, "prompt": observation.instruction}

    def _check_names(self, message: Mapping[str, Any], images: Mapping[str, Any]) -> None:
        """Refuses unknown keys, so that a misspelt option is not ignored."""
        cameras = {*self.cameras.values(), *self.unseen}
        known = {*self._widths, "prompt", *OPTIONAL}
        known |= {"images"} if self.table.nested else cameras
        unknown = [key for key in message if key not in known]
        unknown += [key for key in images if key not in cameras] if self.table.nested else []
        if unknown:
            raise MessageError(
                f"has key {str(unknown[0])[:60]!r}, which inputs {self.table.name} do not know; expected "
                f"{', '.join(self.keys)}, and optionally {', '.join(OPTIONAL)}"
            )
        for key in self.cameras.values():
            if key not in images:
                raise MessageError(f"lacks the image {key!r}; expected {', '.join(self.keys)}")

    def _policy_state(self, state: np.ndarray) -> np.ndarray:
        return aloha.policy_state(state) if self.table.adapt_to_pi else state

    def _previous(self, value: Any) -> np.ndarray | None:
        if value is None:
            return None
        actions = _matrix("previous_actions", value)
        if not self.table.adapt_to_pi:
            return actions
        if actions.shape[1] != 14:
            raise MessageError(f"has previous_actions of width {actions.shape[1]}; expected 14")
        return aloha.policy_actions(actions)

    @staticmethod
    def _mapping(message: Mapping[str, Any], key: str) -> Mapping[str, Any]:
        value = message.get(key)
        if not isinstance(value, dict):
            raise MessageError(f"has {key} of type {type(value).__name__}; expected a dict of images by camera")
        return value

    def _state(self, message: Mapping[str, Any], key: str, width: int) -> np.ndarray:
        if key not in message:
            raise MessageError(f"lacks {key!r}; expected {', '.join(self.keys)}")
        value = _floats(key, message[key])
        if value.ndim == 0 and width == 1:
            value = value[None]
        if value.shape != (width,):
            raise MessageError(f"has {key} of shape {list(value.shape)}; expected [{width}]")
        return value

    @staticmethod
    def _image(images: Mapping[str, Any], key: str) -> np.ndarray:
        if not isinstance(images[key], np.ndarray):
            raise MessageError(f"has {key} of type {type(images[key]).__name__}; expected an image, an array")
        return images[key]


def _number(key: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise MessageError(f"has {key} {str(value)[:40]!r}; expected a whole number")
    return int(value)


def _numbers(key: str, value: Any) -> tuple[int, ...]:
    values = list(value) if isinstance(value, (list, tuple, np.ndarray)) and np.ndim(value) == 1 else [value]
    return tuple(_number(key, one) for one in values)


def _seconds(key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, np.number)) or not 0 <= value < 1e9:
        raise MessageError(f"has {key} {str(value)[:40]!r}; expected milliseconds, 0 or more")
    return float(value) / 1000


def _matrix(key: str, value: Any) -> Float[np.ndarray, "L D"]:
    found = _floats(key, value)
    if found.ndim != 2:
        raise MessageError(f"has {key} of shape {list(found.shape)}; expected [steps, action_dim]")
    return found


def _floats(key: str, value: Any) -> np.ndarray:
    try:
        found = np.asarray(value)
    except ValueError:  # rows of several lengths
        found = np.asarray(None)
    if found.dtype.kind not in "fiu":
        raise MessageError(f"has {key} {str(value)[:40]!r}; expected numbers")
    return found.astype(np.float64)
