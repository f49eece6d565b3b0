"""The worker's side of the pool: serves requests for a few environment slots, in its own process or in the caller's.

A request is (operation, [(slot, payload), ...]); a reply is a `Reply`. Knows environments only through `envs.base.Env`
and never imports JAX.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import os
import pathlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Sequence
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from envs import elsewhere
from envs.base import ChunkResult, Env, EnvObservation, EnvSpec, Episode, Snapshot
from envs.contract import ContractError, check_frame, check_observation, check_result
from envs.pool_frames import Reply, SharedAnswers
from envs.simulators import Factories, Simulators
from envs.text import shortened

Request = tuple[str, list[tuple[int, Any]]]  # operation, then (slot, payload) in order of execution

_PR_SET_PDEATHSIG = 1  # of linux/prctl.h
STRETCH_S = 0.5  # of a job between two answers
MOST_TEXT = 4000  # characters of an exception that reach the parent

HOME = str(pathlib.Path(__file__).resolve().parent.parent)  # of the package envs

DOING = {
    "make": "building the environment",
    "reset": "resetting",
    "step": "stepping a chunk",
    "snapshot": "taking a snapshot",
    "restore": "restoring a snapshot",
    "render": "rendering",
    "replay": "replaying the episode so far",
    "begin": "beginning an episode",
    "advance": "in an episode",
}


@dataclasses.dataclass
class Journal:
    """How one slot came to its present state: enough to bring a fresh environment there, bit for bit."""

    task: str = ""  # of what is simulated, by its name in the pool
    episode: Episode | None = None  # the last one started, or None when `snapshot` is the base
    snapshot: Snapshot | None = None  # the last snapshot restored
    chunks: list[np.ndarray] = dataclasses.field(default_factory=list)  # actions [E, A] executed since the base
    steps: int | None = 0  # control steps since the episode began; None where a snapshot from elsewhere is the base

    @property
    def started(self) -> bool:
        return self.episode is not None or self.snapshot is not None

    def left(self, horizon: int) -> int | None:
        """Control steps up to the horizon, where it is known how many there were."""
        return None if self.steps is None else max(0, horizon - self.steps)

    def add(self, chunk: np.ndarray, result: ChunkResult) -> None:
        """Notes a chunk that was executed."""
        self.chunks.append(chunk)
        self.steps = None if self.steps is None else self.steps + int(result.steps)


class SlotServer:
    """Holds the simulators of some slots and executes requests on them, one item after the other.

    Args:
        factories, simulators: as `Simulators` takes them.
    """

    def __init__(self, factories: Factories, simulators: int) -> None:
        self._simulators = Simulators(factories, simulators)
        self._running: dict[int, Generator[None, None, Any]] = {}
        self._simulate_s = 0.0
        self._render_s = 0.0
        self._seen: list[tuple[int, EnvObservation]] = []  # in this request, to be checked at its end

    def serve(self, request: Request) -> Reply:
        """Executes a request. An exception of an environment becomes a reply that holds its text in one line."""
        operation, items = request
        self._simulate_s = self._render_s = 0.0
        self._seen.clear()
        results: list[Any] = []
        execute = getattr(self, f"_{operation}")
        slot: int | None = None
        try:
            for slot, payload in items:
                results.append(execute(slot, payload))
            for slot, seen in self._seen:  # together: right after a simulator ran, one check takes as long as four
                check_observation(seen, self._simulators.spec(slot))
        except Exception as error:  # noqa: BLE001 - whatever an environment raises must reach the parent
            broken = isinstance(error, ContractError)
            text = shortened(str(error) if broken else f"{type(error).__name__}: {error}", MOST_TEXT)
            return Reply(
                results,
                self._simulate_s,
                self._render_s,
                text,
                error_slot=slot,
                lasting=broken,
                wrong=type(error) is ValueError,
            )
        return Reply(results, self._simulate_s, self._render_s)

    def close(self) -> None:
        self._simulators.close()

    def _simulate(self, function: Callable, *args: Any) -> Any:
        start = time.perf_counter()
        try:
            return function(*args)
        finally:
            self._simulate_s += time.perf_counter() - start

    def _observe(self, slot: int) -> EnvObservation:
        env = self._simulate(self._simulators.of, slot)
        start = time.perf_counter()
        observation = env.observe()
        self._render_s += time.perf_counter() - start
        self._seen.append((slot, observation))
        return observation

    def _make(self, slot: int, task: str) -> EnvSpec:
        return self._simulators.prepare(slot, task)

    def _reset(self, slot: int, payload: tuple[str, Episode]) -> EnvObservation:
        task, episode = payload
        self._simulate(lambda: self._simulators.begin(slot, task).reset(episode))
        return self._observe(slot)

    def _step(self, slot: int, payload: tuple[np.ndarray, int | None]) -> tuple[ChunkResult, EnvObservation | None]:
        actions, left = payload
        result = self._simulate(lambda: self._simulators.of(slot).step_chunk(actions))
        check_result(result, len(actions), left)
        return result, None if result.done else self._observe(slot)

    def _snapshot(self, slot: int, payload: None) -> Snapshot:
        return self._simulate(self._simulators.snapshot, slot)

    def _restore(self, slot: int, payload: tuple[str, Snapshot]) -> None:
        task, snapshot = payload
        self._simulate(self._simulators.restore, slot, snapshot, task)

    def _render(self, slot: int, payload: tuple[str, int]) -> np.ndarray:
        env = self._simulate(self._simulators.of, slot)
        start = time.perf_counter()
        frame = _frame(env, *payload)
        self._render_s += time.perf_counter() - start
        return check_frame(frame, payload[1])

    def _begin(self, slot: int, payload: tuple[str, Callable[[Env], Generator[None, None, Any]]]) -> Any:
        task, work = payload
        self._running[slot] = work(self._simulators.begin(slot, task))
        return self._advance(slot, None)

    def _advance(self, slot: int, payload: None) -> Any:
        """Runs what was begun up to a yield after some time: None, or what it returns at its end."""
        until = time.monotonic() + STRETCH_S
        try:
            while True:
                next(self._running[slot])
                if time.monotonic() >= until:
                    return None
        except StopIteration as ended:
            return ended.value

    def _replay(self, slot: int, journal: Journal) -> None:
        if not journal.started:
            return
        env = self._simulators.begin(slot, journal.task)
        if journal.snapshot is not None:
            env.restore(journal.snapshot)
        elif journal.episode is not None:
            env.reset(journal.episode)
        for actions in journal.chunks:
            env.step_chunk(actions)


def _frame(env: Env, camera: str, size: int) -> np.ndarray:
    """A picture for people [size, size, 3]: the environment's own, or what the policy sees, each pixel repeated."""
    if hasattr(env, "render"):
        return env.render(camera, size)
    image = env.observe().images[camera]
    rows = np.arange(size) * image.shape[0] // size
    return np.ascontiguousarray(image[rows][:, rows])


