"""Options that name the columns of demonstrations. An import and a check take the same ones."""

from __future__ import annotations

import argparse
import pathlib

from z1_jax.collect.importers.base import Columns
from z1_jax.collect.importers.instructions import Instructions, read_instructions
from z1_jax.config.command_line import Parser


def add_columns(parser: Parser) -> None:
    """Adds the options."""
    add = parser.add_argument
    add("--state", default="", metavar="COLUMNS", help="its columns; several are joined in this order (as the format "
        "has them)")  # fmt: skip
    add("--actions", default="", metavar="COLUMNS", help="the same of the actions")
    add("--images", default="", metavar="CAMERA:COLUMN,…", help="where each camera's frames are (all, by the columns' "
        "names)")  # fmt: skip
    add("--instruction", default="", metavar="TEXT", help="of every episode, instead of the source's own")
    add("--instructions", type=pathlib.Path, metavar="TABLE", help="JSON or CSV: an episode's name or number, and text")
    add("--task-changes", choices=("refuse", "split"), default="refuse", help="of LeRobot episodes whose task changes: "
        "an error, or an episode of each part (%(default)s)")  # fmt: skip
    add("--tolerance-s", type=float, default=0.0, metavar="SECONDS", help="that LeRobot's time stamps may be off (a "
        "tenth of a frame)")  # fmt: skip


def read_columns(given: argparse.Namespace, parser: Parser) -> tuple[Columns, Instructions]:
    """What the options say.

    Raises:
        ConfigError: a value is malformed or out of range.
        UserError: the table of instructions cannot be read.
    """
    if not 0 <= given.tolerance_s < 10:
        parser.error(f"argument --tolerance-s: got {given.tolerance_s:g}, expected 0 or more seconds, less than 10")
    columns = Columns(
        names(given.state),
        names(given.actions),
        _named_images(given.images, parser),
        given.tolerance_s,
        given.task_changes == "split",
    )
    return columns, read_instructions(given.instruction, given.instructions)


def names(text: str) -> tuple[str, ...]:
    """The names between commas."""
    return tuple(filter(None, text.split(",")))


def _named_images(text: str, parser: Parser) -> tuple[tuple[str, str], ...]:
    """(camera, column) of each "camera:column"."""
    pairs = [name.partition(":") for name in names(text)]
    for camera, _, column in pairs:
        if not camera or not column:
            parser.error(f"argument --images: got {camera or text}, expected CAMERA:COLUMN such as front:front_image")
    found = {camera: column for camera, _, column in pairs}
    if len(found) != len(pairs):
        parser.error(f"argument --images: got {text}, expected each camera once")
    return tuple(found.items())
