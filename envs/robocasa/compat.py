"""Finds RoboCasa, version 0.2 or 1.0.1, and makes it run beside PyPI's robosuite and today's MuJoCo and NumPy.

Differences between versions are found by signatures, never by version numbers. `find` and `check` import nothing, so
that a main process can tell what is missing before any worker starts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import importlib.machinery
import importlib.metadata
import importlib.util
import inspect
import io
import logging
import os
import pathlib
import re
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable
from typing import Any

from envs.robocasa import parsing

INSTALL = (
    "pip install -e '.[robocasa]' && pip install --no-deps rlinf-robocasa365==1.0.1 robosuite==1.5.2 "
    "(v0.2, and why: docs/robocasa.md)"
)
NEEDED = (
    "robosuite",
    "mujoco",
    "numba",
    "cv2",
    "gymnasium",
    "h5py",
    "imageio",
    "lxml",
    "scipy",
    "termcolor",
    "tqdm",
    "yaml",
)
# Folders of models/assets that only the download fills; a file of this pattern is in each that is complete.
_ASSETS = {
    "v0.2": {"textures": "*.png", "objects/objaverse": "model.xml", "objects/aigen_objs": "model.xml"},
    "v1": {"textures": "*.png", "objects/objaverse": "model.xml", "objects/lightwheel": "model.xml"},
}


@dataclasses.dataclass(frozen=True)
class Installation:
    """The RoboCasa that `import robocasa` would find."""

    api: str  # "v0.2" or "v1": which of the two interfaces it has
    version: str  # the package's own version, e.g. "1.0.1"
    root: pathlib.Path  # folder of the package

    @property
    def assets(self) -> pathlib.Path:
        """Where textures, meshes and objects belong."""
        elsewhere = os.environ.get("ROBOCASA_ASSETS_PATH") if self.api == "v1" else None
        return pathlib.Path(elsewhere) if elsewhere else self.root / "models" / "assets"

    def missing_assets(self) -> list[str]:
        """Asset folders that are absent or empty."""
        return [
            folder
            for folder, pattern in _ASSETS[self.api].items()
            if next((self.assets / folder).rglob(pattern), None) is None
        ]


def find() -> Installation:
    """The installation, without importing it.

    Raises:
        ValueError: RoboCasa or a package that it needs is not installed; one line that says what to install.
    """
    spec = importlib.util.find_spec("robocasa")
    if spec is None or not spec.submodule_search_locations or spec.origin is None:
        raise ValueError(f"RoboCasa is not installed: {INSTALL}")
    absent = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if absent:
        raise ValueError(f"RoboCasa needs {', '.join(absent)}, not installed: {INSTALL}")
    _check_mujoco()
    root = pathlib.Path(spec.origin).parent
    kitchen = root / "environments" / "kitchen"
    apis = {"v1": kitchen / "atomic", "v0.2": kitchen / "single_stage"}
    api = next((api for api, folder in apis.items() if folder.is_dir()), None)
    if api is None:
        raise ValueError(f"{root} is no RoboCasa that is known: expected v0.2 or v1.0.1; {INSTALL}")
    stated = re.search(r'^__version__ = "([^"]+)"', pathlib.Path(spec.origin).read_text(), re.MULTILINE)
    return Installation(api, stated.group(1) if stated else "unknown", root)


def _check_mujoco() -> None:
    """Refuses a mixed MuJoCo: version 4 comes in three packages, and an older one installed over them does not load.

    Raises:
        ValueError: the installation is mixed; one line that says how to mend it.
    """
    have = {name: _version(name) for name in ("mujoco", "mujoco-core")}
    if have["mujoco-core"] and have["mujoco"] and int(have["mujoco"].split(".")[0]) < 4:
        raise ValueError(
            f"MuJoCo {have['mujoco']} lies over parts of {have['mujoco-core']}: pip uninstall -y mujoco mujoco-core "
            f"mujoco-studio && pip install mujoco=={have['mujoco']}"
        )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def check(standins: bool) -> Installation:
    """As `find`, and refuses an installation whose assets were not downloaded, where no stand-ins replace them."""
    found = find()
    missing = [] if standins else found.missing_assets()
    if missing:
        raise ValueError(
            f"RoboCasa {found.version} lacks its assets ({', '.join(missing)} in {found.assets}): "
            f"python {'-O ' if found.api == 'v0.2' else ''}-m robocasa.scripts.download_kitchen_assets (some GB), or "
            "env.standins=true for smoke tests without"
        )
    return found


def versions() -> dict[str, str]:
    """What success and physics depend on besides this project: package name → version, without importing them."""
    found = {"robocasa": find().version}
    return found | {name: importlib.metadata.version(name) for name in ("robosuite", "mujoco", "numpy")}


@functools.cache
def load() -> Installation:
    """Imports RoboCasa with its shims in place; its tasks are then known to `robosuite.make`.

    Raises:
        ValueError: as `find`, or a package is there that cannot be imported or is too old.
    """
    found = find()
    logging.getLogger("robosuite_logs").addFilter(lambda record: record.levelno >= logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # notes on packages that nothing here needs
            importlib.import_module("robosuite")
            _mend_robosuite()
            _import_without_asserts("robocasa", found.root)
            parsing.speed_up()
            _order_regions()
    except ImportError as error:
        raise ValueError(f"RoboCasa {found.version} cannot be imported ({error}): {INSTALL}") from error
    return found


# --- the package's own version checks --------------------------------------------------------------------------------


class _NoAsserts(importlib.machinery.SourceFileLoader):
    """Compiles a module without its assert statements."""

    def get_code(self, fullname: str) -> Any:
        path = self.get_filename(fullname)
        return compile(self.get_data(path), path, "exec", dont_inherit=True, optimize=1)


def _import_without_asserts(name: str, root: pathlib.Path) -> None:
    """Imports a package whose __init__ asserts exact versions of MuJoCo and NumPy.

    Others were seen to work; results name the ones in use (`versions`).
    """
    if name in sys.modules:
        return
    path = str(root / "__init__.py")
    spec = importlib.util.spec_from_file_location(
        name, path, loader=_NoAsserts(name, path), submodule_search_locations=[str(root)]
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise


def _order_regions() -> None:
    """Gives v1's places on a counter a fixed order.

    RoboCasa removes duplicates by `list(set(…))` of XML elements, ordered by their addresses, and then draws one by its
    number: equal seeds would give different episodes. The places and their probabilities stay the same.
    """
    counter = importlib.import_module("robocasa.models.fixtures.counter")
    if "list(set(valid_geoms))" in inspect.getsource(counter):
        counter.set = dict.fromkeys  # type: ignore[attr-defined]  # keeps the first of each, in order


# --- what RoboCasa 1.0.1 wants of robosuite's master branch, and PyPI's robosuite 1.5.2 has not ----------------------


def _mend_robosuite() -> None:
    import robosuite
    from robosuite.controllers.parts import controller_factory
    from robosuite.environments.base import MujocoEnv
    from robosuite.environments.manipulation.manipulation_env import ManipulationEnv
    from robosuite.models.tasks import ManipulationTask

    if not hasattr(robosuite, "load_composite_controller_config"):
        raise ValueError(f"robosuite {robosuite.__version__} is too old, expected 1.5.1 or later: {INSTALL}")
    if not hasattr(MujocoEnv, "sim"):
        MujocoEnv.sim = None  # a first model that fails is "destroyed" before there is one
    if not _accepts(ManipulationEnv.__init__, "load_model_on_init"):
        # Dropped: the constructor then loads a model that the first reset loads anew.
        ManipulationEnv.__init__ = _dropping(ManipulationEnv.__init__, "load_model_on_init")
    if not _accepts(ManipulationTask.__init__, "enable_multiccd"):
        ManipulationTask.__init__ = _with_options(ManipulationTask.__init__)
    controller_factory.mobile_base_controller_factory = _without_legacy_names(
        controller_factory.mobile_base_controller_factory
    )


def _accepts(function: Callable, argument: str) -> bool:
    return argument in inspect.signature(function).parameters


def _dropping(function: Callable, argument: str) -> Callable:
    @functools.wraps(function)
    def without(*args: Any, **kwargs: Any) -> Any:
        kwargs.pop(argument, None)
        return function(*args, **kwargs)

    return without


def _with_options(init: Callable) -> Callable:
    """ManipulationTask's constructor with the two options of the master branch."""

    @functools.wraps(init)
    def constructor(
        self: Any, *args: Any, enable_multiccd: bool = False, enable_sleeping_islands: bool = False, **kwargs: Any
    ) -> None:
        if enable_sleeping_islands:
            raise ValueError("enable_sleeping_islands=True needs robosuite's master branch: expected False")
        init(self, *args, **kwargs)
        if enable_multiccd:
            option = ET.SubElement(self.root, "option")
            ET.SubElement(option, "flag", multiccd="enable")

    return constructor


def _without_legacy_names(factory: Callable) -> Callable:
    """Renames controllers: the master branch's X_LEGACY is X in PyPI's robosuite."""

    @functools.wraps(factory)
    def make(name: str, params: dict[str, Any]) -> Any:
        try:
            return factory(name, params)
        except ValueError:
            if not name.endswith("_LEGACY"):
                raise
            return factory(name.removesuffix("_LEGACY"), params)

    return make
