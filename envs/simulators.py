"""The simulators of one worker: kept by task and used again, by its slots in turns where there are fewer than slots.

A slot that has none at the moment is a snapshot: taken when another slot needs the simulator, restored before the
slot's next chunk. Restoring is exact, so that it moves no number.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping

from envs.base import Env, EnvSpec, Snapshot, copies
from envs.contract import ContractError, check_snapshot, check_spec, different_spec

Factories = Mapping[str, Callable[[], Env]]  # by task


@dataclasses.dataclass
class _Simulator:
    task: str
    env: Env
    slot: int | None = None  # whose state it holds; None: nobody's that is still wanted
    used: int = 0  # when it was last asked for


@dataclasses.dataclass
class _Slot:
    task: str
    begun: bool = False  # it has a state
    saved: Snapshot | None = None  # that state, while no simulator holds it


class Simulators:
    """At most `most` simulators for any number of slots.

    Args:
        factories: what builds a simulator, by task.
        most: 0: each slot has its own as long as it stays with a task. Fewer than slots: they take turns.
    """

    def __init__(self, factories: Factories, most: int):
        self._factories, self._most = factories, most
        self._simulators: list[_Simulator] = []
        self._slots: dict[int, _Slot] = {}
        self._specs: dict[str, EnvSpec] = {}
        self._clock = itertools.count(1)

    def __len__(self) -> int:
        return len(self._simulators)

    def spec(self, slot: int) -> EnvSpec:
        """Of the slot's task."""
        return self._specs[self._slots[slot].task]

    def begin(self, slot: int, task: str) -> Env:
        """A simulator of a task for a slot that starts anew there: what it was is forgotten.

        Raises:
            ContractError: a simulator had to be built, and is not like the first one of its task.
        """
        held = self._held(slot)
        if held is not None and held.task != task:
            held.slot, held = None, None
        self._slots[slot] = _Slot(task)
        simulator = held or self._pick(task)
        simulator.slot, simulator.used = slot, next(self._clock)
        self._slots[slot].begun = True
        return simulator.env

    def prepare(self, slot: int, task: str) -> EnvSpec:
        """Makes sure that a slot can begin with a task, and says what the task's simulators are."""
        self.begin(slot, task)
        self._slots[slot].begun = False
        return self._specs[task]

    def of(self, slot: int) -> Env:
        """The simulator that holds the slot's state, after a restore where it was another's turn."""
        state, held = self._slots[slot], self._held(slot)
        if held is None:
            assert state.saved is not None, "a slot that begun has a simulator or a snapshot"
            held = self._pick(state.task)
            held.slot = None  # until the restore went well
            held.env.restore(state.saved)
            held.slot, state.saved = slot, None
        held.used = next(self._clock)
        return held.env

    def snapshot(self, slot: int) -> Snapshot:
        """The slot's state."""
        state, held = self._slots[slot], self._held(slot)
        if held is None:
            assert state.saved is not None, "a slot that begun has a simulator or a snapshot"
            return state.saved
        return dataclasses.replace(check_snapshot(held.env.snapshot()), task=state.task)

    def restore(self, slot: int, snapshot: Snapshot, task: str) -> None:
        """Puts a slot into the state of a snapshot, where slots take turns when its turn comes.

        One that no pool took is tried at once.
        """
        if self._most and snapshot.task:
            if (held := self._held(slot)) is not None:
                held.slot = None
            self._slots[slot] = _Slot(task, begun=True, saved=snapshot)
        else:
            self.begin(slot, task).restore(snapshot)

    def close(self) -> None:
        """Closes all of them."""
        for simulator in self._simulators:
            simulator.env.close()
        self._simulators.clear()

    def _held(self, slot: int) -> _Simulator | None:
        return next((one for one in self._simulators if one.slot == slot), None)

    def _pick(self, task: str) -> _Simulator:
        """A simulator of a task that a slot may have: a free one, a new one, or one that another slot has to leave."""
        mine = [one for one in self._simulators if one.task == task]
        free = [one for one in mine if one.slot is None]
        if free:
            return free[0]
        if len(self._simulators) < (self._most or len(self._slots)):
            return self._build(task)
        if mine and self._most:
            return self._vacated(min(mine, key=lambda one: one.used))
        self._drop()
        return self._build(task)

    def _vacated(self, simulator: _Simulator) -> _Simulator:
        """The simulator, after its slot's state was saved."""
        if simulator.slot is not None and self._slots[simulator.slot].begun:
            self._slots[simulator.slot].saved = self.snapshot(simulator.slot)
        simulator.slot = None
        return simulator

    def _drop(self) -> None:
        """Closes one simulator: a free one before others, of the task that has most, the one that rested longest."""
        count = {task: sum(one.task == task for one in self._simulators) for task in self._factories}
        leaving = min(self._simulators, key=lambda one: (one.slot is not None, -count[one.task], one.used))
        self._vacated(leaving)
        self._simulators.remove(leaving)
        leaving.env.close()

    def _build(self, task: str) -> _Simulator:
        env = self._factories[task]()
        spec = dataclasses.replace(check_spec(env.spec), copies=copies(env))
        if other := different_spec(spec, self._specs.setdefault(task, spec)):
            env.close()
            raise ContractError(other)
        if self._most and not spec.copies:
            env.close()
            raise ContractError(
                "the environment's snapshot and restore: got none, expected both where slots take turns in simulators"
            )
        self._simulators.append(_Simulator(task, env))
        return self._simulators[-1]
