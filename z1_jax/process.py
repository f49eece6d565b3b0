"""The process that a command runs in: how it ends, what it prints where, and JAX's settings.

A user's mistake ends in one line here; a bug keeps its traceback.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import importlib.util
import io
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

import jax

from envs.pool import PoolError
from z1_jax import processes
from z1_jax.config.schema import Config, ConfigError
from z1_jax.errors import UserError, first_line, shortened
from z1_jax.files import absolute
from z1_jax.interrupt import INTERRUPTED, imported

TRACEBACK = "Z1_JAX_TRACEBACK"  # set: a user's mistake shows its traceback too
# Of a device's memory, what a program can plan with: the driver, the libraries' workspaces and fragmentation take the
# rest. Commands let JAX take as much of a GPU, unless XLA_CLIENT_MEM_FRACTION says otherwise.
USABLE_MEMORY = 0.92
_SAME_ORDER = "--xla_gpu_exclude_nondeterministic_ops"
_GPU_PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")  # without one, XLA may not know the flag
_EXHAUSTED = "RESOURCE_EXHAUSTED"  # XLA's word for it
# A disk that is full, read-only or not ours, a path that cannot be one: the user's to mend, wherever it shows.
_DISK = {
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ENAMETOOLONG,
    errno.ELOOP,
    errno.EIO,
}


def run_main(main: Callable[[Sequence[str]], int | None]) -> None:
    """Runs a command: a user's mistake prints one line and exits with 2, an interruption with 130."""
    _open_output()
    try:
        imported()
        code = main(sys.argv)
        processes.depart()
    except KeyboardInterrupt as interruption:
        if not processes.failed(interruption):
            print(INTERRUPTED, file=sys.stderr)
        leave_at_once(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python fails once more as it ends
        print("stopped: the output was closed; the same command continues where it stopped", file=sys.stderr)
        code = 128 + signal.SIGPIPE
    except (UserError, PoolError, FloatingPointError, OSError) as error:
        if TRACEBACK in os.environ or isinstance(error, OSError) and error.errno not in _DISK:
            processes.failed(error)
            raise
        if not processes.failed(error):
            print(f"error: {shortened(str(error), 4000)}", file=sys.stderr)
        code = 2
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        told = processes.failed(error)
        if TRACEBACK in os.environ or not (isinstance(error, MemoryError) or _EXHAUSTED in str(error)):
            raise
        if not told:
            print(
                f"error: memory does not suffice ({first_line(error)}): what was saved stays; python -m z1_jax.plan "
                "says what needs less",
                file=sys.stderr,
            )
        code = 2
    except Exception as error:
        processes.failed(error)
        raise
    sys.exit(code or 0)


def leave_at_once(code: int) -> NoReturn:
    """Ends the process without the interpreter's own end, which waits for what a device computes, or compiles.

    What has registered for the end of the process is called.
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _open_output() -> None:
    """Discards output to a closed stream, and prints a question mark for what an encoding lacks."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def require_algorithm(config: Config, known: Sequence[str], command: str) -> None:
    """Refuses a config file that was made for another command.

    Raises:
        ConfigError: one line.
    """
    if config.algorithm not in known:
        other = "evaluate" if config.algorithm == "eval" else "train"
        raise ConfigError(
            f"config key algorithm: got {config.algorithm!r}, z1_jax.{command} expects {' or '.join(known)}; "
            f"this config is for python -m z1_jax.{other}"
        )


def start_jax() -> None:
    """Settings of the process, before the first device is used: compiled functions are kept from run to run.

    On a GPU, JAX may take as much memory as `z1_jax.plan` plans with; its default is 75 %. Sums have the same order in
    every run. Products of float32 are computed in float32: with factors rounded to TF32 or bfloat16, as is the default
    of accelerators, an update would not reproduce the probabilities of its rollout. Products of bfloat16 stay as they
    are.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if _SAME_ORDER not in flags and any(map(importlib.util.find_spec, _GPU_PLUGINS)):
        os.environ["XLA_FLAGS"] = f"{flags} {_SAME_ORDER}=true".strip()
    if not any(name in os.environ for name in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")):
        os.environ["XLA_CLIENT_MEM_FRACTION"] = str(USABLE_MEMORY)
    if jax.config.jax_default_matmul_precision is None:  # type: ignore[attr-defined]
        jax.config.update("jax_default_matmul_precision", "float32")
    cache = os.environ.get("Z1_JAX_CACHE", "~/.cache/z1_jax/xla")
    with contextlib.suppress(UserError):  # who has no home has no cache
        jax.config.update("jax_compilation_cache_dir", str(absolute(cache)))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
