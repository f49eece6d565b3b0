"""The processes of one run: how they find one another, what they must agree on, and how all end when one does.

Process 0 leads: it alone prints and writes. The others keep a connection to it (the line), on which small values are
exchanged and every process is heard from; arrays travel by JAX's own collectives (`distributed`).
"""

from __future__ import annotations

import atexit
import json
import os
import secrets
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax

from z1_jax.detection import Place, detected
from z1_jax.errors import UserError, first_line, shortened
from z1_jax.line import FAILED, INTERRUPTED, WRONG, Line, jax_port, open_line

T = TypeVar("T")

JOIN_S = 120  # within which all processes of a run must have come
_FLAGS = ("--coordinator", "--processes", "--process")
_line: Line | None = None


def join(argv: Sequence[str]) -> list[str]:
    """Joins the other processes of a run, where there are any; call it before anything uses a device.

    Which they are is said by `--coordinator=HOST:PORT --processes=N --process=I`, or by SLURM, Open MPI or a TPU pod.
    JAX's own coordinator listens at the port beside it (`jax_port`). All but process 0 are silent on stdout from here.

    Args:
        argv: as `sys.argv`.

    Returns:
        argv without the three flags.

    Raises:
        UserError: a flag is wrong or missing, the port is in use, the coordinator does not answer, not all processes
            came, or two of them say that they are the same: one line.
    """
    global _line
    given = [argument for argument in argv[1:] if argument.partition("=")[0] in _FLAGS]
    rest = [*argv[:1], *(argument for argument in argv[1:] if argument not in given)]
    place = _place(given) if given else detected()
    if place is None or place.count == 1 or _line is not None:
        return rest
    _line = open_line(place.host, place.port, place.count, place.index, JOIN_S)
    if place.index:
        sys.stdout.flush()
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what libraries and workers print too
    try:
        jax.distributed.initialize(
            f"{place.host}:{jax_port(place.port)}",
            place.count,
            place.index,
            local_device_ids=place.local_devices,
            cluster_detection_method="deactivate",
            initialization_timeout=JOIN_S,
            # Our own line notices earlier and says who; JAX's ends the process without a word to the user.
            heartbeat_timeout_seconds=2 * JOIN_S,
            shutdown_timeout_seconds=30,
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(f"JAX's own coordinator at {place.host}:{jax_port(place.port)}: {first_line(error)}") from error
    atexit.register(_leave)
    return rest


def _place(given: Sequence[str]) -> Place:
    values = {name: value for name, _, value in (argument.partition("=") for argument in given)}
    if values == {"--processes": "1"}:  # alone, whatever the environment says
        return Place("", 0, 1, 0)
    if missing := [name for name in _FLAGS if not values.get(name)]:
        raise UserError(f"{missing[0]} is missing: several processes need {'=…, '.join(_FLAGS)}=…")
    host, colon, port = values["--coordinator"].rpartition(":")
    if not colon or not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(f"--coordinator: got {values['--coordinator']!r}, expected HOST:PORT, such as 10.0.0.1:1234")
    for name in _FLAGS[1:]:
        if not values[name].isdecimal():
            raise UserError(f"{name}: got {values[name]!r}, expected a whole number")
    processes, process = int(values["--processes"]), int(values["--process"])
    if not process < processes:
        raise UserError(f"--process: got {process}, expected 0 to {processes - 1}, for --processes={processes}")
    return Place(host, int(port), processes, process)


def count() -> int:
    """How many processes work on this run."""
    return 1 if _line is None else _line.count


def index() -> int:
    """The number of this one."""
    return 0 if _line is None else _line.index


def leads() -> bool:
    """Whether this process is the one that prints and writes."""
    return index() == 0


def exchange(value: Any) -> list[Any]:
    """The values of all processes, in their order. JSON values; every process must call this equally often."""
    return [value] if _line is None else _line.exchange(value)


def on_leader(work: Callable[[], T]) -> T:
    """What `work` returns on process 0, which alone does it, for all of them. JSON values: tuples become lists."""
    if _line is None:
        return work()
    return exchange(work() if leads() else None)[0]


def anyone(flag: bool) -> bool:
    """Whether the flag is set in any process."""
    return any(exchange(bool(flag)))


def require_agreement(facts: Mapping[str, Any]) -> None:
    """Compares facts, JSON values by name, among the processes.

    Raises:
        UserError: one differs; in every process the same line, which names the fact and the process.
    """
    if _line is None:
        return
    everyone = exchange(dict(facts))
    for number, theirs in enumerate(everyone):
        for name in {**everyone[0], **theirs}:
            mine, other = everyone[0].get(name), theirs.get(name)
            if mine != other:
                raise UserError(
                    f"{name}: process {number} on {_line.hosts[number]} has {_told(other)}, process 0 has "
                    f"{_told(mine)}: all processes of a run need the same command, code and data"
                )


def _told(value: Any) -> str:
    return shortened(json.dumps(value), 120)


def require_shared(directory: os.PathLike[str], wait_s: float = 60.0) -> None:
    """Checks that all processes see the same directory.

    Raises:
        UserError: one does not; in every process the same line.
    """
    if _line is None:
        return
    path = os.path.join(directory, f".seen-{secrets.token_hex(8)}" if leads() else "")

    def write() -> str:
        with open(path, "w"):
            return os.path.basename(path)

    name = on_leader(write)
    there, until = os.path.join(directory, name), time.monotonic() + wait_s
    while not (seen := os.path.exists(there)) and time.monotonic() < until:
        time.sleep(0.2)  # network file systems show a new file late
    everyone = exchange(seen)
    if leads():
        os.unlink(path)
    if not all(everyone):
        blind = everyone.index(False)
        raise UserError(
            f"process {blind} on {_line.hosts[blind]} does not see {directory} as process 0 does: the run directory "
            "must lie on a file system that all processes share"
        )


def failed(error: BaseException) -> bool:
    """Tells the others why this process ends, which ends them too. Does nothing where it works alone.

    An error that only follows from another process's end is not told: that end is waited for, and ends this one.

    Returns:
        Whether process 0 tells the user, so that this one need not.
    """
    if _line is None:
        return False
    if isinstance(error, KeyboardInterrupt):
        return _line.end("was interrupted", INTERRUPTED)
    if not isinstance(error, UserError):
        time.sleep(3.0)  # a broken connection shows here first; the line then says whose, and ends this process
    return _line.end(f"{WRONG}{shortened(str(error) or type(error).__name__, 500)}", FAILED)


def depart() -> None:
    """Waits until all processes have come to the end of their command."""
    if _line is not None and not _line.over:
        exchange("end")
        _leave()


def _leave() -> None:
    global _line
    if _line is None:
        return
    line = _line
    if line.over:  # what is left of JAX's own threads would wait for the others in vain
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(line.code)
    jax.distributed.shutdown()
    line.close()
    _line = None
