"""What every command does around its own work: the process, the run directory's clock, protocol and summary.

Mains compose this with the stages. A user's mistake ends in one line here; a bug keeps its traceback.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import io
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

from envs.pool import PoolError
from z1_jax import __version__, accelerators, suites
from z1_jax import config as z1_config
from z1_jax.checkpoint import Checkpoints
from z1_jax.config import Config, ConfigError
from z1_jax.errors import UserError
from z1_jax.files import absolute
from z1_jax.interrupt import INTERRUPTED, imported
from z1_jax.policy import Policy, find_policy
from z1_jax.report import REPORT, write_report

SUMMARY = "summary.json"
TRACEBACK = "Z1_JAX_TRACEBACK"  # set: a user's mistake shows its traceback too
_CLOCK_S = 5.0  # how often a running stage's time is noted
_SAME_ORDER = "--xla_gpu_exclude_nondeterministic_ops"
_GPU_PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")  # without one, XLA may not know the flag
# A disk that is full, read-only or not ours, a path that cannot be one: the user's to mend, wherever it shows.
_DISK = {
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.ENOTDIR,
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
    except KeyboardInterrupt:
        print(INTERRUPTED, file=sys.stderr)
        code = 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python fails once more as it ends
        print("stopped: nobody reads the output any more; the same command continues where it stopped", file=sys.stderr)
        code = 128 + signal.SIGPIPE
    except (UserError, PoolError, FloatingPointError, OSError) as error:
        if TRACEBACK in os.environ or isinstance(error, OSError) and error.errno not in _DISK:
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        code = 2
    sys.exit(code or 0)


def _open_output() -> None:
    """Output that was closed goes nowhere, and what its encoding lacks is shown as a question mark."""
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

    On a GPU JAX may take as much memory as `z1_jax.plan` plans with; by itself it would stop at 75 %. Sums are made in
    an order that is the same in every run. And float32 means float32: accelerators would round the factors of products
    to TF32 or bfloat16, and an update would not find the probabilities that a rollout saw. Products of bfloat16 are
    what they were.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if _SAME_ORDER not in flags and any(map(importlib.util.find_spec, _GPU_PLUGINS)):
        os.environ["XLA_FLAGS"] = f"{flags} {_SAME_ORDER}=true".strip()
    if not any(name in os.environ for name in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")):
        os.environ["XLA_CLIENT_MEM_FRACTION"] = str(accelerators.USABLE)
    if jax.config.jax_default_matmul_precision is None:
        jax.config.update("jax_default_matmul_precision", "float32")
    cache = os.environ.get("Z1_JAX_CACHE", "~/.cache/z1_jax/xla")
    with contextlib.suppress(UserError):  # who has no home has no cache
        jax.config.update("jax_compilation_cache_dir", str(absolute(cache)))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def finished_sentence(run_dir: pathlib.Path) -> str | None:
    """The result of a run that is finished; None for one that is not. A report that is missing is written.

    Raises:
        UserError: its summary is damaged.
    """
    path = run_dir / SUMMARY
    if not path.exists():
        return None
    try:
        sentence = str(json.loads(path.read_text())["sentence"])
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is damaged; delete it, and the same command writes it anew") from None
    if not (run_dir / REPORT).exists():
        write_report(run_dir)
    return sentence


def policy_identity(path: str) -> str:
    """A short hash of the policy's parameters and tokenizer, wherever they lie.

    Raises:
        CheckpointError: there is no policy at `path`, or it is damaged.
    """
    directory, step = find_policy(path)
    checkpoints = Checkpoints(directory)
    try:
        stored = checkpoints.checksums(step, "assets")  # a converted checkpoint may come without its tokenizer
        return checkpoints.digest(step, ("params", "assets") if stored else ("params",))
    finally:
        checkpoints.close()


def claim_policy(run_dir: pathlib.Path, identities: Mapping[str, str]) -> None:
    """Notes which policies a run directory is about, or checks that they are still the same.

    Raises:
        UserError: a path leads to another policy than before: its run went on, or was made anew.
    """
    path = run_dir / "policies.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    for name, identity in identities.items():
        if known.get(name, identity) != identity:
            raise UserError(
                f"{run_dir} began with policy {known[name]} as {name}, the path leads to {identity} now; "
                "choose another --config.run_dir"
            )
    write_json(path, dict(identities))


class StageClock:
    """Wall seconds of each stage, kept over interruptions."""

    def __init__(self, path: pathlib.Path):
        self._path = path
        self.seconds: dict[str, float] = {}
        with contextlib.suppress(FileNotFoundError, ValueError):  # a damaged file costs only the times it held
            self.seconds = dict(json.loads(path.read_text()))

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Adds the time within to the stage, also when it is interrupted; of one that is killed all but the end."""
        before, began, over = self.seconds.get(name, 0.0), time.perf_counter(), threading.Event()

        def note() -> None:
            self.seconds[name] = before + time.perf_counter() - began
            write_json(self._path, self.seconds)

        def note_now_and_then() -> None:
            while not over.wait(_CLOCK_S):
                with contextlib.suppress(OSError):  # the stage itself will say what is wrong with the directory
                    note()

        keeper = threading.Thread(target=note_now_and_then, daemon=True)
        keeper.start()
        try:
            yield
        finally:
            over.set()
            keeper.join()
            note()


