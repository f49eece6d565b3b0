"""Traces of chosen iterations, for TensorBoard's profile plug-in, XProf or Perfetto."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Collection, Iterator

import jax

PROFILE = "profile"  # in the run directory


@contextlib.contextmanager
def profiled(directory: pathlib.Path, number: int, chosen: Collection[int]) -> Iterator[None]:
    """Marks the enclosed code as iteration `number`, and writes a trace if that iteration is chosen.

    Args:
        directory: of the traces; that of an iteration lies in iteration-N.
    """
    with contextlib.ExitStack() as stack:
        if number in chosen:
            stack.enter_context(jax.profiler.trace(directory / f"iteration-{number}"))
        stack.enter_context(jax.profiler.StepTraceAnnotation("iteration", step_num=number))
        yield
