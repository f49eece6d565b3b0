"""A pool of environments in worker processes: chunk stepping, bit-exact branching, recovery from worker faults.

Workers are fresh interpreters (never forks: a fork after the parent has used GL or XLA hangs) that talk over a socket
pair. A call either completes or leaves no trace: each slot's journal (base state and chunks since) is written only when
all workers have answered, and a worker that may have gone ahead of it is rebuilt from it before its next use.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from envs import worker
from envs.base import ChunkResult, Env, EnvObservation, EnvSpec, Episode, Snapshot
from envs.contract import different_spec
from envs.pool_workers import Fault, InThisProcess, Processes, Worker, Workers
from envs.simulators import Factories
from envs.worker import Journal, Reply, Request

ONLY = ""  # the task of a pool that was given one environment without a name
_log = logging.getLogger(__name__)


class PoolError(RuntimeError):
    """A worker failed and replacing it did not help. One line: worker, slot, what it was doing, why."""


class EnvPool:
    """`num_envs` environments (slots) dealt round-robin to `num_workers` processes; 0 workers run in this process.

    Args:
      make_env: builds one environment; picklable and importable in a fresh interpreter, e.g.
        `functools.partial(envs.kitchen.make, "TurnOnSinkFaucet")`. Or several by their tasks, which episodes name; they
        differ in task and horizon alone.
      simulators: most that one worker keeps. 0: each slot has its own, built anew when its task changes and none of
        that task is free. Else slots take turns in them, by snapshots: this moves no number, but environments that
        cannot be copied must have one each.
      timeout_s: seconds that a worker may take to answer one call; a later one is replaced and the call retried once.
      start_timeout_s: seconds that a new worker may take to import, build its environments and replay their episodes.
      place: where the workers run, and with what; the pool closes it. None: in processes on this machine.

    Raises:
      ValueError: a bad argument, here or in any method (slots out of range or repeated, wrong shapes).
      PoolError: an environment raised, or a worker died or was late twice in a row; or an environment gave what its
        spec does not say (see `envs.contract`), or a ValueError: then at once, for trying again would not help.
    """

    def __init__(
        self,
        make_env: Callable[[], Env] | Factories,
        num_envs: int,
        num_workers: int,
        timeout_s: float = 60.0,
        start_timeout_s: float = 120.0,
        simulators: int = 0,
        place: Workers | None = None,
    ) -> None:
        if num_envs < 1 or num_workers < 0:
            raise ValueError(
                f"got num_envs={num_envs}, num_workers={num_workers}: expected num_envs >= 1, num_workers >= 0"
            )
        self._factories = dict(make_env) if isinstance(make_env, Mapping) else {ONLY: make_env}
        if simulators < 0 or not self._factories:
            raise ValueError(f"got simulators={simulators}, {len(self._factories)} tasks: expected 0 or more of some")
        if timeout_s <= 0 or start_timeout_s <= 0:
            raise ValueError(f"got timeout_s={timeout_s}, start_timeout_s={start_timeout_s}: expected both > 0")
        self.num_envs = num_envs
        self.num_workers = min(num_workers, num_envs)
        self.replaced = 0  # workers started again, over the life of the pool: after a fault, or elsewhere
        self._simulators = simulators
        self._timeout_s = timeout_s
        self._start_timeout_s = start_timeout_s
        self._place: Workers = place or (
            Processes(self._factories, simulators, timeout_s)
            if self.num_workers
            else InThisProcess(self._factories, simulators)
        )
        tasks = list(self._factories)
        self._journals = [Journal(tasks[slot % len(tasks)]) for slot in range(num_envs)]
        self._workers: dict[int, Worker] = {}
        self._behind: set[int] = set()  # workers whose environments may differ from the journals
        self._closed = False
        self._times = {"simulate": 0.0, "render": 0.0, "wait": 0.0}
        self.specs: dict[str, EnvSpec] = {}  # by task, as `make_env` names them
        try:
            self._start(range(max(1, self.num_workers)), tasks[num_envs:])
        except BaseException:
            self.close()
            raise
        # Of the first task, with the horizon of the longest one.
        longest = max(spec.horizon for spec in self.specs.values())
        self.spec: EnvSpec = dataclasses.replace(self.specs[tasks[0]], horizon=longest)

    # --- calls -----------------------------------------------------------------------------------------------------

    def reset(self, slots: Sequence[int], episodes: Sequence[Episode]) -> list[EnvObservation]:
        """Starts an episode in each slot; returns its first observation."""
        slots, episodes = self._check_slots(slots), list(episodes)
        _require_pairs("episodes", slots, episodes)
        for episode in episodes:
            if not isinstance(episode, Episode):
                raise ValueError(f"got {episode!r} for an episode: expected an envs.base.Episode")
        tasks = [self._known(episode.task, "an episode") for episode in episodes]
        observations = self._call("reset", slots, list(zip(tasks, episodes, strict=True)), tasks)
        for slot, task, episode in zip(slots, tasks, episodes, strict=True):
            self._journals[slot] = Journal(task, episode)
        return observations

    def step(self, slots: Sequence[int], actions: np.ndarray) -> tuple[list[ChunkResult], list[EnvObservation | None]]:
        """Executes a chunk in each slot. An episode that is not done is rendered where it runs; a done one gives None.

        Args:
          actions: float [len(slots), E, action_dim], raw units.
        """
        slots = self._require_started(slots)
        actions = np.array(actions)  # a copy: the journal must not follow the caller's buffer
        width = self.spec.action_dim
        if actions.ndim != 3 or actions.shape[0] != len(slots) or actions.shape[2] != width:
            raise ValueError(f"actions have shape {actions.shape}: expected [{len(slots)} slots, chunk, {width}]")
        finite = np.isfinite(actions).all(axis=(1, 2))
        if not finite.all():
            raise ValueError(
                f"actions of slot {slots[int(np.argmin(finite))]} are not finite: check the policy's output"
            )
        journals = [self._journals[slot] for slot in slots]
        left = [journal.left(self.specs[journal.task].horizon) for journal in journals]
        answers = self._call("step", slots, list(zip(actions, left, strict=True)))
        for journal, chunk, (result, _) in zip(journals, actions, answers, strict=True):
            journal.add(chunk, result)
        return [result for result, _ in answers], [observation for _, observation in answers]

    def branch(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Makes slot targets[i] a bit-exact copy of slot sources[i] as it was before the call."""
        _require_pairs("sources", targets, sources)
        targets, origins = self._check_slots(targets), sorted({int(source) for source in sources})
        snapshots = dict(zip(origins, self.snapshot(origins), strict=True))
        moves = [(s, t) for s, t in zip(sources, targets, strict=True) if s != t]
        steps = {t: self._journals[s].steps for s, t in moves}
        self.restore([t for _, t in moves], [snapshots[s] for s, _ in moves])
        for target, count in steps.items():
            self._journals[target].steps = count

    def snapshot(self, slots: Sequence[int]) -> list[Snapshot]:
        """The full state of each slot, restorable into any slot of any pool of the same environment."""
        if not self.spec.copies:
            raise ValueError("the environments of this pool cannot be copied: they have no snapshot and restore")
        slots = self._require_started(slots)
        return self._call("snapshot", slots, [None] * len(slots))

    def restore(self, slots: Sequence[int], snapshots: Sequence[Snapshot]) -> None:
        """Puts each slot into the state of its snapshot."""
        slots = self._check_slots(slots)
        _require_pairs("snapshots", slots, snapshots)
        tasks = [self._known(snapshot.task, "a snapshot") for snapshot in snapshots]
        self._call("restore", slots, list(zip(tasks, snapshots, strict=True)), tasks)
        for slot, task, snapshot in zip(slots, tasks, snapshots, strict=True):
            self._journals[slot] = Journal(task, snapshot=snapshot, steps=None)

    def render(self, slots: Sequence[int], camera: str, size: int) -> list[np.ndarray]:
        """One frame of each slot, uint8 [size, size, 3], for environments that have `render(camera, size)`."""
        slots = self._require_started(slots)
        return self._call("render", slots, [(camera, size)] * len(slots))

    def take_times(self) -> dict[str, float]:
        """Wall seconds in calls since the last take: simulate and render of the slowest worker, and the rest, wait."""
        times, self._times = self._times, dict.fromkeys(self._times, 0.0)
        return times

    def close(self) -> None:
        """Ends all workers and waits for them. Closing twice is harmless."""
        self._closed = True
        for member in self._workers.values():
            member.hang_up()
        for member in self._workers.values():
            member.end()
        self._workers.clear()
        self._place.close()

    def __enter__(self) -> EnvPool:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # --- one call: to all workers at once, then all answers --------------------------------------------------------

    def _call(self, operation: str, slots: list[int], payloads: list[Any], tasks: Sequence[str] = ()) -> list[Any]:
        """Args: `tasks` of the slots from here on, where they may be others than before."""
        if not slots:
            return []
        others = any(self._journals[slot].task != task for slot, task in zip(slots, tasks, strict=False))
        builds = others or 0 < self._simulators < len(self._factories)
        timeout_s = max(self._timeout_s, self._start_timeout_s) if builds else self._timeout_s
        requests: dict[int, Request] = {}
        for slot, payload in zip(slots, payloads, strict=True):
            requests.setdefault(self._worker_of(slot), (operation, []))[1].append((slot, payload))
        moving = self._place.misplaced() if operation == "reset" else set()
        self._revive((self._behind | moving) & requests.keys())

        start = time.perf_counter()
        self._behind |= requests.keys()  # until every answer is in: an interrupt may come at any point
        replies, faults = self._exchange(requests, timeout_s)
        if faults:
            replies |= self._retry(requests, faults, timeout_s)
        self._behind -= requests.keys()
        self._count(replies.values(), time.perf_counter() - start)

        answers = {
            slot: result
            for index, reply in replies.items()
            for (slot, _), result in zip(requests[index][1], reply.results, strict=True)
        }
        return [answers[slot] for slot in slots]

    def _exchange(self, requests: dict[int, Request], timeout_s: float) -> tuple[dict[int, Reply], dict[int, Fault]]:
        replies: dict[int, Reply] = {}
        faults: dict[int, Fault] = {}
        waiting: dict[int, Worker] = {}
        late: list[int] = []  # a message to or from them stood still
        deadline = time.monotonic() + timeout_s
        for index, request in requests.items():
            try:
                self._workers[index].send(request)
                waiting[index] = self._workers[index]
            except BlockingIOError:
                late.append(index)
            except OSError:
                faults[index] = Fault(self._workers[index].death())
        while waiting:
            ready = self._place.wait(list(waiting.values()), max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for index in [index for index, member in waiting.items() if member in ready]:
                member = waiting.pop(index)
                try:
                    replies[index] = member.receive()
                except BlockingIOError:
                    late.append(index)
                except (EOFError, OSError):
                    faults[index] = Fault(member.death())
        for index in [*late, *waiting]:
            faults[index] = Fault(self._workers[index].late(timeout_s))
            self._workers[index].kill()
        faults |= {index: Fault.of(reply) for index, reply in replies.items() if reply.error is not None}
        return {index: reply for index, reply in replies.items() if reply.error is None}, faults

    def _retry(self, requests: dict[int, Request], faults: dict[int, Fault], timeout_s: float) -> dict[int, Reply]:
        for index, fault in faults.items():
            if not fault.retry:
                raise self._error(index, requests[index], fault)
        for index, fault in faults.items():
            _log.warning("%s; replacing the worker and retrying", self._error(index, requests[index], fault))
        self._revive(faults)
        replies, again = self._exchange({index: requests[index] for index in faults}, timeout_s)
        for index, fault in again.items():
            raise self._error(index, requests[index], fault, "twice ")
        return replies

    def _error(self, index: int, request: Request, fault: Fault, times: str = "") -> PoolError:
        slots = [slot for slot, _ in request[1]] if fault.slot is None else [fault.slot]
        where = f"slot{'s' if len(slots) > 1 else ''} {', '.join(map(str, slots))}"
        return PoolError(f"worker {index} failed {times}on {where} while {worker.DOING[request[0]]}: {fault.text}")

    def _count(self, replies: Any, wall_s: float) -> None:
        slowest = max(replies, key=lambda reply: reply.simulate_s + reply.render_s)
        self._times["simulate"] += slowest.simulate_s
        self._times["render"] += slowest.render_s
        self._times["wait"] += max(0.0, wall_s - slowest.simulate_s - slowest.render_s)

    # --- workers ---------------------------------------------------------------------------------------------------

    def _worker_of(self, slot: int) -> int:
        return slot % max(1, self.num_workers)

    def _slots_of(self, index: int) -> list[int]:
        return [slot for slot in range(self.num_envs) if self._worker_of(slot) == index]

    def _start(self, indices: Sequence[int] | set[int], others: Sequence[str] = ()) -> None:
        """Starts workers, builds their slots' simulators and compares what they say of themselves.

        Args:
            others: tasks that no slot begins with.
        """
        for index in indices:
            self._workers[index] = self._place.start(index, self._slots_of(index))
        made: list[tuple[int, str]] = [(slot, journal.task) for slot, journal in enumerate(self._journals)]
        made += [(number % self.num_envs, task) for number, task in enumerate(others)]
        requests: dict[int, Request] = {index: ("make", []) for index in indices}
        for slot, task in made:
            if self._worker_of(slot) in requests:
                requests[self._worker_of(slot)][1].append((slot, task))
        replies = self._must(requests)
        specs = {
            (slot, task): spec
            for index, reply in replies.items()
            for (slot, task), spec in zip(requests[index][1], reply.results, strict=True)
        }
        for slot, task in sorted(specs, key=made.index):
            spec = specs[slot, task]
            first = self.specs.setdefault(task, spec)
            different = different_spec(spec, first) or different_spec(
                spec, next(iter(self.specs.values())), ("task", "horizon")
            )
            if different:
                index = self._worker_of(slot)
                raise self._error(index, requests[index], Fault(f"{task}: {different}" if task else different, slot))

    def _revive(self, indices: Any) -> None:
        """Replaces workers and brings their slots to the journals' state."""
        indices = set(indices)
        if not indices:
            return
        for index in indices:
            self._workers[index].kill()
            self._workers[index].end()
        self.replaced += len(indices)
        self._start(indices)
        self._must({i: ("replay", [(slot, self._journals[slot]) for slot in self._slots_of(i)]) for i in indices})

    def _must(self, requests: dict[int, Request]) -> dict[int, Reply]:
        replies, faults = self._exchange(requests, self._start_timeout_s)
        for index, fault in faults.items():
            raise self._error(index, requests[index], fault)
        return replies

    # --- checks ----------------------------------------------------------------------------------------------------

    def _check_slots(self, slots: Sequence[int]) -> list[int]:
        slots = [int(slot) for slot in slots]
        if self._closed:
            raise ValueError("the pool is closed: make a new EnvPool")
        wrong = [slot for slot in slots if not 0 <= slot < self.num_envs]
        if wrong:
            raise ValueError(f"slot {wrong[0]} does not exist: expected 0..{self.num_envs - 1}")
        if len(set(slots)) != len(slots):
            raise ValueError(f"slots {slots} repeat one: expected each slot at most once in a call")
        return slots

    def _known(self, task: str, what: str) -> str:
        """The name in the pool of the task that an episode or a snapshot is of."""
        if ONLY in self._factories:
            return ONLY
        if task in self._factories:
            return task
        if not task and len(self._factories) == 1:
            return next(iter(self._factories))
        raise ValueError(f"got {what} of {task!r}: expected one of {', '.join(self._factories)}")

    def _require_started(self, slots: Sequence[int]) -> list[int]:
        slots = self._check_slots(slots)
        for slot in slots:
            if not self._journals[slot].started:
                raise ValueError(f"slot {slot} has no episode: call reset, restore or branch on it first")
        return slots


def _require_pairs(name: str, slots: Sequence[Any], values: Sequence[Any]) -> None:
    if len(slots) != len(values):
        raise ValueError(f"got {len(slots)} slots and {len(values)} {name}: expected one for each slot")
