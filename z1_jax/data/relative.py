"""Actions that a policy predicts as offsets from the state: openpi's DeltaActions and AbsoluteActions, LeRobot's
relative_actions_processor and absolute_actions_processor.

What is outside the policy (datasets, environments) stays absolute. NumPy in and out; knows no file and no model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float


@dataclasses.dataclass(frozen=True)
class RelativeActions:
    """The dimensions of an action that are predicted as offsets from the same dimensions of the raw state.

    All actions of a chunk are relative to the one state that the policy saw before it.

    Raises:
        ValueError: no dimension is relative, or the names are too few.
    """

    mask: tuple[bool, ...]  # dimensions beyond it are absolute
    names: tuple[str, ...] = ()  # of the action's dimensions, where the source of the policy names them

    def __post_init__(self) -> None:
        if not any(self.mask):
            raise ValueError("relative actions: no dimension is relative; leave the setting out")
        if self.names and len(self.names) < len(self.mask):
            raise ValueError(f"relative actions: {len(self.names)} names for {len(self.mask)} dimensions")

    @property
    def dims(self) -> tuple[int, ...]:
        """The relative dimensions."""
        return tuple(dim for dim, relative in enumerate(self.mask) if relative)

    def offsets(self, actions: Float[np.ndarray, "*N H A"], states: Float[np.ndarray, "*N S"]) -> np.ndarray:
        """Absolute actions [..., H, A] as the policy predicts them, for raw states [..., S]: float64."""
        return self._moved(actions, states, -1.0)

    def targets(self, actions: Float[np.ndarray, "*N H A"], states: Float[np.ndarray, "*N S"]) -> np.ndarray:
        """The inverse of `offsets`: what the environment takes."""
        return self._moved(actions, states, 1.0)

    def _moved(self, actions: np.ndarray, states: np.ndarray, sign: float) -> np.ndarray:
        dims = list(self.dims)
        self.check(actions.shape[-1], states.shape[-1])
        out = np.array(actions, np.float64)
        out[..., dims] += sign * np.asarray(states, np.float64)[..., None, dims]
        return out

    def check(self, action_dim: int, state_dim: int) -> None:
        """Raises ValueError where an action or a state of these widths has not all of the relative dimensions."""
        for name, width in (("actions", action_dim), ("states", state_dim)):
            if self.dims[-1] >= width:
                raise ValueError(f"action dimension {self.dims[-1]} is relative to the state, but {name} have {width}")

    def to_json(self) -> dict[str, Any]:
        return {"mask": list(self.mask), "names": list(self.names)}

    @property
    def words(self) -> str:
        """For a person: which dimensions."""
        return f"action dimensions {_ranges(self.dims)} are offsets from the state"


def relative_from_json(values: Mapping[str, Any] | None) -> RelativeActions | None:
    """What `to_json` made; None for a policy with absolute actions. Raises KeyError, TypeError or ValueError."""
    if not values:
        return None
    return RelativeActions(tuple(bool(x) for x in values["mask"]), tuple(str(x) for x in values.get("names", ())))


def parse_relative(counts: Sequence[str]) -> RelativeActions | None:
    """From openpi's way to write a mask: "6,-1" is six relative dimensions, then an absolute one; empty: None.

    Raises:
        ValueError: not such numbers, or no dimension is relative.
    """
    try:
        numbers = [int(count) for count in counts]
    except ValueError:
        raise ValueError(
            f"{','.join(counts)!r} is no mask of dimensions; expected numbers such as 6,-1: six relative, one absolute"
        ) from None
    mask = tuple(relative for number in numbers for relative in [number > 0] * abs(number))
    return RelativeActions(mask) if numbers else None


def _ranges(dims: Sequence[int]) -> str:
    """0..3, 5 for 0, 1, 2, 3, 5."""
    parts: list[list[int]] = []
    for dim in dims:
        if parts and dim == parts[-1][1] + 1:
            parts[-1][1] = dim
        else:
            parts.append([dim, dim])
    return ", ".join(str(a) if a == b else f"{a}..{b}" for a, b in parts)
