"""python -m z1_jax.study [--config=configs/study.py]: many tasks, several seeds; SFT, specialists, joint; one table.

Each run is a process of its own below the study's folder. Stopped anywhere, the same command goes on; several machines
may share the folder: a run belongs to who holds its lock, which is free when that process has ended.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import IO

import numpy as np

from z1_jax.config.schema import ConfigError
from z1_jax.errors import UserError
from z1_jax.files import absolute, lock, write_whole
from z1_jax.interrupt import INTERRUPTED
from z1_jax.metrics import read_records
from z1_jax.process import run_main
from z1_jax.report import html
from z1_jax.study.config import JOINT, SFT, Cell, StudyConfig, cells, parse_study
from z1_jax.study.table import Outcome, markdown, means, rows

STUDY, RESULTS, TABLE, PAGE = "study.json", "results.json", "table.md", "study.html"


def main(argv: Sequence[str]) -> int | None:
    """Makes the runs that are left, and the table of those that are there; exits with 1 where one failed."""
    study = parse_study(argv)
    planned = cells(study)
    folder = absolute(study.folder)
    _claim(study, folder)
    print(f"study {folder}: {len(planned)} runs", flush=True)
    failed: list[str] = []
    while (cell := _next(folder, planned, failed)) is not None:
        taken, claim = cell
        with claim:
            print(f"\n══ {taken.name} ({_left(folder, planned)})\n{shlex.join(_command(taken))}", flush=True)
            code = _run(taken, claim)
        if code == 130 or code < 0:
            print(INTERRUPTED, file=sys.stderr)
            return 130
        if code:
            failed.append(taken.name)
    conclude(study, folder, planned)
    left = [cell.name for cell in planned if not _finished(folder, cell)]
    if left:
        waits = "" if failed else ": under way elsewhere, or after what is"
        print(f"{len(left)} of {len(planned)} runs are not finished{waits}; the same command goes on")
    for name in failed:
        print(f"failed: {name}", file=sys.stderr)
    return 1 if failed else None


def _run(cell: Cell, claim: IO[str]) -> int:
    """Runs a cell to its end, and returns its exit code. It holds the claim while it lives, and is told of Ctrl-C."""
    process = subprocess.Popen(_command(cell), process_group=0, pass_fds=[claim.fileno()])
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            process.send_signal(signal.SIGINT)


def _command(cell: Cell) -> list[str]:
    return [sys.executable, "-m", "z1_jax.train", *cell.argv[1:]]


def _claim(study: StudyConfig, folder: pathlib.Path) -> None:
    """Makes the study's folder, or checks that it belongs to this study.

    Raises:
        ConfigError: it belongs to another one, or is something else.
    """
    path, mine = folder / STUDY, json.loads(json.dumps({**dataclasses.asdict(study), "folder": ""}))
    if path.exists():
        try:
            theirs = dict(json.loads(path.read_text()))
        except (ValueError, TypeError) as error:
            raise ConfigError(
                f"{path} cannot be read ({error}); restore it or choose another --config.folder"
            ) from error
        for key, value in mine.items():
            if theirs.get(key) != value:
                raise ConfigError(
                    f"{folder} belongs to another study ({key} is {theirs.get(key)!r}, asked for {value!r}); "
                    "choose another --config.folder"
                )
        return
    if folder.is_dir() and any(folder.iterdir()):
        raise ConfigError(f"{folder} is not empty and holds no study (no {STUDY}); choose another --config.folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(mine, indent=1))
    except OSError as error:
        raise ConfigError(f"config key folder: {folder} cannot be written ({error.strerror})") from error


def _next(folder: pathlib.Path, planned: Sequence[Cell], failed: Sequence[str]) -> tuple[Cell, IO[str]] | None:
    """A run that is left, whose start is there, and on which nobody else works, with its lock; None: there is none."""
    for cell in planned:
        ready = not cell.needs or (folder / cell.needs / "summary.json").exists()
        if not ready or cell.name in failed or _finished(folder, cell):
            continue
        claim = (folder / f"{cell.name}.lock").open("a")
        try:
            lock(claim, folder / cell.name)
        except UserError:
            claim.close()
            continue
        if not _finished(folder, cell):  # it may have been finished since
            return cell, claim
        claim.close()
    return None


def _finished(folder: pathlib.Path, cell: Cell) -> bool:
    return (folder / cell.name / "summary.json").exists()


def _seconds(folder: pathlib.Path, cell: Cell) -> float:
    return sum(map(float, json.loads((folder / cell.name / "summary.json").read_text())["wall_seconds"].values()))


def _left(folder: pathlib.Path, planned: Sequence[Cell]) -> str:
    """How many runs are left, and the hours that they take by those of their kind that are there."""
    done: dict[str, list[float]] = {}
    for cell in planned:
        if _finished(folder, cell):
            done.setdefault(cell.kind, []).append(_seconds(folder, cell))
    left = [cell for cell in planned if not _finished(folder, cell)]
    unknown = sorted({cell.kind for cell in left} - set(done))
    hours = sum(float(np.mean(done[cell.kind])) for cell in left if cell.kind in done) / 3600
    known = f"{hours:.1f} hours of one machine" if len(unknown) < len({cell.kind for cell in left}) else ""
    more = f"{' and ' * bool(known)}{', '.join(unknown)} of unknown length" if unknown else ""
    return f"{len(left)} of {len(planned)} runs left: {known}{more}"


def outcomes(folder: pathlib.Path, planned: Sequence[Cell]) -> list[Outcome]:
    """The held-out episodes of the runs that are finished, by form, task and training seed."""
    found = []
    for cell in planned:
        if not _finished(folder, cell):
            continue
        summary = json.loads((folder / cell.name / "summary.json").read_text())
        by_task: dict[str, list[dict]] = {}
        for record in read_records(folder / cell.name / "evaluation" / "after.jsonl"):
            by_task.setdefault(str(record.get("task", cell.task)), []).append(record)
        for task, records in by_task.items():
            seeds = tuple(int(record["seed"]) for record in records)
            success = np.array([bool(record["success"]) for record in records])
            steps = int(summary.get("simulated_steps", 0))
            found.append(Outcome(cell.kind, task, cell.seed, seeds, success, steps))
    return found


def conclude(study: StudyConfig, folder: pathlib.Path, planned: Sequence[Cell]) -> None:
    """Writes results.json, table.md and study.html of what is finished, and prints the means."""
    found = outcomes(folder, planned)
    if not found:
        return
    tasks = list(dict.fromkeys(outcome.task for outcome in found))
    confidence = 0.95
    over, each = means(found, confidence), rows(found, confidence)
    steps = {kind: _simulated(found, kind) for kind in dict.fromkeys(outcome.form for outcome in found) if kind != SFT}
    seconds = {cell.name: _seconds(folder, cell) for cell in planned if _finished(folder, cell)}
    results = {
        "means": {mean.form: mean.rate for mean in over},
        "intervals": {mean.form: mean.interval for mean in over},
        "simulated_steps": steps,
        "wall_seconds": seconds,
        "rows": [
            {"form": one.form, "training_seed": one.seed, "task": one.task, "seed": seed, "success": bool(success)}
            for one in found
            for seed, success in zip(one.episodes, one.success, strict=True)
        ],
    }
    write_whole(folder / RESULTS, json.dumps(results))
    text = markdown(over, each, {"tasks": len(tasks), "seeds": len(study.seeds)}, confidence)
    spent = ", ".join(f"{kind} {count:,}" for kind, count in steps.items()) or "none"
    text += f"\nSimulated control steps of RL: {spent}. Hours of all runs: {sum(seconds.values()) / 3600:.2f}.\n"
    write_whole(folder / TABLE, text)
    write_whole(folder / PAGE, _page(text, f"{len(tasks)} tasks"))
    print("\n" + text.partition("\n\n")[0] + f"\n{folder / TABLE}, {folder / PAGE}, {folder / RESULTS}", flush=True)


def _simulated(found: Sequence[Outcome], kind: str) -> int:
    """Simulated steps of RL of one form: each run counts once, and a joint one has several tasks."""
    runs = {(one.seed, "" if kind == JOINT else one.task): one.simulated_steps for one in found if one.form == kind}
    return sum(runs.values())


def _page(text: str, title: str) -> str:
    """The Markdown tables as a page."""
    parts: list[str] = []
    table: list[list[str]] = []
    for line in [*text.splitlines(), ""]:
        if line.startswith("|"):
            table.append([cell.strip() for cell in line.strip("|").split("|")])
            continue
        if table:
            parts.append(
                html.section("Means" if not parts else "Each task", html.table(table[2:], table[0], "numbers"))
            )
            table = []
        if line:
            parts.append(f'<p class="note">{html.text(line)}</p>')
    return html.page(title, f"<header><h1>{html.text(title)}</h1></header>" + "".join(parts))


if __name__ == "__main__":
    run_main(main)
