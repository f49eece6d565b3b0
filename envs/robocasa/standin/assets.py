"""Writes the assets folder of stand-ins, and leads RoboCasa to it."""

from __future__ import annotations

import hashlib
import importlib.abc
import importlib.machinery
import os
import pathlib
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

from envs.robocasa import compat
from envs.robocasa.standin import fixtures, objects, scene

LABEL = "stand-in assets (primitive shapes, flat colours): a smoke test, not a RoboCasa result"
_NOTE = "STAND-INS.txt"
_COPIED = ("arenas", "scenes", "fixtures")  # RoboCasa's own MJCF and layouts, which its repository and wheel carry
_OWN = pathlib.Path(__file__).parent


def folder() -> str:
    """Where stand-ins are written unless a caller names another folder: $Z1_STANDINS, or one in the user's cache."""
    return os.environ.get("Z1_STANDINS", "~/.cache/z1/robocasa-standin")


def prepare(directory: str | os.PathLike[str]) -> pathlib.Path:
    """Writes the assets for the installed RoboCasa, unless they are there; several processes may do so at once.

    Args:
        directory: a folder for stand-ins of any version, e.g. in a cache; created if absent.

    Returns:
        The assets folder inside it, one for each version of RoboCasa and of this generator.

    Raises:
        ValueError: RoboCasa is not installed, or the folder cannot be written.
    """
    found = compat.find()
    target = pathlib.Path(directory).expanduser().absolute() / f"{found.api}-{digest_of(found)}"
    if "robosuite" in target.parts or "robocasa" in target.parts:
        # Both rewrite file names that hold a folder of their own name.
        raise ValueError(f"stand-ins in {target}: expected a path without a folder named robocasa or robosuite")
    if (target / _NOTE).exists():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        draft = pathlib.Path(tempfile.mkdtemp(prefix=".draft-", dir=target.parent))
    except OSError as error:
        raise ValueError(f"stand-ins cannot be written to {target.parent}: {error}") from error
    try:
        _write(found, draft)
        os.chmod(draft, 0o755)  # mkdtemp's folders are closed to other users
        draft.rename(target)
    except OSError as error:
        shutil.rmtree(draft, ignore_errors=True)
        if not (target / _NOTE).exists():  # else another process was faster
            raise ValueError(f"stand-ins cannot be written to {target}: {error}") from error
    return target


def install(directory: str | os.PathLike[str]) -> pathlib.Path:
    """Imports RoboCasa such that it reads its assets from stand-ins (`prepare`), for this whole process.

    Raises:
        ValueError: as `prepare` and `compat.load`; or this process has imported RoboCasa with other assets.
    """
    target = prepare(directory)
    loaded = sys.modules.get("robocasa.models")
    if loaded is None:
        sys.meta_path.insert(0, _Redirect(target))
        compat.load()
        _mend_scenes()
    elif pathlib.Path(loaded.assets_root) != target:
        raise ValueError(
            f"RoboCasa was imported with assets in {loaded.assets_root}, expected {target}: "
            "choose stand-ins before anything imports robocasa, or start another process"
        )
    return target


def digest_of(found: compat.Installation) -> str:
    """Changes with whatever the assets depend on: the generator, and the package's tables."""
    digest = hashlib.sha256()
    tables = [found.root / "models" / "objects" / "kitchen_objects.py"]
    for path in [*sorted(_OWN.glob("*.py")), *tables, *(source for source, _ in _copies(found))]:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _copies(found: compat.Installation) -> Iterator[tuple[pathlib.Path, pathlib.PurePosixPath]]:
    carried = found.root / "models" / "assets"
    for folder in _COPIED:
        for path in sorted((carried / folder).rglob("*")):
            if path.suffix in (".xml", ".yaml"):
                yield path, pathlib.PurePosixPath(path.relative_to(carried).as_posix())


def _write(found: compat.Installation, draft: pathlib.Path) -> None:
    for source, relative in _copies(found):
        _file(draft / relative, source.read_text())
    for relative, text in objects.models(found.root):
        _file(draft / relative, text)
    if found.api == "v1":  # v0.2's repository carries the MJCF of its fixtures
        for relative, text in fixtures.models(found.root):
            if not (draft / relative).exists():
                _file(draft / relative, text)
    _file(draft / _NOTE, f"RoboCasa {found.version}: {LABEL}\n")


def _file(path: pathlib.Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


class _Redirect(importlib.abc.MetaPathFinder):
    """Sets `robocasa.models.assets_root` the moment that it exists: RoboCasa's modules copy it while it is imported."""

    def __init__(self, assets: pathlib.Path):
        self.assets = str(assets)

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        if name != "robocasa.models":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            module.assets_root = self.assets  # type: ignore[attr-defined]

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _mend_scenes() -> None:
    from robocasa.environments.kitchen.kitchen import Kitchen

    edit = Kitchen.edit_model_xml
    Kitchen.edit_model_xml = lambda self, xml: scene.mend(edit(self, xml))