def conclude(
    config: Config,
    policy: Policy,
    run_dir: pathlib.Path,
    clock: StageClock,
    result: dict[str, Any],
    line: str,
) -> None:
    """Writes summary.json and the report, and prints the result."""
    note = suites.label(config)
    line += f" [{note}]" * bool(note)
    summary = {
        "task": config.task,
        "seeds": {"run": config.seed, "evaluation": [config.eval.first_seed, config.eval.episodes]},
        "protocol": protocol(config, policy),
        **result,
        "wall_seconds": clock.seconds,
        "sentence": line,
    }
    path = run_dir / SUMMARY
    write_json(path, summary)
    page = write_report(run_dir)
    total = sum(clock.seconds.values())
    print(f"\n{line}")
    print(f"{total / 60:.1f} minutes in all; summary {path}, report {page}", flush=True)


def protocol(config: Config, policy: Policy) -> dict[str, Any]:
    """What the success rates depend on."""
    return {
        "version": __version__,
        "revision": _revision(),
        "suite": config.env.suite,
        "task": config.task,
        "config": z1_config.fingerprint(config),
        "evaluation_seeds": f"{config.eval.first_seed} … {config.eval.first_seed + config.eval.episodes - 1}"
        if config.eval.episodes
        else "none",
        "noise_seed": config.eval.noise_seed,
        "confidence": config.eval.confidence,
        "predicted_steps_per_chunk": policy.config.horizon,
        "executed_steps_per_chunk": policy.executed,
        "denoising_steps": config.flow.steps,
        "sampler": "ODE",
        "cameras": list(config.env.cameras),
        "slots": list(policy.processor.cameras),
        "image_size": config.env.image_size,
        "widths": {name: stats.dim for name, stats in policy.processor.stats.items()},
        **suites.facts(config),
        "stop_on_success": True,
        "latched_success": True,
        "tokenizer": policy.processor.tokenizer.identity[:12],
        "jax": jax.__version__,
        "devices": f"{jax.device_count()} × {jax.devices()[0].device_kind}",
    }


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes a JSON file whole: a kill leaves the old one or the new one."""
    aside = path.with_name(path.name + ".tmp")
    aside.write_text(json.dumps(value, indent=1))
    aside.replace(path)


def _revision() -> str:
    try:
        root = pathlib.Path(__file__).parent
        command = ["git", "-C", str(root), "describe", "--always", "--dirty"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "not a git checkout"
