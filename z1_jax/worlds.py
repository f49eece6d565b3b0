"""What a dataset, an environment and a policy say of the world that they are of, and in what two of them differ.

Facts in, lines out: knows no file, no suite and no simulator.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from z1_jax.data.normalize import NormStats

MUST_AGREE = ("task", "rate", "images")  # what cannot be right where it differs; pictures only of a policy
_SAME_RATE = 0.01  # of a rate: cameras of 29.97 and 30 Hz are the same
_SHOWN = 3  # examples in a line
_WIDER = 10.0  # times the span of a policy: its labels would reach as far beyond -1..1
_FULL = 1.0 + 1e-3  # actions beyond this are outside [-1, 1]
_FAINT = 0.01  # actions that stay within this share of [-1, 1] are in other units
_STILL = 100.0  # how many of its negligible spreads a dimension that never moves may be away


@dataclasses.dataclass(frozen=True)
class World:
    """What one of the three says; what is empty or None it does not say, and is not compared."""

    name: str  # in a line, e.g. "the dataset data/drawer"
    tasks: tuple[str, ...] = ()
    other_names: tuple[str, ...] = ()  # of the same tasks
    instructions: tuple[str, ...] = ()  # as the robot is told; of an environment those of a few episodes
    rate: float | None = None  # control steps a second
    executed: int | None = None  # steps of each chunk that a policy runs before it looks again
    images: Mapping[str, tuple[int, int] | None] = dataclasses.field(default_factory=dict)  # camera -> (height, width)
    stats: Mapping[str, NormStats] = dataclasses.field(default_factory=dict)  # of "state" and "actions", raw units
    offsets: bool = False  # of a policy: "actions" are offsets from the state, which are compared with nothing
    states: np.ndarray | None = None  # of an environment: [n, state_dim], at the start of a few episodes


@dataclasses.dataclass(frozen=True)
class Difference:
    """One thing in which two worlds differ."""

    kind: str  # task, instruction, rate, executed, cameras, images, actions, state
    line: str


def differences(one: World, other: World) -> list[Difference]:
    """In what `one` (a dataset or a policy) and `other` (an environment or a policy) differ, each a line."""
    found = (
        ("task", _tasks(one, other)),
        ("instruction", _instructions(one, other)),
        ("rate", _rates(one, other)),
        ("executed", _executed(one, other)),
        ("cameras", _cameras(one, other)),
        ("images", _images(one, other)),
        ("actions", _actions(one, other)),
        ("state", _states(one, other)),
    )
    return [Difference(kind, f"{kind}: {line}") for kind, line in found if line]


def _tasks(one: World, other: World) -> str:
    names, others = ({*world.tasks, *world.other_names} for world in (one, other))
    if not names or not others or names & others:
        return ""
    nameless = any(world.tasks and set(world.tasks) <= set(world.instructions) for world in (one, other))
    if nameless and _words(one) & _words(other):  # its tasks are known by their instructions alone
        return ""
    return f"{one.name} has {_few(one.tasks)}, {other.name} {_few(other.tasks)}"


def _words(world: World) -> set[str]:
    """The instructions as the tokenizer takes them."""
    return {text.strip().replace("_", " ").replace("\n", " ") for text in world.instructions}


def _instructions(one: World, other: World) -> str:
    words, others = _words(one), _words(other)
    if not words or not others or words & others:
        return ""
    told, also = (_few([repr(text) for text in sorted(texts)]) for texts in (words, others))
    return f"{one.name} says {told}, {other.name} {also}: the words of the one never meet those of the other"


def _rates(one: World, other: World) -> str:
    if not one.rate or not other.rate or abs(one.rate - other.rate) <= _SAME_RATE * other.rate:
        return ""
    return f"{one.name} has {one.rate:g} control steps a second, {other.name} {other.rate:g}"


def _executed(one: World, other: World) -> str:
    if not one.executed or not other.executed or one.executed == other.executed:
        return ""
    return f"{one.name} runs {one.executed} steps of each chunk before it looks again, {other.name} {other.executed}"


def _cameras(one: World, other: World) -> str:
    if not one.images or not other.images or set(one.images) == set(other.images):
        return ""
    parts = []
    for has, lacks in ((one, other), (other, one)):
        if names := [camera for camera in has.images if camera not in lacks.images]:
            parts.append(f"{has.name} has {_few(names)}, {lacks.name} does not")
    return "; ".join(parts)


def _images(one: World, other: World) -> str:
    for camera, size in one.images.items():
        theirs = other.images.get(camera)
        if size and theirs and size != theirs:
            shown, expected = ("×".join(map(str, pixels)) for pixels in (size, theirs))
            return f"{one.name} has frames of {shown} ({camera}), {other.name} of {expected}"
    return ""


def _actions(one: World, other: World) -> str:
    """Against [-1, 1], the environments' interface, or against the actions of a policy."""
    ours, theirs = one.stats.get("actions"), other.stats.get("actions")
    if ours is None or one.offsets or other.offsets:
        return ""
    if theirs is not None:
        return _ranges(one.name, ours, other.name, theirs)
    reach = np.maximum(np.abs(ours.q01), np.abs(ours.q99))
    wide = np.flatnonzero(reach > _FULL)
    faint = np.flatnonzero((reach < _FAINT) & ~ours.constant)
    parts = []
    if wide.size:
        parts.append(f"{one.name} has {_spans(wide, ours)}, {other.name} takes -1..1 and cuts off what is beyond")
    if faint.size:
        parts.append(f"{one.name} has {_spans(faint, ours)}, less than {_FAINT:.0%} of the -1..1 of {other.name}")
    return "; ".join(parts)


