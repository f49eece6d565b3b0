"""Runs of two processes of which one is killed or stopped at a moment that is drawn: part of `survival.py`.

`survived` means here: the other process ends within 60 s and says in a line which one is missing, no process is left,
the same two commands continue the run, and it ends in the numbers of a run of two processes that was left alone.
"""

from __future__ import annotations

import os
import pathlib
import random
import shutil
import signal
import socket
import subprocess
import time
from typing import Any

from survival_runs import (
    PATIENCE_S,
    STAGES,
    Injection,
    Runs,
    different,
    drawn,
    fresh,
    in_order,
    left_behind,
    outcome,
    position,
    reached,
    workers,
)

END_S = 60.0  # longest that the other process, and a stopped one that is continued, may take to end
KINDS = ("kill of a process", "kill of a process", "stop of a process", "kill of a process")
CHAINS = 2  # runs, each with these


def plan(seed: int) -> dict[str, list[Injection]]:
    """The disturbed runs and what is injected into each."""
    stages = tuple(stage for stage in STAGES if stage != "start")
    chains = {}
    for n in range(CHAINS):
        rng = random.Random(f"{seed} processes-{n}")
        chains[f"processes-{n}"] = in_order([drawn(rng, kind, stages) for kind in KINDS])
    return chains


def undisturbed(runs: Runs) -> dict[str, Any]:
    """What two processes come to that are left alone."""
    alone = runs.work / "alone-2"
    if not (alone / "summary.json").exists():
        codes = [runs.ends(process) for process in both(runs, alone)]
        assert codes == [0, 0], (codes, runs.last_line(alone), runs.last_line(second(alone)))
    return outcome(alone)


def disturbed(runs: Runs, name: str, injections: list[Injection], reference: dict[str, Any]) -> list[Injection]:
    """One run of two processes with its injections in turn, to its end; fills in what became of each."""
    run_dir = fresh(runs.work / name)
    fresh(second(run_dir))
    rng = random.Random(name)
    for one in injections:
        pair, base = both(runs, run_dir), position(run_dir).total
        began = time.monotonic()
        while not (reached(run_dir, one) and (position(run_dir).total > base or one.stage == "demonstrations")):
            if any(process.poll() is not None for process in pair) or time.monotonic() > began + PATIENCE_S:
                break
            time.sleep(0.01)
        time.sleep(one.delay_s)
        if any(process.poll() is not None for process in pair):
            one.note = "the run ended before"
            close(pair)
            continue
        hit(runs, run_dir, pair, rng.randrange(2), one)
    pair = both(runs, run_dir)
    codes = [runs.ends(process) for process in pair]
    difference = different(outcome(run_dir), reference) if codes == [0, 0] else f"exit {codes}"
    for one in injections:
        if one.survived and difference:
            one.survived, one.note = False, f"differs in {difference}"
    shutil.rmtree(run_dir)
    return injections


def hit(runs: Runs, run_dir: pathlib.Path, pair: list[subprocess.Popen], victim: int, one: Injection) -> None:
    """Kills or stops one of the two, and looks how both end."""
    children = [child for process in pair for child in workers(process)]
    log = run_dir if victim == 1 else second(run_dir)
    written = (runs.work / f"{log.name}.log").stat().st_size  # by earlier pairs too
    began = time.monotonic()
    stop = one.kind.startswith("stop")
    pair[victim].send_signal(signal.SIGSTOP if stop else signal.SIGKILL)
    code = ended(pair[1 - victim])
    one.recovered_s = round(time.monotonic() - began, 1)
    if stop:
        pair[victim].send_signal(signal.SIGCONT)
        ended(pair[victim])
    both_ended = all(process.poll() is not None for process in pair)
    close(pair)
    now = position(run_dir)
    one.lost = max(0, now.grpo - now.saved)
    text = (runs.work / f"{log.name}.log").read_bytes()[written:].decode(errors="replace")
    told = [line for line in text.splitlines() if "error: " in line][-1:]  # of process 1: "process 1: error: …"
    named = bool(told) and f"process {victim} (" in told[0]
    one.note = told[0][:300] if told else f"exit {code}: {runs.last_line(log)}"
    one.survived = code not in (None, 0) and both_ended and named and not left_behind(children)
    print(f"  {run_dir.name}: {one.kind} {victim} at {now}: {one.recovered_s} s, {one.note}", flush=True)


def both(runs: Runs, run_dir: pathlib.Path) -> list[subprocess.Popen]:
    flags = [f"--coordinator=localhost:{free_port()}", "--processes=2"]
    return [runs.start(run_dir, more=[*flags, f"--process={n}"], log=second(run_dir) if n else run_dir) for n in (0, 1)]


def second(run_dir: pathlib.Path) -> pathlib.Path:
    """Names the log of process 1."""
    return run_dir.with_name(f"{run_dir.name}-process-1")


def free_port() -> int:
    """The first of two that nobody uses."""
    while True:
        with socket.socket() as one, socket.socket() as other:
            one.bind(("", 0))
            try:
                other.bind(("", one.getsockname()[1] + 1))
            except OSError:
                continue
            return one.getsockname()[1]


def ended(process: subprocess.Popen) -> int | None:
    """Its exit code; None where it does not end in time."""
    try:
        return process.wait(END_S)
    except subprocess.TimeoutExpired:
        return None


def close(pair: list[subprocess.Popen]) -> None:
    for process in pair:
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
        process.wait()
