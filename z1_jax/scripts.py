"""The commands as console scripts: `z1-train` is `python -m z1_jax.train`, and so on."""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Callable

from z1_jax import interrupt


def _command(name: str) -> Callable[[], None]:
    def start() -> None:
        interrupt.install_hooks()
        sys.path.insert(0, os.getcwd())  # as with `python -m`: an environment or a config's helpers may be of one's own
        runpy.run_module(f"z1_jax.{name}", run_name="__main__", alter_sys=True)

    return start


train, evaluate, plan = _command("train"), _command("evaluate"), _command("plan")
convert, collect, report = _command("convert"), _command("collect"), _command("report")
serve, study = _command("serve"), _command("study")
