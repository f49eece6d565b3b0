"""Turns the names that other programs give to PyTorch arrays into those that `arrays` knows.

Wrappers put words before or into the names; transformers renamed PaliGemma's parts in 4.52.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

from z1_jax.convert.store import FormatError

LEROBOT_PREFIX = "model."
# Wrappers of modules that add their own name to those of the arrays: DataParallel and DDP, torch.compile, FSDP,
# activation checkpointing.
_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
_BEFORE = ("module.", LEROBOT_PREFIX)  # only where every name begins so
_PALIGEMMA = "paligemma_with_expert.paligemma."
_OLDER = (  # of transformers before 4.52 -> since
    (f"{_PALIGEMMA}language_model.model.", f"{_PALIGEMMA}model.language_model."),
    (f"{_PALIGEMMA}language_model.lm_head.", f"{_PALIGEMMA}lm_head."),
    (f"{_PALIGEMMA}vision_tower.", f"{_PALIGEMMA}model.vision_tower."),
    (f"{_PALIGEMMA}multi_modal_projector.", f"{_PALIGEMMA}model.multi_modal_projector."),
)


@dataclasses.dataclass(frozen=True)
class PlainNames:
    """What `plain_names` found.

    Attributes:
        stored: name that `arrays` knows -> name in the file.
        lerobot: whether LeRobot's prefix stood before the names.
        notes: what was done, in words; empty for files as openpi and LeRobot write them.
    """

    stored: Mapping[str, str]
    lerobot: bool
    notes: tuple[str, ...]


def plain_names(names: Iterable[str]) -> PlainNames:
    """The names without wrappers and prefixes, and as transformers has them since 4.52.

    Raises:
        FormatError: two arrays would have the same name.
    """
    stored = {name: name for name in names}
    taken: list[str] = []
    lerobot = False
    for wrapper in _WRAPPERS:
        if any(wrapper in name for name in stored):
            taken.append(wrapper)
            stored = _renamed(stored, {name: name.replace(wrapper, "") for name in stored})
    while stored and (prefix := next((p for p in _BEFORE if all(name.startswith(p) for name in stored)), None)):
        stored = _renamed(stored, {name: name.removeprefix(prefix) for name in stored})
        lerobot |= prefix == LEROBOT_PREFIX
        taken += [prefix] * (prefix != LEROBOT_PREFIX)
    notes = [f"names: {' and '.join(taken)} taken away"] * bool(taken)
    new = {name: _newer(name) for name in stored}
    if any(name != newer for name, newer in new.items()):
        stored = _renamed(stored, new)
        notes.append("names: those of transformers before 4.52")
    return PlainNames(stored, lerobot, tuple(notes))


def _newer(name: str) -> str:
    for old, new in _OLDER:
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def _renamed(stored: Mapping[str, str], new: Mapping[str, str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, original in stored.items():
        if new[name] in found:
            raise FormatError(
                f"the arrays {found[new[name]]} and {original} are both {new[name]}; expected one of each name"
            )
        found[new[name]] = original
    return found
