"""Workers as the pool sees them: processes that it starts, asks, kills and waits for, or the same in this process."""

from __future__ import annotations

import dataclasses
import math
import multiprocessing
import os
import pickle
import select
import socket
import struct
import subprocess
from collections import deque
from collections.abc import Sequence
from typing import Any, Protocol

from envs import elsewhere, worker
from envs.pool_frames import Reply, SharedAnswers, anonymous
from envs.simulators import Factories
from envs.worker import Request, SlotServer

PATIENCE = 10.0  # times the slowest answer so far that the next one may take
LEAST_BUILD_S = 20.0  # that building a worker may take


@dataclasses.dataclass(frozen=True)
class Fault:
    """Why a worker gave no answer."""

    text: str  # one line
    slot: int | None = None  # None when the worker could not say
    retry: bool = True  # trying again may help
    ends: bool = False  # whatever other slots do

    @classmethod
    def of(cls, reply: Reply) -> Fault:
        """What a reply that holds an error tells."""
        return cls(reply.error or "", reply.error_slot, retry=not (reply.wrong or reply.lasting), ends=reply.lasting)


class Builds:
    """How long building a worker may take: `timeout_s`, or a few times what another one took where that is less.

    A worker that starts again after a failure has all of `timeout_s`.
    """

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._slowest_s = 0.0

    def took(self, seconds: float) -> None:
        """One was built in so many seconds."""
        self._slowest_s = max(self._slowest_s, seconds)

    def longest_s(self, failures: int) -> float:
        """That the next one may take, after so many failures of it."""
        if failures or not self._slowest_s:
            return self._timeout_s
        return min(self._timeout_s, max(LEAST_BUILD_S, PATIENCE * self._slowest_s))


class Worker(Protocol):
    """One worker, wherever it runs: it answers requests in their order."""

    @property
    def placed(self) -> bool:
        """It runs somewhere. Where it does not, starting it again would not help."""

    def send(self, request: Request) -> None:
        """Asks, without waiting for the answer. Raises BlockingIOError where the message stood still, else OSError."""

    def receive(self) -> Reply:
        """The oldest answer that is there. Raises BlockingIOError, EOFError or OSError in place of one."""

    def death(self) -> str:
        """Says how it ended; ends one that only does not talk any more."""

    def late(self, timeout_s: float) -> str:
        """Says what it is that did not come in time."""

    def kill(self) -> None:
        """Ends it at once."""

    def hang_up(self) -> None:
        """Tells it to end; `end` waits for that."""

    def end(self) -> None:
        """Waits until it has ended, for a moment; then ends it."""


class Workers(Protocol):
    """Where the workers of a pool run."""

    prompt: bool  # one that is started runs at once, and waits for no place

    def start(self, index: int, slots: Sequence[int]) -> Worker:
        """Starts worker `index`, which is to serve `slots`, or starts it again."""

    def wait(self, members: Sequence[Any], timeout_s: float) -> list[Any]:
        """Those of some workers that have an answer or died; none: the time is over."""

    def misplaced(self) -> set[int]:
        """Workers that would now be better off elsewhere: the pool starts them again between two episodes."""

    def close(self) -> None:
        """Leaves what the workers ran on; they have ended."""


class Processes:
    """Workers in interpreters of their own on this machine.

    Args:
        timeout_s: longest that a message to or from one may stand still.
    """

    prompt = True

    def __init__(self, factories: Factories, simulators: int, timeout_s: float) -> None:
        self._making = (factories, simulators, timeout_s)

    def start(self, index: int, slots: Sequence[int]) -> ProcessWorker:
        return ProcessWorker(*self._making)

    def wait(self, members: Sequence[ProcessWorker], timeout_s: float) -> list[ProcessWorker]:
        poll = select.poll()  # multiprocessing.connection.wait takes four times as long
        for member in members:
            poll.register(member.connection.fileno(), select.POLLIN)
        ready = {fd for fd, _ in poll.poll(math.ceil(1e3 * timeout_s))}
        return [member for member in members if member.connection.fileno() in ready]

    def misplaced(self) -> set[int]:
        return set()

    def close(self) -> None:
        pass


class InThisProcess:
    """The one worker of a pool without processes."""

    prompt = True

    def __init__(self, factories: Factories, simulators: int) -> None:
        self._making = (factories, simulators)

    def start(self, index: int, slots: Sequence[int]) -> LocalWorker:
        return LocalWorker(*self._making)

    def wait(self, members: Sequence[LocalWorker], timeout_s: float) -> list[LocalWorker]:
        return list(members)

    def misplaced(self) -> set[int]:
        return set()

    def close(self) -> None:
        pass


class ProcessWorker:
    """A worker in its own interpreter."""

    placed = True

    def __init__(self, factories: Factories, simulators: int, timeout_s: float) -> None:
        self.connection, child = multiprocessing.Pipe()
        _bound_waits(self.connection, timeout_s)
        fd, shared = child.fileno(), anonymous()
        self._answers = SharedAnswers(shared)
        python, factories = elsewhere.split(factories)
        threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # the processes are the parallelism
        try:
            self._process = subprocess.Popen(
                worker.command(fd, os.getpid(), shared, python),
                pass_fds=[fd, *shared],
                stdin=subprocess.DEVNULL,
                env=threads | (elsewhere.environment() if python else os.environ),
            )
        except BaseException:
            self._answers.close()
            raise
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

    def receive(self) -> Reply:
        return self._answers.unpack(self.connection.recv_bytes())

    def late(self, timeout_s: float) -> str:
        return f"no answer within {timeout_s:g} s"

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
        self._answers.close()


class LocalWorker:
    """The same in this process, for debugging: an exception is survived, a death or a hang is not."""

    placed = True

    def __init__(self, factories: Factories, simulators: int) -> None:
        self._server = SlotServer(factories, simulators)
        self._replies: deque[Reply] = deque()

    def send(self, request: Request) -> None:
        self._replies.append(self._server.serve(request))

    def receive(self) -> Reply:
        return self._replies.popleft()

    def death(self) -> str:
        return "it is this process"

    def late(self, timeout_s: float) -> str:
        return f"no answer within {timeout_s:g} s"

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
