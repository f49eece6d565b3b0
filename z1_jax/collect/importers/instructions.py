"""Instructions that a user gives for demonstrations: one for all, or a table of one an episode."""

from __future__ import annotations

import csv
import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any

from z1_jax.errors import UserError, first_line

Place = tuple[pathlib.Path, str, int]  # a source's path, an episode's name in it, its number


@dataclasses.dataclass(frozen=True)
class Instructions:
    """The instructions that a user gave. Where they are empty, the source's own count."""

    everywhere: str = ""
    # (episode, text): demo_3, episode 7 or a number, behind FILE/ where several sources have episodes of that name.
    table: tuple[tuple[str, str], ...] = ()
    path: str = ""  # of the table

    def of(self, source: pathlib.Path, name: str, number: int) -> str | None:
        """The text for an episode; None: the source's own."""
        texts = dict(self.table)
        for key in _keys(source, name, number):
            if key in texts:
                return texts[key]
        return self.everywhere or None

    def check(self, places: Sequence[Place]) -> None:
        """Checks that every line of the table names exactly one imported episode.

        Raises:
            UserError: a line names none, or several.
        """
        found: dict[str, set[Place]] = {}
        for place in places:
            for key in _keys(*place):
                found.setdefault(key, set()).add((place[0], "", place[2]))  # parts of an episode are one
        for key, _ in self.table:
            if key not in found:
                known = ", ".join(name for _, name, _ in places[:4]) + ", …" * (len(places) > 4)
                raise UserError(
                    f"option --instructions: {self.path} names {key!r}, which is not imported; there: {known}"
                )
            if len(found[key]) > 1:
                first, second = sorted(place[0].name for place in found[key])[:2]
                raise UserError(
                    f"option --instructions: {self.path} names {key!r}, and {first} and {second} both have it; write "
                    f"{first}/{key}"
                )

    def to_json(self) -> dict[str, Any]:
        """For the manifest."""
        return {"everywhere": self.everywhere, "table": [list(line) for line in self.table]}


OWN = Instructions()


def _keys(source: pathlib.Path, name: str, number: int) -> list[str]:
    """The names under which a table may list an episode, the most specific first."""
    short = [name, name.partition(",")[0], str(number)]  # a part of an episode, then the whole
    return [f"{place}/{key}" for place in (source.name, source.stem) for key in short] + short


def read_instructions(everywhere: str, path: pathlib.Path | None) -> Instructions:
    """Both options, --instruction and --instructions, as one value.

    Raises:
        UserError: the table cannot be read, has an episode twice, or a text is empty.
    """
    if path is None:
        return Instructions(everywhere)
    try:
        lines = _json(path) if path.suffix.lower() == ".json" else _csv(path)
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(
            f"option --instructions: {path} cannot be read ({first_line(error)}); expected JSON such as "
            '{"demo_0": "open the drawer"}, or CSV lines of episode,instruction'
        ) from None
    keys = [key for key, _ in lines]
    if twice := [key for key in keys if keys.count(key) > 1]:
        raise UserError(f"option --instructions: {path} names {twice[0]!r} twice, expected once")
    if empty := [key for key, text in lines if not text.strip()]:
        raise UserError(f"option --instructions: {path} has no text for {empty[0]!r}")
    return Instructions(everywhere, tuple(lines), str(path))


def _json(path: pathlib.Path) -> list[tuple[str, str]]:
    content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=list)
    if not isinstance(content, list) or not all(isinstance(x, tuple) and isinstance(x[1], str) for x in content):
        raise ValueError("it is no object of texts")
    return [(str(key), text) for key, text in content]


def _csv(path: pathlib.Path) -> list[tuple[str, str]]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = [row for row in csv.reader(file) if row]
    if rows and [cell.strip().lower() for cell in rows[0]] in (["episode", "instruction"], ["episode", "task"]):
        rows = rows[1:]
    if wrong := [row for row in rows if len(row) != 2]:
        raise ValueError(f"the line {wrong[0]} has {len(wrong[0])} columns")
    return [(key.strip(), text.strip()) for key, text in rows]
