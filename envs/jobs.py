"""Jobs in worker processes, one environment each: deadlines, replacement of workers, results in the order of the jobs.

A job is a generator over an environment. Its worker answers after each stretch of it, within a deadline as a rollout's
chunk has; a job whose worker died or was late begins again in a fresh one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import multiprocessing.connection
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any

from envs.base import Env
from envs.pool import ONLY, PoolError
from envs.pool_crew import TRIES
from envs.pool_frames import Reply
from envs.pool_workers import Builds, Fault, ProcessWorker
from envs.worker import DOING, Request

AHEAD = 4  # jobs for each worker that may be begun from the one on that is waited for
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Job:
    """What one worker does in its environment."""

    name: str  # in an error
    work: Callable[[Env], Generator[None, None, Any]]  # picklable; it returns a result, never None


def run_jobs(
    make_env: Callable[[], Env], jobs: Iterable[Job], processes: int, timeout_s: float, start_timeout_s: float
) -> Iterator[Any]:
    """What each job returns, in their order.

    Args:
      jobs: may be endless: only a few are begun before they are asked for.
      timeout_s: of each stretch of a job; start_timeout_s: of building an environment.

    Raises:
      PoolError: a job, or the building of an environment, failed three times, or in a way that no other try would mend.
    """
    members: list[_Member] = []
    builds = Builds(start_timeout_s)
    numbered = enumerate(jobs)
    finished: dict[int, Any] = {}
    begun, ended = 0, False

    def following(limit: int) -> tuple[int, Job] | None:
        nonlocal begun, ended
        if ended or begun >= limit:
            return None
        found = next(numbered, None)
        begun, ended = begun + 1, found is None
        return found

    try:
        for wanted in itertools.count():
            while wanted not in finished:
                limit = wanted + AHEAD * processes
                idle = [member for member in members if not member.doing]
                while idle and (one := following(limit)):
                    idle.pop().begin(*one)
                while len(members) < processes and (one := following(limit)):
                    members.append(_Member(make_env, *one, timeout_s, builds))
                busy = [member for member in members if member.doing]
                if not busy:
                    return
                for member, reply in _answers(busy):
                    member.hear(reply, finished)
            yield finished.pop(wanted)
    finally:
        for member in members:
            member.worker.kill()
        for member in members:
            member.worker.end()


def _answers(members: list[_Member]) -> Iterator[tuple[_Member, Reply | Fault]]:
    """Waits for an answer, or until one is late."""
    patience = max(0.0, min(member.deadline for member in members) - time.monotonic())
    ready = multiprocessing.connection.wait([member.worker.connection for member in members], patience)
    for member in members:
        if member.worker.connection in ready:
            yield member, member.receive()
        elif time.monotonic() >= member.deadline:
            yield member, Fault(f"no answer within {member.timeout_s:g} s")


class _Member:
    """A worker, its job, and until when it must answer."""

    def __init__(self, make_env: Callable[[], Env], number: int, job: Job, timeout_s: float, builds: Builds) -> None:
        self._make_env, self._timeout_s, self._builds = make_env, timeout_s, builds
        self._number, self._job, self._failures, self._unbuilt = number, job, 0, 0
        self._start()

    def _start(self) -> None:
        self.worker = ProcessWorker({ONLY: self._make_env}, 0, self._timeout_s)
        self._ask(("make", [(0, ONLY)]))

    @property
    def timeout_s(self) -> float:
        """Seconds that its answer may take."""
        return self._builds.longest_s(self._unbuilt) if self.doing == "make" else self._timeout_s

    @property
    def deadline(self) -> float:
        return self._asked + self.timeout_s

    def _ask(self, request: Request) -> None:
        self.doing, self._asked = request[0], time.monotonic()
        with contextlib.suppress(OSError):  # it is dead, or reads no more: the answer will lack
            self.worker.send(request)

    def begin(self, number: int, job: Job) -> None:
        self._number, self._job, self._failures = number, job, 0
        self._ask(("begin", [(0, (ONLY, job.work))]))

    def receive(self) -> Reply | Fault:
        try:
            reply = self.worker.receive()
        except BlockingIOError:
            return Fault("its answer stood still")
        except (EOFError, OSError):
            return Fault(self.worker.death())
        return reply if reply.error is None else Fault.of(reply)

    def hear(self, reply: Reply | Fault, finished: dict[int, Any]) -> None:
        """Goes on after an answer: with the same job, with none, or from the job's beginning in a fresh process."""
        if isinstance(reply, Fault):
            self._replace(reply)
        elif self.doing == "make":
            self._builds.took(time.monotonic() - self._asked)
            self._unbuilt = 0
            self._ask(("begin", [(0, (ONLY, self._job.work))]))
        elif (result := reply.results[0]) is None:
            self._ask(("advance", [(0, None)]))
        else:
            finished[self._number], self.doing = result, ""

    def _replace(self, fault: Fault) -> None:
        self._failures += 1
        self._unbuilt += self.doing == "make"
        last = not fault.retry or self._failures >= TRIES
        times = f"{self._failures} times " * (self._failures > 1)
        told = f"a worker failed {times}on {self._job.name} while {DOING[self.doing]}: {fault.text}"
        if last:
            raise PoolError(told)
        _log.warning("%s; replacing the worker and retrying", told)
        self.worker.kill()
        self.worker.end()
        self._start()
