"""Z-1 JAX: GRPO post-training of the π0.5 vision-language-action model in JAX.

For notebooks and scripts: `load_policy`, `make_env` and `Episode`. Importing this module does not import JAX.
"""

import importlib
import pathlib
import sys
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {"load_policy": "z1_jax.api", "make_env": "z1_jax.api", "ActingPolicy": "z1_jax.api", "Episode": "envs.base"}


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'z1_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*_PUBLIC, "__version__"]


def _own_envs() -> None:
    """Makes `envs` the package beside this one, also where the working directory has an `envs` of its own.

    Raises:
        ImportError: another package of that name was imported before.
    """
    home = str(pathlib.Path(__file__).resolve().parent.parent)
    sys.path.insert(0, home)
    try:
        envs = importlib.import_module("envs")
    finally:
        sys.path.remove(home)
    found = pathlib.Path(envs.__file__ or next(iter(envs.__path__))).resolve()
    if not found.is_relative_to(home):
        raise ImportError(
            f"z1_jax needs its own package envs, but {found} was imported under that name: rename it, or import z1_jax "
            "in another process"
        )


_own_envs()

if sys.argv[:1] == ["-m"]:  # `python -m z1_jax.…`: the command's imports take seconds, and Ctrl-C may fall into them
    from z1_jax import interrupt  # it needs our own envs

    interrupt.install_hooks()
