"""Workers of a pool as Ray actors, on this machine and on others: where they are placed, what is sent, how they end.

Each actor takes one unit of the resource `simulator`, which hosts offer (`ray start --resources='{"simulator": 16}'`).
Chunks of actions go there, frames and states come back, in Ray's messages or through its object store; nothing of the
policy leaves the learner. The pool does the rest as with processes of its own: deadlines, journals, replacement.
Importing this needs no Ray.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from collections import Counter, deque
from collections.abc import Sequence
from typing import Any

from envs.base import PoolError
from envs.pool_frames import Reply
from envs.pool_workers import Worker
from envs.ray_actor import actor_class, facts, numbered
from envs.ray_cluster import RESOURCE, HeadWatch, connect, ray_module
from envs.simulators import Factories
from envs.text import shortened
from envs.worker import HOME, MOST_TEXT, Request

# So long a replacement waits for a unit of its own, then it shares a host with others; Ray needs up to 25 s to see that
# a node is gone.
CROWD_AFTER_S = 30.0
WAITING_EVERY_S = 20.0  # between two lines that say that actors wait
TRIES = 4  # to start an actor
MOST_PENDING = 8  # requests that may lie at one actor; the pool has one there, or two
# Bytes of an answer that travels in Ray's message itself. From host to host this is much faster than by way of two
# object stores (benchmarks/ray_pool.py); larger ones go that way.
_INSIDE = 10 * 2**20
_LOOK_S = 1.0
_FETCH_S = 30.0  # longest that an answer may take which Ray said was here
_log = logging.getLogger(__name__)


class RayWorkers:
    """Where a pool's actors run: a Ray cluster.

    Args:
        num_workers: actors, each with one unit of the resource `simulator`.
        address: of the cluster, HOST:PORT; "auto": the one that runs on this machine. Empty: that of RAY_ADDRESS, or
            else one is started here and ends with the pool.
        start_timeout_s: seconds that an actor may wait for a host; then the pool fails.
        name: of the pool, before the names of its actors in Ray's dashboard, e.g. "grpo-OpenDrawer-seed0".

    Raises:
        PoolError: no such cluster, or one of another version of Ray or Python. `wait` raises it when its head is gone.
        ModuleNotFoundError: Ray is not installed.
        ValueError: the factories cannot be sent.
    """

    prompt = False

    def __init__(
        self,
        factories: Factories,
        simulators: int,
        num_workers: int,
        address: str = "",
        start_timeout_s: float = 120.0,
        name: str = "pool",
    ) -> None:
        self._ray = ray_module()
        self._num_workers, self._name = num_workers, name
        self._longest_s = max(start_timeout_s / 2, start_timeout_s - 2 * _LOOK_S)  # before the pool calls it late
        self._start_timeout_s = start_timeout_s
        self._leave = connect(self._ray, address, num_workers)
        try:
            self._packed = self._ray.cloudpickle.dumps((dict(factories), simulators))
        except Exception as error:  # noqa: BLE001 - pickling runs the factories' own code
            self._leave()
            raise ValueError(f"make_env cannot be sent to an actor ({error}): expected what can be pickled") from None
        self._actor = self._ray.remote(actor_class())
        self._members: dict[int, RayWorker] = {}
        self._starts: Counter[int] = Counter()
        self.deadly: set[str] = set()  # nodes where an actor died or did not answer
        self._told = time.monotonic()
        self._head = HeadWatch(self._ray.get_runtime_context().gcs_address)

    def start(self, index: int, slots: Sequence[int]) -> RayWorker:
        """An actor that Ray places where a unit of the resource is free, as soon as there is one."""
        self._members[index] = RayWorker(self, index, slots, again=self._starts[index] > 0)
        return self._members[index]

    def wait(self, members: Sequence[RayWorker], timeout_s: float) -> list[RayWorker]:
        deadline = time.monotonic() + timeout_s
        while True:
            if self._head.gone:
                raise PoolError(self._head.gone)
            self._attend(members)
            if refused := [member for member in members if member.refused]:
                return refused
            by_ref = {member.oldest: member for member in members}
            patience = max(0.0, min(_LOOK_S, deadline - time.monotonic()))
            if self._ray.wait(list(by_ref), num_returns=1, timeout=patience)[0]:
                ready, _ = self._ray.wait(list(by_ref), num_returns=len(by_ref), timeout=0)
                if heard := [by_ref[ref] for ref in ready if not by_ref[ref].stillborn()]:
                    return heard
            if time.monotonic() >= deadline:
                return []

    def misplaced(self) -> set[int]:
        """Actors that share a host beyond its units, as far as units are free by now."""
        crowded = [index for index, member in self._members.items() if member.crowded]
        if not crowded:
            return set()
        free = int(self._ray.available_resources().get(RESOURCE, 0))
        if moving := sorted(crowded)[:free]:
            _log.warning("%d %s free: moving there: %s", free, _units(free), numbered("simulator", moving))
        return set(moving)

    def close(self) -> None:
        self._head.close()
        self._leave()

    def summary(self) -> str:
        """Where the actors are, in a line."""
        hosts: dict[str, list[int]] = {}
        for index, member in sorted(self._members.items()):
            hosts.setdefault(member.host, []).append(index)
        told = "; ".join(f"{host}: {numbered('simulator', indices)}" for host, indices in hosts.items())
        return f"{len(self._members)} simulator actors of Ray on {len(hosts)} host{'s' * (len(hosts) > 1)} ({told})"

    # --- for its workers -------------------------------------------------------------------------------------------

    def create(self, index: int, slots: Sequence[int], crowded: bool) -> Any:
        """A new actor.

        Args:
            crowded: without a unit of its own, on the host that has most units for each actor.
        """
        self._starts[index] += 1
        title = f"{self._name} simulator {index}"
        options: dict[str, Any] = {"resources": {RESOURCE: 1}, "scheduling_strategy": "SPREAD"}
        if crowded:
            affinity = self._ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy
            options = {"scheduling_strategy": affinity(self._roomiest(), soft=False)}
        threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # the actors are the parallelism
        inside = {"RAY_max_direct_call_object_size": str(_INSIDE)}
        actor = self._actor.options(
            name=f"{title} slots {','.join(map(str, slots))} start {self._starts[index]}",
            num_cpus=0,
            max_restarts=0,  # the pool replaces it, from its journals
            max_task_retries=0,
            max_pending_calls=MOST_PENDING,
            runtime_env={"env_vars": threads | inside},
            **options,
        )
        path = [HOME, *(os.path.abspath(entry) for entry in sys.path)]
        return actor.remote(path, self._packed, title)

    def hosts(self) -> dict[str, float]:
        """Units of the resource on each living host, by Ray's id of the node."""
        alive = [node for node in self._ray.nodes() if node["Alive"]]
        return {node["NodeID"]: node["Resources"].get(RESOURCE, 0.0) for node in alive}

    def _roomiest(self) -> str:
        hosts = {node: units for node, units in self.hosts().items() if units}
        crowd = Counter(member.node for member in self._members.values())
        # Ray takes seconds to see that a node is gone: rather not one where an actor died.
        return max(hosts, key=lambda node: (node not in self.deadly, hosts[node] / (1 + crowd[node])))

    def lacking(self) -> str:
        """What the cluster has and what is wanted, in a line."""
        hosts = self.hosts()
        units = sum(hosts.values())
        free = self._ray.available_resources().get(RESOURCE, 0.0)
        return (
            f"the cluster has {units:g} {_units(units)} on {sum(map(bool, hosts.values()))} of {len(hosts)} nodes, "
            f"{free:g} free, and this pool wants {self._num_workers}; ask for fewer workers, or start nodes with "
            f"ray start --address=HEAD:PORT --resources='{{\"{RESOURCE}\": N}}'"
        )

    def _attend(self, members: Sequence[RayWorker]) -> None:
        """Sees to actors that no host has taken yet."""
        waiting = [member for member in members if not member.placed]
        for member in waiting:
            if member.again and not member.crowded and member.waited_s > CROWD_AFTER_S and any(self.hosts().values()):
                member.crowd()
            elif member.waited_s > self._longest_s:
                member.refused = f"no host took it within {self._start_timeout_s:g} s: {self.lacking()}"
        late = [member.index for member in waiting if member.waited_s > WAITING_EVERY_S]
        if late and time.monotonic() > self._told + WAITING_EVERY_S:
            self._told = time.monotonic()
            _log.warning("waiting for a place: %s; %s", numbered("simulator", late), self.lacking())


