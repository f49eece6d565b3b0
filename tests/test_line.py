"""The line between processes: real ones, without JAX, that end in all the ways in which processes end."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import pytest

from z1_jax import line
from z1_jax.errors import UserError
from z1_jax.line import open_line

ROOT = pathlib.Path(__file__).parent.parent
# Exchanges its number again and again, and says so; then does what it is told to.
PROCESS = """
import sys, time
from z1_jax import line
line.SILENT_S, line.BEAT_S, line._PATIENCE_S = 2.0, 0.2, 1.0
port, count, index, act = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
mine = line.open_line("localhost", port, count, index, 20)
for turn in range(10_000):
    values = mine.exchange([index, turn])
    assert values == [[i, turn] for i in range(count)], values
    if turn == 3:
        print("under way", flush=True)
    if turn == 10:  # when all have said so
        if act == "raise":
            mine.end("failed: no such thing", line.FAILED)
            sys.exit(2)
        if act == "leave":
            mine.exchange("end")
            mine.close()
            sys.exit(0)
    time.sleep(0.01)
"""


def free_ports() -> int:
    """A port whose neighbour is free too."""
    while True:
        with socket.create_server(("", 0)) as one:
            port = one.getsockname()[1]
            try:
                if port < 65_000:
                    socket.create_server(("", port + 1)).close()
                    return port
            except OSError:
                continue


def start(count: int, port: int, acts: dict[int, str] | None = None) -> list[subprocess.Popen]:
    acts = acts or {}
    return [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(port), str(count), str(index), acts.get(index, "go on")],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(count)
    ]


def end(processes: list[subprocess.Popen]) -> list[tuple[int, str]]:
    """Exit code and stderr of each."""
    told = []
    for process in processes:
        try:
            told.append((process.returncode, process.communicate(timeout=30)[1]))
            told[-1] = (process.returncode, told[-1][1])
        except subprocess.TimeoutExpired:
            process.kill()
            raise
    return told


@pytest.mark.parametrize("who", [0, 2])
@pytest.mark.parametrize("how", ["SIGKILL", "SIGSTOP", "raise"])
def test_when_one_ends_all_end_and_say_who_and_why(who, how):
    port = free_ports()
    processes = start(3, port, {who: "raise"} if how == "raise" else {})
    for process in processes:
        assert process.stdout.readline() == "under way\n", process.stderr.read()
    began = time.monotonic()
    if how != "raise":
        processes[who].send_signal(getattr(signal, how))
    others = [process for i, process in enumerate(processes) if i != who]
    told = end(others)
    assert time.monotonic() - began < 15  # two seconds of silence, on a busy machine
    if how == "SIGSTOP":  # what was stopped finds the others gone
        processes[who].send_signal(signal.SIGCONT)
    end([processes[who]])
    why = {"SIGKILL": "ended without a word", "SIGSTOP": "was not heard from for 2 s", "raise": "failed: no such thing"}
    for code, text in told:
        assert code == line.FAILED and text.count("\n") == 2, text  # an empty line before it
        assert f"error: process {who} (pid {processes[who].pid} on {socket.gethostname()})" in text and why[how] in text
    for number in (port, port + 1):
        socket.create_server(("", number)).close()


def test_all_leave_in_peace():
    for code, text in end(start(3, free_ports(), dict.fromkeys(range(3), "leave"))):
        assert (code, text) == (0, "")


def test_a_port_in_use_is_one_line():
    port = free_ports()
    for taken in (port, port + 1):
        with socket.create_server(("", taken)), pytest.raises(UserError, match=f"port {taken} cannot be used"):
            open_line("localhost", port, 2, 0, 1)


def test_a_coordinator_that_does_not_answer_is_one_line():
    began = time.monotonic()
    with pytest.raises(UserError, match="does not answer within 1 s .*is process 0 running there"):
        open_line("localhost", free_ports(), 2, 1, 1)
    assert time.monotonic() - began < 10
    with pytest.raises(UserError, match="host no-such-host.invalid is not known"):
        open_line("no-such-host.invalid", 1234, 2, 1, 1)


def test_who_does_not_come_is_named():
    with pytest.raises(UserError, match="process 1, 2 of 3 did not come within 1 s"):
        open_line("localhost", free_ports(), 3, 0, 1)


def test_two_runs_that_share_a_coordinator_are_told_so():
    port = free_ports()
    first = start(2, port)
    try:
        for process in first:
            assert process.stdout.readline() == "under way\n"
        with pytest.raises(UserError, match="a run of 2 processes is under way there"):
            open_line("localhost", port, 2, 1, 10)
        with pytest.raises(UserError, match="another run may have them"):
            open_line("localhost", port, 2, 0, 10)
        assert all(process.poll() is None for process in first)  # the run there is not disturbed
    finally:
        for process in first:
            process.kill()
            process.communicate()


def test_a_second_process_of_one_number_is_refused():
    port = free_ports()
    code = f"from z1_jax.line import open_line; open_line('localhost', {port}, 3, int(__import__('sys').argv[1]), 60)"
    command, env = [sys.executable, "-c", code], {**os.environ, "PYTHONPATH": str(ROOT)}
    first = [subprocess.Popen([*command, str(i)], env=env, stderr=subprocess.PIPE, text=True) for i in (0, 1, 1)]
    try:
        with pytest.raises(UserError) as error:
            open_line("localhost", port, 2, 1, 30)
        assert "it expects 2 processes, process 0 expects 3" in str(error.value)
        until = time.monotonic() + 50
        while time.monotonic() < until and first[1].poll() is None and first[2].poll() is None:
            time.sleep(0.1)
        late, early = (1, 2) if first[1].poll() is not None else (2, 1)  # whichever came first has joined
        told = first[late].communicate(timeout=10)[1]
        assert "has joined already: do two runs share this coordinator?" in told
        assert f"process 1 (pid {first[early].pid} on" in told
    finally:
        for process in first:
            process.kill()
            process.communicate()