def _states(one: World, other: World) -> str:
    ours, theirs = one.stats.get("state"), other.stats.get("state")
    if ours is None:
        return ""
    if theirs is not None:
        return _ranges(one.name, ours, other.name, theirs)
    if other.states is None or other.states.shape[-1] != ours.dim:
        return ""
    low, high = other.states.min(axis=0), other.states.max(axis=0)
    apart = np.flatnonzero(_apart(ours, low, high))
    if not apart.size:
        return ""
    return f"{one.name} has {_spans(apart, ours)}, {other.name} starts at {_bounds(apart, low, high)}"


def _ranges(name: str, ours: NormStats, other: str, theirs: NormStats) -> str:
    """Dimensions that lie apart, or go far beyond the other's range, or are held constant there and move here."""
    if ours.dim != theirs.dim:
        return ""
    apart = _apart(ours, theirs.q01, theirs.q99) & _apart(theirs, ours.q01, ours.q99)
    beyond = np.where(theirs.constant, ~ours.constant, ours.span > _WIDER * theirs.span)
    dims = np.flatnonzero(apart | beyond)
    return f"{name} has {_spans(dims, ours)}, {other} {_bounds(dims, theirs.q01, theirs.q99)}" * bool(dims.size)


def _apart(stats: NormStats, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """bool [D]: [low, high] lies further from the data's 98 % than these are wide."""
    margin = np.where(stats.constant, _STILL * stats.negligible, stats.span)
    return (low > stats.q99 + margin) | (high < stats.q01 - margin)


def _spans(dims: np.ndarray, stats: NormStats) -> str:
    return _bounds(dims, stats.q01, stats.q99)


def _bounds(dims: np.ndarray, low: np.ndarray, high: np.ndarray) -> str:
    return _few([f"{low[dim]:.3g}..{high[dim]:.3g} (dimension {dim})" for dim in dims])


def _few(values: Iterable[str]) -> str:
    values = list(values)
    return ", ".join(values[:_SHOWN]) + f" and {len(values) - _SHOWN} more" * (len(values) > _SHOWN)


def must_agree(found: Sequence[Difference], allowed: Sequence[str], pictures: bool = True) -> list[str]:
    """Kinds of differences that cannot be right and are not allowed.

    Args:
        pictures: they must be of one size: a policy saw no other; a dataset's are brought to the model's size.
    """
    kinds = {difference.kind for difference in found if pictures or difference.kind != "images"}
    return [kind for kind in MUST_AGREE if kind in kinds and kind not in allowed]
