"""Answers through shared memory against plain pickles; nothing of it is left after any end."""

import dataclasses
import functools
import os
import pathlib
import pickle
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
import tiny_env
from seeds import fresh_seed
from tiny_env import TinyEnv

from envs import pool_frames
from envs.base import ChunkResult, EnvObservation, EnvSpec, Episode, episodes
from envs.pool import EnvPool
from envs.pool_frames import Reply, SharedAnswers, anonymous

LINUX = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="the system has no anonymous files")


class Named(EnvObservation):
    """An observation of an environment's own class."""


def random_reply(rng: np.random.Generator) -> Reply:
    """What a worker may answer to a reset or a step; now and then what no environment should give."""
    size, cameras, results = int(rng.integers(1, 40)), ["eye", "hand"][: int(rng.integers(1, 3))], []
    for _ in range(int(rng.integers(0, 5))):
        pixels = {name: rng.integers(0, 256, (size, size, 3), np.uint8) for name in cameras}
        images = {name: image[::-1] if rng.random() < 0.3 else image for name, image in pixels.items()}
        state = rng.normal(size=6).astype(np.float32)[:: int(rng.integers(1, 3))]
        seen = (Named if rng.random() < 0.1 else EnvObservation)(images, state, "é" * int(rng.integers(9)))
        chunk = ChunkResult(int(rng.integers(9)), np.bool_(True), bool(rng.random() < 0.5), 0.25)
        results.append(seen if rng.random() < 0.3 else (chunk, None if rng.random() < 0.2 else seen))
    return Reply(results, 1.5, 2.5, *(("raised", 3, True) if rng.random() < 0.2 else ()))


@LINUX
def test_replies_come_as_plain_pickles_would_bring_them(rng):
    """Observations travel apart from pickles; every field, class and bit is there again, and may be written to."""
    fds = anonymous()
    here, there = SharedAnswers([os.dup(fd) for fd in fds]), SharedAnswers(fds)
    flat = 0
    for _ in range(100):
        sent = random_reply(rng)
        got = there.unpack(here.pack(sent))
        expected = pickle.loads(pickle.dumps(sent))
        assert tuples(got) == tuples(expected)
        flat += pool_frames._flattened(sent) is not None
        for answer in got.results:
            seen = answer[1] if isinstance(answer, tuple) else answer
            for array in (*seen.images.values(), seen.state) if seen else ():
                array += 1
    assert 20 < flat < 100
    here.close()
    there.close()


def tuples(reply: Reply) -> tuple:
    """The same as classes, values and bytes."""
    rows = []
    for answer in reply.results:
        chunk, seen = answer if isinstance(answer, tuple) else ("none", answer)
        images = seen and [(name, image.dtype.str, image.shape, image.tobytes()) for name, image in seen.images.items()]
        rows.append((repr(chunk), type(seen), images, seen and (seen.state.dtype.str, seen.state.tolist())))
        rows.append(seen and seen.instruction)
    return (rows, repr(dataclasses.replace(reply, results=[])))


