"""Reads JSON files of other projects and refuses keys that are not known."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from z1_jax.convert.store import FormatError


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """A JSON object. Raises FormatError."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise FormatError(f"{path} cannot be read as JSON ({error})") from None
    if not isinstance(content, dict):
        raise FormatError(f"{path} holds a {type(content).__name__}; expected a JSON object")
    return content


def read_count(path: pathlib.Path, values: Mapping[str, Any], key: str, least: int = 1) -> int:
    """A whole number of at least `least`. Raises FormatError."""
    value = values.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise FormatError(f"{path}: {key} is {value!r}; expected a whole number of at least {least}")
    return value


class Ignored:
    """The keys that the user declares to be without effect. No other unknown key is accepted."""

    def __init__(self, names: Iterable[str] = ()):
        self._names = tuple(names)
        self._met: set[str] = set()

    def check(self, path: pathlib.Path, names: Iterable[str], known: Collection[str], within: str = "") -> None:
        """Raises FormatError when a name is neither known nor ignored; `within` stands before the ignored name."""
        unknown = [within + name for name in names if name not in known]
        self._met |= set(unknown) & set(self._names)
        left = [name for name in unknown if name not in self._names]
        if left:
            raise FormatError(
                f"{path} has {', '.join(left)}, which may change what the policy computes and is not known here; "
                f"if it changes nothing, say so: --ignore={','.join([*self._names, *left])}"
            )

    def finish(self) -> list[str]:
        """The names that were ignored. Raises FormatError when one was not met."""
        idle = [name for name in self._names if name not in self._met]
        if idle:
            raise FormatError(f"--ignore names {', '.join(idle)}, which is known or not there; leave it out")
        return sorted(self._met)
