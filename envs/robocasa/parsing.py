"""Makes RoboCasa parse each of its tables once, and in C.

At every reset RoboCasa parses the whole registry of each fixture anew, with PyYAML's parser in Python: four fifths of a
reset's time. The replacement returns the same, as a fresh copy each time, since RoboCasa writes into it.
"""

from __future__ import annotations

import functools
import importlib
import pickle
import types
from typing import Any, TextIO

_MODULES = ("kitchen_arena", "scene_builder", "scene_utils")  # of robocasa.models.scenes


def speed_up() -> None:
    """Replaces `yaml` in RoboCasa's own modules, once they are imported; `yaml` itself stays as it is."""
    for name in _MODULES:
        module = importlib.import_module(f"robocasa.models.scenes.{name}")
        if hasattr(module, "yaml"):
            module.yaml = types.SimpleNamespace(safe_load=safe_load)  # type: ignore[attr-defined]


def safe_load(source: TextIO | str) -> Any:
    """What `yaml.safe_load` returns."""
    return pickle.loads(_parsed(source if isinstance(source, str) else source.read()))


@functools.lru_cache(maxsize=512)
def _parsed(text: str) -> bytes:
    import yaml  # comes with RoboCasa

    return pickle.dumps(yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader)))
