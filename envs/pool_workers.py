"""Workers as the pool sees them: processes that it starts, asks, kills and waits for, or the same in this process."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import pickle
import socket
import struct
import subprocess
from typing import Any

from envs import worker
from envs.simulators import Factories
from envs.worker import Reply, Request, SlotServer


@dataclasses.dataclass(frozen=True)
class Fault:
    """Why a worker gave no answer."""

    text: str  # one line
    slot: int | None = None  # None when the worker could not say
    retry: bool = True

    @classmethod
    def of(cls, reply: Reply) -> Fault:
        """What a reply that holds an error tells."""
        return cls(reply.error or "", reply.error_slot, retry=not reply.lasting)


class ProcessWorker:
    """A worker in its own interpreter."""

    def __init__(self, factories: Factories, simulators: int, timeout_s: float) -> None:
        self.connection, child = multiprocessing.Pipe()
        _bound_waits(self.connection, timeout_s)
        fd = child.fileno()
        threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # the processes are the parallelism
        try:
            self._process = subprocess.Popen(
                worker.command(fd, os.getpid()), pass_fds=[fd], stdin=subprocess.DEVNULL, env=threads | os.environ
            )
        finally:
            child.close()  # a copy kept here would hide the worker's death
        try:
            self.connection.send((factories, simulators))
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            self.kill()
            self.end()
            raise ValueError(
                f"make_env cannot be sent to a worker ({error}): expected a function of an importable module or a "
                "functools.partial of one"
            ) from None
        except OSError:
            pass  # it died at once: the next exchange reports that

    def send(self, request: Request) -> None:
        self.connection.send(request)

    def death(self) -> str:
        """Says how the process ended; kills one that only closed its pipe."""
        try:
            code = self._process.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            self.kill()
            return "the process closed its pipe"
        return f"the process died (exit code {code})"

    def kill(self) -> None:
        self._process.kill()

    def hang_up(self) -> None:
        self.connection.close()

    def end(self, patience_s: float = 2.0) -> None:
        self.connection.close()
        try:
            self._process.wait(timeout=patience_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class LocalWorker:
    """The same in this process, for debugging: an exception is survived, a death or a hang is not."""

    def __init__(self, factories: Factories, simulators: int) -> None:
        self._server = SlotServer(factories, simulators)

    def serve(self, request: Request) -> Reply:
        return self._server.serve(request)

    def kill(self) -> None:
        pass

    def hang_up(self) -> None:
        pass

    def end(self) -> None:
        self._server.close()


def _bound_waits(connection: Any, timeout_s: float) -> None:
    """A message that stands still for so long raises BlockingIOError: a stopped worker reads and writes no more."""
    seconds, rest = divmod(timeout_s, 1.0)
    with socket.socket(fileno=os.dup(connection.fileno())) as end:
        for option in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
            end.setsockopt(socket.SOL_SOCKET, option, struct.pack("@ll", int(seconds), int(1e6 * rest)))
