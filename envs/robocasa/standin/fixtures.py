"""Fixtures of RoboCasa 1.0.1 made of primitives."""

import pathlib
from collections.abc import Iterator


def models(assets: pathlib.Path) -> Iterator[tuple[pathlib.PurePosixPath, str]]:
    yield from ()
