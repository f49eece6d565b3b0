"""Environments of another interpreter: its packages, with this package `envs` and no other.

RoboCasa and LIBERO want different versions of robosuite: each can be installed with a Python of its own, and one
process uses both.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping

from envs.base import Env

OLDEST = (3, 11)
_PACKAGE = os.path.dirname(os.path.abspath(__file__))

# Its own import path, without the working directory; of ours nothing but the package envs, by its place.
BOOT = f"""
import importlib.util, sys
if sys.version_info < {OLDEST}: sys.exit("it is Python %d.%d" % sys.version_info[:2])
sys.path[:] = [place for place in sys.path if place]
place = {_PACKAGE!r}
spec = importlib.util.spec_from_file_location("envs", place + "/__init__.py", submodule_search_locations=[place])
sys.modules["envs"] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
"""


def environment() -> dict[str, str]:
    """The environment variables of another interpreter: those that change where a Python imports from are left out."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}


@dataclasses.dataclass(frozen=True)
class Elsewhere:
    """A factory of environments that only workers of another interpreter call. In `EnvPool` and jobs they do."""

    python: str  # path of the interpreter
    factory: Callable[[], Env]

    def __call__(self) -> Env:
        raise ValueError(f"environments of {self.python} run in worker processes of it: expected some (env.workers)")


def split(factories: Mapping[str, Callable[[], Env]]) -> tuple[str, dict[str, Callable[[], Env]]]:
    """(the interpreter that factories are of, as a worker calls them); empty: this one."""
    pythons = {factory.python if isinstance(factory, Elsewhere) else "" for factory in factories.values()}
    if len(pythons) > 1:
        raise ValueError(f"environments of one pool run in one interpreter; got {', '.join(sorted(pythons))}")
    plain = {key: one.factory if isinstance(one, Elsewhere) else one for key, one in factories.items()}
    return pythons.pop(), plain
