"""The small runs that `survival.py` disturbs: their settings, how far one is, what it came to, and its processes."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

ROOT = pathlib.Path(__file__).parent.parent
EVERY = 3  # iterations from one checkpoint of RL to the next
SETTINGS = {
    "env.suite": "faulty_world:World",
    "model.preset": "tiny",
    "demos.episodes": 150,
    "sft.steps": 60,
    "sft.batch_size": 16,
    "sft.optim.warmup_steps": 5,
    "sft.checkpoint_every": 15,
    "log.every": 5,
    "env.parallel": 16,
    "env.timeout_s": 8.0,
    "group.count": 4,
    "group.size": 4,
    "group.branching": "tree",
    "group.prefix_chunks": 2,
    "reward.keep_low": 0.0,
    "update.batch_size": 32,
    "update.micro_batch": 32,
    "train.iterations": 12,
    "train.checkpoint_every": EVERY,
    "eval.episodes": 32,
    "eval.videos": 1,
}
STAGES = ("start", "demonstrations", "sft", "before", "grpo", "saving", "after")
PATIENCE_S = 400.0  # for a run that ends by itself


@dataclasses.dataclass
class Injection:
    """One disturbance, at a moment that follows from the seed."""

    kind: str
    stage: str = ""  # when: so many records of this stage are there
    count: int = 0
    delay_s: float = 0.0  # and so long after that
    survived: bool | None = None  # None: it has not happened
    lost: int = 0  # iterations of RL that were done again
    recovered_s: float | None = None  # until the run was where it had been
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Position:
    """How far a run directory is."""

    sft: int
    before: int
    grpo: int
    after: int
    saved: int  # iterations of RL in its newest checkpoint

    @property
    def total(self) -> int:
        return self.sft + self.before + self.grpo + self.after


class Runs:
    """Starts the command, and looks at what it did."""

    def __init__(self, work: pathlib.Path):
        self.work = work
        self.environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"} | {
            "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'benchmarks'}",
            "TMPDIR": str(work / "tmp"),
            "Z1_JAX_CACHE": os.environ.get("Z1_JAX_CACHE") or str(work / "xla"),
            "JAX_PLATFORMS": "cpu",
        }
        (work / "tmp").mkdir(parents=True, exist_ok=True)

    def start(
        self,
        run_dir: pathlib.Path,
        file_bytes: int = 0,
        faults: str = "",
        more: Sequence[str] = (),
        log: pathlib.Path | None = None,
    ) -> subprocess.Popen:
        """Starts the command of a run directory.

        Args:
          file_bytes: no file may be larger, as on a full disk; 0: any.
          faults: what goes wrong in environments (faulty_world.py).
          more: arguments.
          log: names the log in place of the run directory.
        """
        keys = [f"--config.{key}={value}" for key, value in (SETTINGS | {"run_dir": run_dir}).items()]
        with (self.work / f"{(log or run_dir).name}.log").open("ab") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "z1_jax.train", "--config=configs/grpo.py:small_world", *keys, *more],
                cwd=ROOT,
                env=self.environment | {"Z1_FAULTS": faults},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        if file_bytes:
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
        return process

    def last_line(self, run_dir: pathlib.Path) -> str:
        """What was printed last, in brief."""
        with (self.work / f"{run_dir.name}.log").open("rb") as log:
            log.seek(max(0, log.seek(0, 2) - 5000))
            lines = log.read().decode(errors="replace").strip().splitlines() or [""]
        return lines[-1][:300]

    def ends(self, process: subprocess.Popen) -> int | None:
        """Its exit code; None, and it is killed, where it does not end."""
        try:
            return process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            return None


def lines(path: pathlib.Path) -> list[dict[str, Any]]:
    """The whole records of a file."""
    found = []
    with contextlib.suppress(OSError):
        for line in path.read_bytes().splitlines():
            with contextlib.suppress(ValueError):
                found.append(json.loads(line))
    return [one for one in found if isinstance(one, dict)]


def position(run_dir: pathlib.Path) -> Position:
    """Read from the files, as they are while the run goes on."""
    stages = collections.Counter(one.get("stage") for one in lines(run_dir / "metrics.jsonl"))
    seeds = {name: len(lines(run_dir / "evaluation" / f"{name}.jsonl")) for name in ("before", "after")}
    saved = [int(p.parent.name) for p in run_dir.glob("checkpoints/grpo/*/files.json") if p.parent.name.isdigit()]
    return Position(stages["sft"], seeds["before"], stages["grpo"], seeds["after"], max(saved, default=0))


def reached(run_dir: pathlib.Path, injection: Injection) -> bool:
    """Whether the moment of an injection has come, its delay aside."""
    stage, count = injection.stage, injection.count
    if stage == "start":
        return True
    if stage == "demonstrations":
        journal = run_dir / "demonstrations.episodes"
        with contextlib.suppress(OSError):
            return journal.stat().st_size > 3_000 * count
        return (run_dir / "demonstrations").exists()
    if stage == "saving":
        now = position(run_dir).grpo
        return now >= count and any(run_dir.glob("checkpoints/grpo/*tmp*")) or now > count + EVERY
    return getattr(position(run_dir), stage) >= count


def drawn(rng: random.Random, kind: str, stages: tuple[str, ...] = STAGES) -> Injection:
    """One at a random moment: half of them in RL."""
    weights = [{"grpo": 6, "sft": 3, "saving": 1}.get(stage, 1) for stage in stages]
    stage = rng.choices(stages, weights)[0]
    most = {"start": 1, "demonstrations": 15, "sft": 11, "before": 16, "grpo": 11, "saving": 8, "after": 16}[stage]
    delay = rng.uniform(0, 6.0 if stage == "start" else 0.3)
    return Injection(kind, stage, rng.randrange(0 if stage == "grpo" else 1, most + 1), round(delay, 2))


def in_order(injections: list[Injection]) -> list[Injection]:
    order = [stage for stage in STAGES if stage != "saving"]
    return sorted(injections, key=lambda i: (order.index("grpo" if i.stage == "saving" else i.stage), i.count))


def workers(process: subprocess.Popen) -> list[int]:
    """The processes that it started to simulate."""
    found = []
    for path in pathlib.Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parent = int(path.read_text().rpartition(")")[2].split()[1])
            if parent == process.pid and b"envs.worker" in (path.parent / "cmdline").read_bytes():
                found.append(int(path.parent.name))
    return sorted(found)


def left_behind(pids: list[int]) -> list[int]:
    """Those that live on three seconds after their parent."""
    until = time.monotonic() + 3
    while (alive := [pid for pid in pids if running(pid)]) and time.monotonic() < until:
        time.sleep(0.05)
    return alive


def running(pid: int) -> bool:
    """Whether a process is there, and no zombie."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def outcome(run_dir: pathlib.Path) -> dict[str, Any]:
    """What a finished run came to, without what is measured by the clock."""
    from z1_jax.checkpoint import Checkpoints

    checkpoints = Checkpoints(run_dir / "checkpoints" / "grpo")
    step = checkpoints.steps()[-1]
    digest = checkpoints.digest(step, ("params", "optimizer"))
    checkpoints.close()
    records = [
        {key: value for key, value in one.items() if not key.startswith("time/")}
        for one in lines(run_dir / "metrics.jsonl")
    ]
    episodes = {name: lines(run_dir / "evaluation" / f"{name}.jsonl") for name in ("before", "after")}
    summary = json.loads((run_dir / "summary.json").read_text())
    films = json.loads((run_dir / "videos" / "outcomes.json").read_text())
    return {
        "checkpoint": [step, digest],
        "records": records,
        "training episodes": lines(run_dir / "episodes.jsonl"),
        "evaluation": {name: sorted(rows, key=lambda row: row["seed"]) for name, rows in episodes.items()},
        "sentence": summary["sentence"],
        "films": films,
    }


def different(one: dict[str, Any], other: dict[str, Any]) -> str:
    """In what two outcomes differ; empty where they are equal to the bit."""
    return ", ".join(key for key in one if one[key] != other[key])


def fresh(folder: pathlib.Path) -> pathlib.Path:
    """The folder, empty."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.with_suffix(".log").unlink(missing_ok=True)
    return folder


def digests(folder: pathlib.Path) -> dict[str, str]:
    """Of every file."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in paths}


def half_way(runs: Runs) -> pathlib.Path:
    """A run directory that was stopped in RL by Ctrl-C, with checkpoints of both stages."""
    run_dir, made = runs.work / "half-way", runs.work / "half-way.made"
    if not made.exists():
        fresh(run_dir)
        process = runs.start(run_dir)
        while process.poll() is None and position(run_dir).grpo < EVERY + 2:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        runs.ends(process)
        assert position(run_dir).saved >= EVERY, runs.last_line(run_dir)
        made.touch()
    return run_dir
