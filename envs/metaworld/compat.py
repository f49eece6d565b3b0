"""Finds Meta-World as pip installs it. Only `load` imports it, and with it a simulator."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
from typing import Any

PACKAGE = "metaworld"
INSTALL = "pip install 'z1-jax[metaworld]' in an environment of its own (docs/metaworld.md)"
GENERATION = 3  # of Meta-World: its tasks are named …-v3
_WELD = 11  # numbers that Meta-World writes for each weld


def version() -> str:
    """The installed package's version, without importing it.

    Raises:
        ValueError: it is not installed, or of another generation; one line that says what to do.
    """
    try:
        found = importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError as error:
        raise ValueError(f"Meta-World ({PACKAGE}) is not installed: {INSTALL}") from error
    if int(found.partition(".")[0]) != GENERATION:
        raise ValueError(f"got {PACKAGE} {found}, expected {GENERATION}.…: {INSTALL}")
    return found


def versions() -> dict[str, str]:
    """What success and physics depend on besides this project: package name → version, without importing them."""
    return {PACKAGE: version()} | {name: importlib.metadata.version(name) for name in ("mujoco", "numpy")}


def check_mujoco() -> None:
    """Refuses a MuJoCo that Meta-World's own code cannot set its welds in: 3.3 to 3.8 were seen to work.

    Raises:
        ValueError: the installed one is newer; one line that says what to do.
    """
    import mujoco

    if mujoco.mjNEQDATA != _WELD:
        raise ValueError(
            f"Meta-World {version()} does not run under MuJoCo {mujoco.__version__}, whose welds hold "
            f"{mujoco.mjNEQDATA} numbers instead of {_WELD}: pip install mujoco==3.3.0"
        )


@functools.cache
def load() -> tuple[Any, Any]:
    """(task's name → its environment's class, task's name → its scripted expert's class).

    Raises:
        ValueError: as `version` and `check_mujoco`, or the package is there and cannot be imported.
    """
    found = version()
    check_mujoco()
    try:
        tasks = importlib.import_module("metaworld.env_dict").ALL_V3_ENVIRONMENTS
        experts = importlib.import_module("metaworld.policies").ENV_POLICY_MAP
    except ImportError as error:
        raise ValueError(f"Meta-World {found} cannot be imported ({error}): {INSTALL}") from error
    return tasks, experts
