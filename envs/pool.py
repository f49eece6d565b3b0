"""A pool of environments in worker processes: chunk stepping, bit-exact branching, recovery from worker faults.

Workers are fresh interpreters (never forks: a fork after the parent has used GL or XLA hangs) that talk over a socket
pair. A call either completes or leaves no trace: each slot's journal (base state and chunks since) is written only when
all workers have answered, and a worker that may have gone ahead of it is rebuilt from it before its next use. One slot
that fails again and again at one state is lost; the others go on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from envs.base import ChunkResult, Env, EnvObservation, EnvSpec, Episode, PoolError, SlotsLost, Snapshot
from envs.pool_crew import Call, Crew
from envs.pool_workers import InThisProcess, Processes, Workers
from envs.simulators import Factories
from envs.worker import Journal

ONLY = ""  # the task of a pool that was given one environment without a name
__all__ = ["ONLY", "EnvPool", "PoolError", "SlotsLost"]


class EnvPool:
    """`num_envs` environments (slots) dealt round-robin to `num_workers` processes; 0 workers run in this process.

    Args:
      make_env: builds one environment; picklable and importable in a fresh interpreter, e.g.
        `functools.partial(envs.kitchen.make, "TurnOnSinkFaucet")`. Or several by their tasks, which episodes name; they
        differ in task and horizon alone.
      simulators: most that one worker keeps. 0: each slot has its own, built anew when its task changes and none of
        that task is free. Else slots take turns in them, by snapshots: this moves no number, but environments that
        cannot be copied must have one each.
      timeout_s: seconds that a worker may take to answer one call, or a few times what the slowest one took where that
        is less; a later one is replaced, and does what it was asked slot by slot.
      start_timeout_s: seconds that a new worker may take to import, build its environments and replay their episodes.
      place: where the workers run, and with what; the pool closes it. None: in processes on this machine.

    Raises:
      ValueError: a bad argument, here or in any method (slots out of range or repeated, wrong shapes).
      SlotsLost: an environment raised, died or was late three times at one state, or raised a ValueError there; the
        other slots have done what was asked.
      PoolError: a worker could not be built; or an environment gave what its spec does not say (see `envs.contract`).
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
        workers: Workers = place or (
            Processes(self._factories, simulators, timeout_s)
            if self.num_workers
            else InThisProcess(self._factories, simulators)
        )
        self._simulators = simulators
        tasks = list(self._factories)
        self._journals = [Journal(tasks[slot % len(tasks)]) for slot in range(num_envs)]
        self._crew = Crew(workers, self._journals, self.num_workers, timeout_s, start_timeout_s)
        self._closed = False
        try:
            self._crew.build(range(max(1, self.num_workers)), tasks[num_envs:])
        except BaseException:
            self.close()
            raise
        self.specs: dict[str, EnvSpec] = self._crew.specs  # by task, as `make_env` names them
        # Of the first task, with the horizon of the longest one.
        longest = max(spec.horizon for spec in self.specs.values())
        self.spec: EnvSpec = dataclasses.replace(self.specs[tasks[0]], horizon=longest)

    @property
    def replaced(self) -> int:
        """Workers started again, over the life of the pool: after a fault, or elsewhere."""
        return self._crew.replaced

    # --- calls -----------------------------------------------------------------------------------------------------

    def reset(self, slots: Sequence[int], episodes: Sequence[Episode]) -> list[EnvObservation]:
        """Starts an episode in each slot; returns its first observation."""
        return self.finish(self.begin_reset(slots, episodes))

    def step(self, slots: Sequence[int], actions: np.ndarray) -> tuple[list[ChunkResult], list[EnvObservation | None]]:
        """Executes a chunk in each slot. An episode that is not done is rendered where it runs; a done one gives None.

        Args:
          actions: float [len(slots), E, action_dim], raw units.
        """
        answers = self.finish(self.begin_step(slots, actions))
        return [result for result, _ in answers], [observation for _, observation in answers]

    def begin_reset(self, slots: Sequence[int], episodes: Sequence[Episode]) -> Call:
        """As `reset`, without waiting: see `finish`."""
        slots, episodes = self._check_slots(slots), list(episodes)
        _require_pairs("episodes", slots, episodes)
        for episode in episodes:
            if not isinstance(episode, Episode):
                raise ValueError(f"got {episode!r} for an episode: expected an envs.base.Episode")
        tasks = [self._known(episode.task, "an episode") for episode in episodes]
        begun = {slot: Journal(task, episode) for slot, task, episode in zip(slots, tasks, episodes, strict=True)}

        def settle(answers: Mapping[int, Any]) -> None:
            for slot in answers:
                self._journals[slot] = begun[slot]

        return self._begin("reset", slots, list(zip(tasks, episodes, strict=True)), settle, tasks)

    def begin_step(self, slots: Sequence[int], actions: np.ndarray) -> Call:
        """As `step`, without waiting: see `finish`."""
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
        chunks = dict(zip(slots, actions, strict=True))
        journals = [self._journals[slot] for slot in slots]
        left = [journal.left(self.specs[journal.task].horizon) for journal in journals]

        def settle(answers: Mapping[int, Any]) -> None:
            for slot, (result, _) in answers.items():
                self._journals[slot].add(chunks[slot], result)

        return self._begin("step", slots, zip(actions, left, strict=True), settle)

    def finish(self, call: Call) -> list[Any]:
        """Waits for what `begin_reset` or `begin_step` asked.

        Calls of different slots may be open at once; they are best finished in the order in which they were begun. One
        whose slots are used otherwise before it was finished is forgotten, as if it had never been made.

        Returns:
            In the order of the slots, of a reset the first observations, of a step pairs (result, observation or None).
        """
        answers = self._crew.finish(call)
        if call.lost:
            raise SlotsLost(call.lost, [answers.get(slot) for slot in call.slots])
        return [answers[slot] for slot in call.slots]

    def ready(self, calls: Sequence[Call]) -> Call:
        """The first of some calls that can be finished without waiting, once there is one.

        A program that needs no batch of all slots asks each worker for its own (slot % num_workers), and at once again:
        then no worker waits for another. In which order answers come depends on time; what they hold does not.
        """
        if not calls:
            raise ValueError("got no calls: expected one or more that begin_reset or begin_step gave")
        return self._crew.ready(calls)

    def branch(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Makes slot targets[i] a bit-exact copy of slot sources[i] as it was before the call."""
        _require_pairs("sources", targets, sources)
        targets, origins = self._check_slots(targets), sorted({int(source) for source in sources})
        lost: dict[int, str] = {}
        snapshots = dict(zip(origins, _answered(self.snapshot, lost, origins), strict=True))
        lost |= {t: lost[s] for s, t in zip(sources, targets, strict=True) if s in lost}
        moves = [(s, t) for s, t in zip(sources, targets, strict=True) if s != t and t not in lost]
        steps = {t: self._journals[s].steps for s, t in moves}
        _answered(self.restore, lost, [t for _, t in moves], [snapshots[s] for s, _ in moves])
        for target, count in steps.items():
            if target not in lost:
                self._journals[target].steps = count
        if lost:
            raise SlotsLost(lost, [None] * len(targets))

    def snapshot(self, slots: Sequence[int]) -> list[Snapshot]:
        """The full state of each slot, restorable into any slot of any pool of the same environment."""
        if not self.spec.copies:
            raise ValueError("the environments of this pool cannot be copied: they have no snapshot and restore")
        slots = self._require_started(slots)
        return self.finish(self._begin("snapshot", slots, [None] * len(slots), _nothing))

    def restore(self, slots: Sequence[int], snapshots: Sequence[Snapshot]) -> None:
        """Puts each slot into the state of its snapshot."""
        slots = self._check_slots(slots)
        _require_pairs("snapshots", slots, snapshots)
        tasks = [self._known(snapshot.task, "a snapshot") for snapshot in snapshots]
        given = {
            slot: Journal(task, snapshot=snapshot, steps=None)
            for slot, task, snapshot in zip(slots, tasks, snapshots, strict=True)
        }

        def settle(answers: Mapping[int, Any]) -> None:
            for slot in answers:
                self._journals[slot] = given[slot]

        self.finish(self._begin("restore", slots, zip(tasks, snapshots, strict=True), settle, tasks))

    def render(self, slots: Sequence[int], camera: str, size: int) -> list[np.ndarray]:
        """One frame of each slot, uint8 [size, size, 3], for environments that have `render(camera, size)`."""
        slots = self._require_started(slots)
        return self.finish(self._begin("render", slots, [(camera, size)] * len(slots), _nothing))

    def take_times(self) -> dict[str, float]:
        """Wall seconds in calls since the last take: simulate and render of the slowest worker, and the rest, wait.

        What that worker simulated and rendered while the caller did other things is `hidden`; `busy` are the seconds
        that all workers together simulated and rendered.
        """
        times, self._crew.times = self._crew.times, dict.fromkeys(self._crew.times, 0.0)
        return times

    def close(self) -> None:
        """Ends all workers and waits for them. Closing twice is harmless."""
        if not self._closed:
            self._closed = True
            self._crew.close()

    def __enter__(self) -> EnvPool:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _begin(
        self,
        operation: str,
        slots: list[int],
        payloads: Iterable[Any],
        settle: Callable[[Mapping[int, Any]], None],
        tasks: Sequence[str] = (),
    ) -> Call:
        """Args: `tasks` of the slots from here on, where they may be others than before."""
        others = any(self._journals[slot].task != task for slot, task in zip(slots, tasks, strict=False))
        builds = others or 0 < self._simulators < len(self._factories)
        return self._crew.begin(Call(operation, slots, settle, builds), payloads)

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
            if not self._journals[slot].started and slot not in self._crew.gone:
                raise ValueError(f"slot {slot} has no episode: call reset, restore or branch on it first")
        return slots


def _require_pairs(name: str, slots: Sequence[Any], values: Sequence[Any]) -> None:
    if len(slots) != len(values):
        raise ValueError(f"got {len(slots)} slots and {len(values)} {name}: expected one for each slot")


def _answered(ask: Callable[..., Any], lost: dict[int, str], *args: Any) -> Any:
    """What a call gives, with None for the slots that are lost in it, which are noted in `lost`."""
    try:
        return ask(*args)
    except SlotsLost as error:
        lost |= error.lost
        return error.answers


def _nothing(answers: Mapping[int, Any]) -> None:
    """What is to be noted of a call that changes no state."""