class WideEnv(TinyEnv):
    """Frames of 64 pixels in two cameras, each pixel of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.spec = EnvSpec("Wide", ("eye", "hand"), 64, action_dim=3, state_dim=2, control_hz=20.0, horizon=12)

    def observe(self) -> EnvObservation:
        rng = np.random.default_rng(self._x.view(np.uint64))
        images = {name: rng.integers(0, 256, (64, 64, 3), np.uint8) for name in self.spec.cameras}
        return EnvObservation(images, self._x.astype(np.float32), "hold still")


def random_value(rng: np.random.Generator):
    """Arrays of all kinds and sizes, within each other."""
    kinds = ["u1", "f4", "f8", "i8", "?"]
    arrays = []
    for _ in range(int(rng.integers(0, 5))):
        shape = tuple(rng.integers(0, 60, int(rng.integers(0, 4))).tolist())
        array = np.array(rng.random(shape) * 255).astype(kinds[int(rng.integers(len(kinds)))])
        layout = rng.random()
        arrays.append(np.asfortranarray(array) if layout < 0.3 else array[::2] if shape and layout < 0.6 else array)
    return {"arrays": arrays, "words": "é" * int(rng.integers(0, 9000)), "more": [(arrays[:1], None, 3.5)]}


@LINUX
def test_values_come_as_plain_pickles_would_bring_them(rng):
    """Two may lie there at once; what was taken is changed by no later one, and may be written to."""
    fds = anonymous()
    here, there = SharedAnswers([os.dup(fd) for fd in fds]), SharedAnswers(fds)
    kept = []
    for _ in range(40):
        sent = [random_value(rng) for _ in range(int(rng.integers(1, pool_frames.ANSWERS + 1)))]
        messages = [here.pack(value) for value in sent]
        kept += [(pickle.dumps(value), there.unpack(message)) for value, message in zip(sent, messages, strict=True)]
    for expected, got in kept:
        value = pickle.loads(expected)
        assert value["words"] == got["words"]
        for one, other in zip(value["arrays"], got["arrays"], strict=True):
            np.testing.assert_array_equal(one, other)
            assert one.dtype == other.dtype and other.flags.writeable
            assert other.flags.aligned
    here.close()
    there.close()


@LINUX
def test_large_arrays_do_not_go_through_the_pipe():
    fds = anonymous()
    answers = SharedAnswers(fds)
    frames = [np.zeros((224, 224, 3), np.uint8) for _ in range(3)]
    assert len(answers.pack(frames)) < 1000 < 3 * 224 * 224 * 3 < len(SharedAnswers([]).pack(frames))
    answers.close()


@pytest.mark.parametrize("memory", [True, False])
def test_what_a_caller_keeps_is_not_overwritten(memory, monkeypatch):
    """Every frame of three chunks, looked at when all is over, is that of the environment alone."""
    if not memory:
        monkeypatch.setattr(pool_frames, "anonymous", lambda: [])
        monkeypatch.setattr("envs.pool_workers.anonymous", lambda: [])
    seed = fresh_seed(__name__, "not overwritten") % 10**8
    actions = np.random.default_rng(seed).normal(size=(2, 6, 4, 3))
    with EnvPool(WideEnv, 6, 2) as pool:
        halves = [0, 1, 2], [3, 4, 5]
        calls = [pool.begin_reset(half, episodes(range(seed + half[0], seed + half[0] + 3))) for half in halves]
        kept: dict[int, list] = {slot: [] for slot in range(6)}
        for chunk in (0, 1, None):
            for number, half in enumerate(halves):
                for slot, answer in zip(half, pool.finish(calls[number]), strict=True):
                    kept[slot].append(answer[1] if isinstance(answer, tuple) else answer)
                if chunk is not None:
                    calls[number] = pool.begin_step(half, actions[chunk][half])
    for slot in range(6):
        env = WideEnv()
        env.reset(Episode(seed + slot))
        for number, seen in enumerate(kept[slot]):
            if number:
                result = env.step_chunk(actions[number - 1, slot])
                assert (seen is None) == result.done
                if result.done:
                    break
            expected = env.observe()
            np.testing.assert_array_equal(seen.state, expected.state)
            for name in ("eye", "hand"):
                np.testing.assert_array_equal(seen.images[name], expected.images[name])


def held() -> set[str]:
    """Open files of this process that are such memory, and what lies in /dev/shm."""
    links = [os.readlink(path) for path in pathlib.Path("/proc/self/fd").iterdir() if path.is_symlink()]
    mapped = [line for line in pathlib.Path("/proc/self/maps").read_text().splitlines() if "z1-answers" in line]
    return {*[link for link in links if "z1-answers" in link], *mapped, *os.listdir("/dev/shm")}


@LINUX
@pytest.mark.parametrize("how", ["closed", "worker killed", "worker stopped"])
def test_nothing_is_left_of_a_pool(how):
    before = held()
    with EnvPool(WideEnv, 2, 2, timeout_s=1.0) as pool:
        pool.reset([0, 1], episodes([1, 2]))
        for number in range(3) if how != "closed" else ():
            signals = {"worker killed": signal.SIGKILL, "worker stopped": signal.SIGSTOP}
            os.kill(pool._crew.workers[number % 2]._process.pid, signals[how])
            pool.step([0, 1], np.zeros((2, 1, 3)))
        assert sum(" " not in name and "z1-answers" in name for name in held()) <= 2 * pool_frames.ANSWERS
    assert held() == before


@LINUX
@pytest.mark.parametrize("workers_first", [False, True])
def test_nothing_is_left_when_the_parent_is_killed(workers_first):
    """Anonymous memory lives as long as a process that holds it: the workers end, and no name was ever there."""
    names = set(os.listdir("/dev/shm"))
    script = textwrap.dedent(f"""
        import sys, time
        sys.path.insert(0, {os.path.dirname(tiny_env.__file__)!r})
        sys.path.insert(0, {os.path.dirname(__file__)!r})
        from test_pool_frames import WideEnv
        from envs.base import episodes
        from envs.pool import EnvPool
        with EnvPool(WideEnv, 2, 2) as pool:
            pool.reset([0, 1], episodes([1, 2]))
            print(*[member._process.pid for member in pool._crew.workers.values()], flush=True)
            time.sleep(100)
    """)
    known = {**os.environ, "PYTHONPATH": ":".join(sys.path)}
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=known)
    try:
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 2
        for pid in pids if workers_first else ():
            os.kill(pid, signal.SIGKILL)
        parent.kill()
        parent.wait(timeout=10)
        deadline = time.monotonic() + 10
        while (left := [pid for pid in pids if mapping(pid)]) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not left
        assert set(os.listdir("/dev/shm")) == names
    finally:
        parent.kill()
        parent.stdout.close()


def mapping(pid: int) -> bool:
    try:
        return "z1-answers" in pathlib.Path(f"/proc/{pid}/maps").read_text()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return False


@LINUX
def test_without_memory_left_answers_go_through_the_pipe(monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    fds = anonymous()
    here, there = SharedAnswers([os.dup(fd) for fd in fds]), SharedAnswers(fds)
    frame = np.arange(100_000, dtype=np.uint8)
    for _ in range(3):
        np.testing.assert_array_equal(there.unpack(here.pack(frame)), frame)
    here.close()
    there.close()


def test_an_environment_with_frames_of_any_size_fits(tmp_path):
    """The memory grows with what is asked for: here pictures for people, much larger than the policy's."""
    with EnvPool(functools.partial(TinyEnv), 2, 1) as pool:
        pool.reset([0, 1], episodes([1, 2]))
        for size in (16, 800, 300):
            frames = pool.render([0, 1], "eye", size)
            assert [frame.shape for frame in frames] == [(size, size, 3)] * 2
            expected = TinyEnv()
            expected.reset(Episode(2))
            np.testing.assert_array_equal(frames[1], expected.render("eye", size))
