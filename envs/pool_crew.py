"""The workers of a pool: they are asked, waited for and replaced, and brought to where their journals are.

Several calls may be open at once, so that one part of the slots is simulated while the caller decides for another. A
worker serves them in their order.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from envs import worker
from envs.base import EnvSpec, PoolError
from envs.contract import different_spec
from envs.pool_frames import Reply
from envs.pool_workers import PATIENCE, Builds, Fault, Worker, Workers
from envs.worker import Journal, Request

TRIES = 3  # failures of one state, or of building a worker, after which there is no other try
LEAST_S = 10.0  # that any answer may take
ANEW = ("reset", "restore")  # what a slot needs no state for
_OPEN = 2  # calls that may lie at a worker: it has room for the frames of so many
_SMALL = 1 << 16  # bytes of a message that surely fits into a pipe that nobody reads
_log = logging.getLogger(__name__)


@dataclasses.dataclass(eq=False)
class Call:
    """What was asked of some slots, and what has come of it so far."""

    operation: str
    slots: list[int]  # in the caller's order
    settle: Callable[[Mapping[int, Any]], None]  # notes what came of it, by slot, in the journals
    builds: bool = False  # simulators may have to be built
    requests: dict[int, Request] = dataclasses.field(default_factory=dict)  # by worker
    longest_s: dict[int, float] = dataclasses.field(default_factory=dict)  # that each may take
    asked: float = 0.0
    replies: dict[int, Reply] = dataclasses.field(default_factory=dict)
    faults: dict[int, Fault] = dataclasses.field(default_factory=dict)
    lost: dict[int, str] = dataclasses.field(default_factory=dict)  # slots that failed TRIES times, and why
    seconds: float = 0.0  # that its caller spent in it
    failures: int = 0  # of building these workers before

    @property
    def missing(self) -> list[int]:
        return [index for index in self.requests if index not in self.replies and index not in self.faults]

    def forget(self, index: int) -> None:
        """What a worker answered holds no more: it is asked again."""
        self.replies.pop(index, None)
        self.faults.pop(index, None)


class Crew:
    """The workers of a pool.

    Args:
        journals: of the slots, which go round-robin to the workers. The pool writes them; a slot whose state cannot be
            reached any more gets an empty one.
        timeout_s: longest that an answer may take; a worker that has answered gets PATIENCE times the slowest answer
            of its kind, where that is less, but a few seconds always.
        start_timeout_s: longest that building, or replaying episodes, may take.
    """

    def __init__(
        self, place: Workers, journals: list[Journal], num_workers: int, timeout_s: float, start_timeout_s: float
    ) -> None:
        self._place, self._journals, self._num_workers = place, journals, num_workers
        self._timeout_s, self._start_timeout_s = timeout_s, start_timeout_s
        self._builds = Builds(start_timeout_s)
        self.workers: dict[int, Worker] = {}
        self.specs: dict[str, EnvSpec] = {}  # by task
        self.replaced = 0
        self.gone: dict[int, str] = {}  # slots without a state, for it could not be reached again, and why
        self.times = dict.fromkeys(("simulate", "render", "wait", "hidden", "busy"), 0.0)
        self._behind: set[int] = set()  # workers whose environments may differ from the journals
        self._open: list[Call] = []
        self._heard: dict[int, float] = {}  # when a worker last gave an answer
        self._slowest: dict[str, float] = {}  # seconds of one slot, by operation

    # --- calls -----------------------------------------------------------------------------------------------------

    def begin(self, call: Call, payloads: Iterable[Any]) -> Call:
        """Asks, and does not wait. An open call of the same slots is forgotten, as if it had never been made.

        Args:
            payloads: in the order of the call's slots.
        """
        began = time.perf_counter()
        for other in [other for other in self._open if not set(other.slots).isdisjoint(call.slots)]:
            self._abandon(other)
        for slot, payload in zip(call.slots, payloads, strict=True):
            if slot in self.gone and call.operation not in ANEW:
                call.lost[slot] = self.gone[slot]
            else:
                call.requests.setdefault(self.of(slot), (call.operation, []))[1].append((slot, payload))
        self._make_room(call)
        free = {index for index in call.requests if not self._at(index)}
        self._behind |= self._place.misplaced() & free if call.operation == "reset" else set()
        self._renew(self._behind & call.requests.keys())
        self._open.append(call)
        try:
            call.asked = time.monotonic()
            for index, (_, items) in call.requests.items():
                call.longest_s[index] = self._longest_s(call, len(items))
                self._send(call, index)
        except BaseException:
            self._abandon(call)
            raise
        call.seconds += time.perf_counter() - began
        return call

    def finish(self, call: Call) -> dict[int, Any]:
        """Waits for a call; its answers by slot, but for those that are lost now.

        Raises:
            PoolError: an environment or its building failed in a way that ends everything.
        """
        self._require_open(call)
        began = time.perf_counter()
        self._renew(self._behind & call.requests.keys())
        self._behind |= call.requests.keys()  # until every answer is in: an interrupt may come at any point
        try:
            self._collect(call)
            for index, fault in list(call.faults.items()):
                self._recover(call, index, fault)
        except BaseException:
            self._abandon(call)
            raise
        self._open.remove(call)
        answers = {
            slot: result
            for index, reply in call.replies.items()
            for (slot, _), result in zip(call.requests[index][1], reply.results, strict=True)
            if slot not in call.lost
        }
        for slot in answers:
            self.gone.pop(slot, None)
        call.settle(answers)
        self._behind -= call.requests.keys()
        self._count(call, call.seconds + time.perf_counter() - began)
        return answers

    def ready(self, calls: Sequence[Call]) -> Call:
        """Waits for the first of some open calls whose workers have all answered or failed."""
        began = time.perf_counter()
        for call in calls:
            self._require_open(call)
        workers = {index for call in calls for index in call.requests}
        try:
            while True:
                for call in calls:
                    if not call.missing or self._behind & call.requests.keys():
                        call.seconds += time.perf_counter() - began
                        return call
                self._hear({index: self._at(index)[0] for index in workers if self._at(index)})
        except BaseException:
            self._behind |= workers  # an answer may have been taken and not noted
            raise

    def close(self) -> None:
        """Ends all workers and waits for them."""
        for member in self.workers.values():
            member.hang_up()
        for member in self.workers.values():
            member.end()
        self.workers.clear()
        self._place.close()

    def of(self, slot: int) -> int:
        """The worker of a slot."""
        return slot % max(1, self._num_workers)

    def slots(self, index: int) -> list[int]:
        """Of a worker."""
        return [slot for slot in range(len(self._journals)) if self.of(slot) == index]

    def _require_open(self, call: Call) -> None:
        if call not in self._open:
            raise ValueError("this call was finished before, or given up for another one of its slots")

    def _abandon(self, call: Call) -> None:
        self._open.remove(call)
        self._behind |= call.requests.keys()

    def _at(self, index: int) -> list[Call]:
        """The open calls that a worker has yet to answer, in their order."""
        return [call for call in self._open if index in call.missing]

    def _make_room(self, call: Call) -> None:
        """Takes in what lies at the workers where one more message could stand still, or overwrite frames."""
        for index, (operation, items) in call.requests.items():
            large = operation not in ("reset", "step", "snapshot", "render") or _bytes(items) > _SMALL
            lying = self._at(index)
            if lying and (large or len(lying) >= _OPEN):
                self._collect(lying[-1] if large else lying[-_OPEN])

    def _longest_s(self, call: Call, items: int) -> float:
        if call.builds:
            return max(self._timeout_s, self._start_timeout_s)
        if call.operation not in self._slowest:
            return self._timeout_s
        return min(self._timeout_s, max(LEAST_S, PATIENCE * items * self._slowest[call.operation]))

    def _count(self, call: Call, wall_s: float) -> None:
        """Splits the caller's seconds: what the slowest worker did in them, and waiting. The rest of it was hidden."""
        slowest = max(call.replies.values(), key=_busy_s, default=Reply([]))
        busy = _busy_s(slowest)
        seen = min(1.0, wall_s / busy) if busy else 0.0
        self.times["simulate"] += seen * slowest.simulate_s
        self.times["render"] += seen * slowest.render_s
        self.times["wait"] += max(0.0, wall_s - busy)
        self.times["hidden"] += (1.0 - seen) * busy
        self.times["busy"] += sum(map(_busy_s, call.replies.values()))

    # --- messages --------------------------------------------------------------------------------------------------

    def _send(self, call: Call, index: int) -> None:
        try:
            self.workers[index].send(call.requests[index])
        except BlockingIOError:
            call.faults[index] = self._late(index, call.longest_s[index])
        except OSError:
            call.faults[index] = Fault(self.workers[index].death())

    def _collect(self, call: Call) -> None:
        """Waits until each worker of an open call has answered it or failed, and what lies at that worker before it."""
        while missing := call.missing:
            self._hear({index: self._at(index)[0] for index in missing})

    def _hear(self, asked: Mapping[int, Call]) -> None:
        """Waits until one or more workers have answered the call that is their next, or one is late with it."""
        longest_s = {index: self._may_take_s(call, index) for index, call in asked.items()}
        until = {i: max(call.asked, self._heard.get(i, 0.0)) + longest_s[i] for i, call in asked.items()}
        members = {index: self.workers[index] for index in asked}
        ready = self._place.wait(list(members.values()), max(0.0, min(until.values()) - time.monotonic()))
        for index, member in members.items():
            if member in ready:
                self._receive(asked[index], index)
            elif not ready and until[index] <= time.monotonic():
                asked[index].faults[index] = self._late(index, longest_s[index])

    def _may_take_s(self, call: Call, index: int) -> float:
        first = call.requests[index][0] == "make" and self._place.prompt
        return self._builds.longest_s(call.failures) if first else call.longest_s[index]

    def _receive(self, call: Call, index: int) -> None:
        try:
            reply = self.workers[index].receive()
        except BlockingIOError:
            call.faults[index] = self._late(index, call.longest_s[index])
            return
        except (EOFError, OSError):
            call.faults[index] = Fault(self.workers[index].death())
            return
        self._heard[index] = time.monotonic()
        if reply.error is not None:
            call.faults[index] = Fault.of(reply)
            return
        call.replies[index] = reply
        operation, items = call.requests[index]
        if operation == "make":
            self._builds.took(self._heard[index] - call.asked)
        self._slowest[operation] = max(self._slowest.get(operation, 0.0), _busy_s(reply) / len(items))

    def _late(self, index: int, longest_s: float) -> Fault:
        member = self.workers[index]
        fault = Fault(member.late(longest_s), retry=member.placed)
        member.kill()
        return fault

    def _gather(
        self, requests: dict[int, Request], longest_s: float, failures: int = 0
    ) -> tuple[dict[int, Reply], dict[int, Fault]]:
        """What workers that nothing else is asked of answer."""
        call = Call("", [], lambda _: None, requests=requests, longest_s=dict.fromkeys(requests, longest_s))
        call.failures = failures
        call.asked = time.monotonic()
        for index in requests:
            self._send(call, index)
        while missing := call.missing:
            self._hear(dict.fromkeys(missing, call))
        return call.replies, call.faults

    # --- failures --------------------------------------------------------------------------------------------------

    def _recover(self, call: Call, index: int, fault: Fault) -> None:
        """Has a fresh worker do what one failed to do: slot by slot, so that a state that fails is known and left."""
        items = call.requests[index][1]
        longest_s = max(self._timeout_s, self._start_timeout_s) if call.builds else self._timeout_s
        replies, lost = self._one_by_one(index, call.requests[index], fault, longest_s, self._fresh)
        call.forget(index)
        call.replies[index] = Reply(
            [replies[slot].results[0] if slot in replies else None for slot, _ in items],
            simulate_s=sum(reply.simulate_s for reply in replies.values()),
            render_s=sum(reply.render_s for reply in replies.values()),
        )
        call.lost |= lost
        self._resend(index, call)

    def _one_by_one(
        self, index: int, request: Request, fault: Fault, longest_s: float, fresh: Callable[[int], None]
    ) -> tuple[dict[int, Reply], dict[int, str]]:
        """Asks a worker for one slot after the other, from the start in a fresh one after each failure.

        Args:
            fault: of asking for all of them; longest_s: that each may take; fresh: replaces the worker.

        Returns:
            Replies by slot, and why the others are lost. The worker is sound.
        """
        operation, items = request
        if fault.slot is None and len(items) == 1:
            fault = dataclasses.replace(fault, slot=items[0][0])
        failures = Counter([] if fault.slot is None else [fault.slot])
        lost: dict[int, str] = {}
        failed: Fault | None = fault
        replies: dict[int, Reply] = {}
        while failed:
            slots = [slot for slot, _ in items] if failed.slot is None else [failed.slot]
            if failed.ends:
                raise self._error(index, slots, operation, failed)
            times = failures[slots[0]] if failed.slot is not None else 0
            last = failed.slot is not None and (not failed.retry or times >= TRIES)
            error = self._error(index, slots, operation, failed, f"{times} times " * (times > 1))
            _log.warning("%s; replacing the worker%s", error, "" if last else " and retrying")
            if last:
                lost[slots[0]] = str(error)
            fresh(index)
            replies, failed = {}, None
            for slot, payload in items:
                if slot in lost or (slot in self.gone and operation not in ANEW):
                    lost.setdefault(slot, self.gone.get(slot, ""))
                    continue
                got, faults = self._gather({index: (operation, [(slot, payload)])}, longest_s)
                if faults:
                    failed = dataclasses.replace(faults[index], slot=slot)
                    failures[slot] += 1
                    break
                replies[slot] = got[index]
        return replies, lost

    def _renew(self, indices: Collection[int]) -> None:
        """Replaces workers, and has them do again what is open."""
        if not indices:
            return
        self._replace(indices)
        for index in sorted(indices):
            self._replay(index)
            self._behind.discard(index)
            self._resend(index)

    def _fresh(self, index: int) -> None:
        self._replace([index])
        self._replay(index)

    def _replace(self, indices: Collection[int]) -> None:
        for index in indices:
            self.workers[index].kill()
            self.workers[index].end()
        self.replaced += len(indices)
        self.build(indices)

    def _resend(self, index: int, done: Call | None = None) -> None:
        for call in self._open:
            if call is not done and index in call.requests:
                call.forget(index)
                call.asked = time.monotonic()
                self._send(call, index)

    def _replay(self, index: int) -> None:
        """Brings a fresh worker's slots to the journals' state. One that cannot be brought there is gone."""
        items = [(slot, self._journals[slot]) for slot in self.slots(index) if self._journals[slot].started]
        if not items:
            return
        request: Request = ("replay", items)
        _, faults = self._gather({index: request}, self._start_timeout_s)
        if faults:
            again = functools.partial(self._one_by_one, index, request, faults[index], self._start_timeout_s)
            _, lost = again(lambda index: self._replace([index]))
            for slot, why in lost.items():
                self.gone[slot] = why
                self._journals[slot] = Journal(self._journals[slot].task)

    def build(self, indices: Collection[int], others: Sequence[str] = ()) -> None:
        """Starts workers, builds their slots' simulators and compares what they say of themselves.

        One that dies or is late is started again. An environment that cannot be built ends everything, but for one
        that was built before.

        Args:
            others: tasks that no slot begins with.
        """
        made: list[tuple[int, str]] = [(slot, journal.task) for slot, journal in enumerate(self._journals)]
        made += [(number % len(self._journals), task) for number, task in enumerate(others)]
        requests: dict[int, Request] = {index: ("make", []) for index in indices}
        for slot, task in made:
            if self.of(slot) in requests:
                requests[self.of(slot)][1].append((slot, task))
        failures: Counter[int] = Counter()
        replies: dict[int, Reply] = {}
        while missing := sorted(requests.keys() - replies.keys()):
            for index in missing:
                self.workers[index] = self._place.start(index, self.slots(index))
                self._heard.pop(index, None)
            again = max(failures.values(), default=0)
            got, faults = self._gather({index: requests[index] for index in missing}, self._start_timeout_s, again)
            replies |= got
            for index, fault in faults.items():
                failures[index] += 1
                times = f"{failures[index]} times " * (failures[index] > 1)
                slots = [slot for slot, _ in requests[index][1]] if fault.slot is None else [fault.slot]
                error = self._error(index, slots, "make", fault, times)
                raised = fault.slot is not None and not self.replaced
                if fault.ends or not fault.retry or raised or failures[index] >= TRIES:
                    raise error
                _log.warning("%s; starting it again", error)
                self.workers[index].kill()
                self.workers[index].end()
        specs = {
            (slot, task): spec
            for index, reply in replies.items()
            for (slot, task), spec in zip(requests[index][1], reply.results, strict=True)
        }
        for slot, task in sorted(specs, key=made.index):
            self._compare(slot, task, specs[slot, task])

    def _compare(self, slot: int, task: str, spec: EnvSpec) -> None:
        first = self.specs.setdefault(task, spec)
        different = different_spec(spec, first) or different_spec(
            spec, next(iter(self.specs.values())), ("task", "horizon")
        )
        if different:
            raise self._error(self.of(slot), [slot], "make", Fault(f"{task}: {different}" if task else different))

    def _error(self, index: int, slots: Sequence[int], operation: str, fault: Fault, times: str = "") -> PoolError:
        where = f"slot{'s' if len(slots) > 1 else ''} {', '.join(map(str, slots))}"
        return PoolError(f"worker {index} failed {times}on {where} while {worker.DOING[operation]}: {fault.text}")


def _busy_s(reply: Reply) -> float:
    return reply.simulate_s + reply.render_s


def _bytes(items: Sequence[tuple[int, Any]]) -> int:
    """Of the arrays in the payloads of a chunk."""
    return sum(part.nbytes for _, payload in items if payload for part in payload if isinstance(part, np.ndarray))