def main(fd: int, parent: int, with_thread: bool, shared: Sequence[int]) -> None:
    """Serves requests from the pipe `fd` until it closes.

    Args:
      parent: the process id of the pool's owner; with_thread: the thread that started this process lives as long.
      shared: file descriptors of the memory for answers.
    """
    for number in (signal.SIGINT, signal.SIGTERM):  # a stop is the parent's to handle: it closes the pipe
        signal.signal(number, signal.SIG_IGN)
    if with_thread:
        kill_with_parent(parent)
    threading.Thread(target=exit_with_parent, args=(parent,), daemon=True).start()
    connection, answers = Connection(fd), SharedAnswers(shared)
    try:
        server = SlotServer(*connection.recv())
    except Exception as error:  # noqa: BLE001 - an environment that cannot be imported here is the parent's to report
        connection.recv()
        text = shortened(f"{type(error).__name__}: {error}", MOST_TEXT)
        connection.send_bytes(answers.pack(Reply([], error=text, lasting=True)))
        return
    try:
        while True:
            connection.send_bytes(answers.pack(server.serve(connection.recv())))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        server.close()


def command(fd: int, parent: int, shared: Sequence[int], python: str = "") -> Sequence[str]:
    """The command line of a worker: a fresh interpreter with this one's import path, which never runs `__main__`.

    Args:
        python: another interpreter, with its own import path (see `envs.elsewhere`).
    """
    main_thread = threading.current_thread() is threading.main_thread()
    # The package envs is ours, whatever the working directory holds.
    ours = f"import sys; sys.path.insert(0, {HOME!r}); import envs\nsys.path[:] = {sys.path!r}\n"
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        f"{elsewhere.BOOT if python else ours}"
        f"from envs.worker import main; main({fd}, {parent}, {main_thread}, {list(shared)})"
    )
    return [python or sys.executable, "-c", code]


def kill_with_parent(parent: int) -> None:
    """Has the kernel end this process when the thread that started it ends: also one that is stopped, or deep in C.

    Linux alone can; elsewhere nothing happens.
    """
    if sys.platform != "linux":
        return
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before
        os._exit(1)


def exit_with_parent(parent: int) -> None:
    """Ends this process when `parent` has: the pipe's end tells an idle worker, not one deep inside an environment."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)