class RayWorker(Worker):
    """A worker in an actor."""

    def __init__(self, place: RayWorkers, index: int, slots: Sequence[int], again: bool) -> None:
        self._place, self._ray, self._slots = place, place._ray, slots
        self.index, self.again, self.crowded = index, again, False
        self._requests: deque[tuple[Request, Any]] = deque()  # with the references of their answers
        self._facts: dict[str, Any] = {}
        self._death = "the actor is dead"
        self.refused = ""  # why no host took it
        self._closing: Any = None
        self._tries = 0
        self._create()

    def _create(self) -> None:
        self._begun, self._dead = time.monotonic(), False
        self._actor = self._place.create(self.index, self._slots, self.crowded)
        self._hello = self._actor.hello.remote()

    @property
    def oldest(self) -> Any:
        """The reference of the answer that comes next."""
        return self._requests[0][1]

    @property
    def waited_s(self) -> float:
        return time.monotonic() - self._begun

    @property
    def placed(self) -> bool:
        """It runs somewhere, or died."""
        return bool(self._facts) or bool(self._ray.wait([self._hello], timeout=0)[0])

    @property
    def host(self) -> str:
        return self._facts.get("host", "no host")

    @property
    def node(self) -> str:
        return self._facts.get("node", "")

    def crowd(self) -> None:
        """Starts it once more, without a unit of its own, on a host where others are."""
        _log.warning(
            "simulator %d found no free unit within %g s: it shares a host until one is free; %s",
            self.index,
            CROWD_AFTER_S,
            self._place.lacking(),
        )
        self.crowded = True
        self._create_again()

    def stillborn(self) -> bool:
        """Whether it died before it ran, as on a node that Ray did not know to be gone; then it is created again."""
        if self._facts:
            return False
        try:
            self._facts = self._ray.get(self._hello, timeout=_FETCH_S)
        except self._ray.exceptions.RayError as error:
            self._tries += 1
            if self._tries < TRIES:
                _log.warning("simulator %d did not start (%s); trying again", self.index, shortened(str(error), 200))
                self._create_again()
                return True
        return False

    def _create_again(self) -> None:
        self.kill()
        self._create()
        self._requests = deque((request, self._actor.serve.remote(request)) for request, _ in self._requests)

    def send(self, request: Request) -> None:
        try:
            self._requests.append((request, self._actor.serve.remote(request)))
        except self._ray.exceptions.PendingCallsLimitExceeded as error:
            raise BlockingIOError(str(error)) from error
        except self._ray.exceptions.RayError as error:
            self._note(error)
            raise OSError(self._death) from error

    def receive(self) -> Reply:
        """The oldest answer; its arrays are read-only."""
        if self.refused:
            return Reply([], error=self.refused, lasting=True)
        _, ref = self._requests.popleft()
        try:
            if not self._facts:
                self._facts = self._ray.get(self._hello, timeout=_FETCH_S)
            if wrong := self._unlike():
                return Reply([], error=wrong, lasting=True)
            return self._ray.get(ref, timeout=_FETCH_S)
        except self._ray.exceptions.GetTimeoutError as error:
            raise BlockingIOError(str(error)) from error
        except self._ray.exceptions.RayError as error:
            self._note(error)
            raise OSError(self._death) from error

    def _unlike(self) -> str:
        """Why the actor's host cannot simulate for this process; empty where it can."""
        if self._facts["error"]:
            text = shortened(" ".join(self._facts["error"].split()), MOST_TEXT)
            return f"host {self.host} cannot import it ({text}): install there what is installed here"
        for key, mine in facts().items():
            if (theirs := self._facts.get(key)) != mine:
                return (
                    f"host {self.host} has {key} {theirs}, this process {mine}: numbers would differ; make them alike"
                )
        return ""

    def _note(self, error: Exception) -> None:
        """Keeps why the actor died: the sentence of Ray's pages that says it."""
        self._dead = True
        self._place.deadly.add(self.node)
        gone = self.node and self.node not in self._place.hosts()
        text = " ".join(str(error).split())
        detail = text.rpartition("Worker exit detail: ")[2].partition(" Some common causes")[0]
        where = f" on host {self.host} (pid {self._facts['pid']})" if self._facts else ""
        why = "its node is gone" if gone else shortened(detail, 200)
        self._death = f"the actor{where} died: {why}"

    def death(self) -> str:
        self.kill()
        return self._death

    def late(self, timeout_s: float) -> str:
        self._place.deadly.add(self.node)
        return f"no answer within {timeout_s:g} s" + (f" from host {self.host}" if self._facts else "")

    def kill(self) -> None:
        if not self._dead:
            self._dead = True
            with contextlib.suppress(self._ray.exceptions.RayError):
                self._ray.kill(self._actor, no_restart=True)

    def hang_up(self) -> None:
        if not self._dead and self._facts:
            with contextlib.suppress(self._ray.exceptions.RayError):
                self._closing = self._actor.close.remote()

    def end(self, patience_s: float = 2.0) -> None:
        if self._closing is not None:
            self._ray.wait([self._closing], timeout=patience_s)
        self.kill()
        self._requests.clear()


def _units(count: float) -> str:
    return f"unit{'s' * (count != 1)} of the resource {RESOURCE}"
