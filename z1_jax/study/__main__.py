"""python -m z1_jax.study [--config=configs/study.py]: many tasks, several seeds; SFT, specialists, joint; one table.

Each run is a process of its own below the study's folder. Stopped anywhere, the same command goes on; several machines
may share the folder: a run belongs to who holds its lock, which is free when that process has ended.

`--report` makes no run: it writes the tables of what is finished. `--table=FILE` prints those of a study's
results.json, wherever that lies. `--no-probe` leaves out the measurement from which hours are projected at first.
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
from typing import IO, Any

from z1_jax.config.schema import FREE_KEYS, Config, ConfigError, among, build, flat
from z1_jax.errors import UserError, first_line
from z1_jax.files import absolute, lock, partial_path, read_json, write_whole
from z1_jax.interrupt import INTERRUPTED
from z1_jax.policy import find_policy
from z1_jax.process import run_main
from z1_jax.study import projection, results
from z1_jax.study.config import Cell, StudyConfig, cells, parse_study, parsed
from z1_jax.study.results import finished
from z1_jax.study.text import page
from z1_jax.suites import settled

STUDY, RESULTS, TABLE, PAGE = "study.json", "results.json", "table.md", "study.html"
CONCLUDING = "conclude.lock"
AGAIN, REPORT, NO_PROBE = "--table=", "--report", "--no-probe"
# Of a run's config what its command line says otherwise, and what moves no number.
_LOOSE = (*FREE_KEYS, "init", "checkpoint", "task", "tasks", "eval.videos", "eval.film_seeds", "flow.steps")


def main(argv: Sequence[str]) -> int | None:
    """Makes the runs that are left, and the table of those that are there; exits with 1 where one failed."""
    if len(argv) == 2 and argv[1].startswith(AGAIN):
        print(results.tables(results.read(absolute(argv[1].removeprefix(AGAIN)))), end="")
        return None
    study = parse_study([one for one in argv if one not in (REPORT, NO_PROBE)])
    planned = cells(study)
    folder = absolute(study.folder)
    if REPORT in argv and not any(finished(folder, cell) for cell in planned):
        raise UserError(f"no run of this study is finished in {folder}; expected the --config.folder that it was given")
    if REPORT not in argv:
        settled(parsed(planned[0]))  # a suite that is not installed is told before anything is made
        if study.start:
            find_policy(study.start)
    _claim(study, folder, planned)
    check_runs(folder, planned)
    if REPORT in argv:
        conclude(folder, planned)
        return None
    rates = projection.measured(folder, planned) if NO_PROBE not in argv and projection.unknown(folder, planned) else {}
    print(f"study {folder}: {projection.told(folder, planned, rates)}", flush=True)
    failed: list[str] = []
    while (cell := _next(folder, planned, failed)) is not None:
        taken, claim = cell
        with claim:
            told = projection.told(folder, planned, rates).splitlines()[0]
            print(f"\n══ {taken.name} ({told})\n{shlex.join(_command(taken))}", flush=True)
            code = _run(taken, claim)
        if code == 130:
            conclude(folder, planned)
            print(INTERRUPTED, file=sys.stderr)
            return 130
        if code:
            failed.append(taken.name)
    conclude(folder, planned)
    left = [cell.name for cell in planned if not finished(folder, cell)]
    if left:
        waits = "" if failed else ": under way elsewhere, or after what is"
        print(f"{len(left)} of {len(planned)} runs are not finished{waits}; the same command goes on")
    for name in failed:
        print(f"failed: {name}", file=sys.stderr)
    return 1 if failed else None


def _run(cell: Cell, claim: IO[str]) -> int:
    """Runs a cell to its end, and returns its exit code, or 130 after a Ctrl-C, of which it is told.

    It holds the claim while it lives.
    """
    process, interrupted = subprocess.Popen(_command(cell), process_group=0, pass_fds=[claim.fileno()]), False
    while True:
        try:
            code = process.wait()
            return 130 if interrupted else code
        except KeyboardInterrupt:
            interrupted = True
            process.send_signal(signal.SIGINT)


def _command(cell: Cell) -> list[str]:
    return [sys.executable, "-m", f"z1_jax.{cell.program}", *cell.argv[1:]]


def _claim(study: StudyConfig, folder: pathlib.Path, planned: Sequence[Cell] = ()) -> None:
    """Makes the study's folder, or checks that it belongs to this study. Runs of it that are there already are taken.

    Raises:
        ConfigError: it belongs to another one, or is something else.
    """
    default: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(study)}
    mine = json.loads(json.dumps({**dataclasses.asdict(study), "folder": ""}))
    del mine["extras"]  # of a study that has begun there may be more: they change nothing of what is there
    path = folder / STUDY
    if path.exists():
        try:
            theirs = dict(json.loads(path.read_text()))
        except (ValueError, TypeError) as error:
            raise ConfigError(
                f"{path} cannot be read ({error}); restore it or choose another --config.folder"
            ) from error
        for key, value in mine.items():
            told = theirs[key] if key in theirs else list(default[key]) if key == "repeated" else default[key]
            if told != value:
                raise ConfigError(
                    f"{folder} belongs to another study ({key} is {told!r}, asked for {value!r}); "
                    "choose another --config.folder"
                )
        return
    known = {name for cell in planned for name in (cell.name, f"{cell.name}.lock")}
    known |= {partial_path(path).name, CONCLUDING}
    if folder.is_dir() and any(entry.name not in known for entry in folder.iterdir()):
        raise ConfigError(f"{folder} is not empty and holds no study (no {STUDY}); choose another --config.folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(mine, indent=1))
    except OSError as error:
        raise ConfigError(f"config key folder: {folder} cannot be written ({error.strerror})") from error


def check_runs(folder: pathlib.Path, planned: Sequence[Cell]) -> None:
    """Refuses a run in the study's folder that was made with another config than the study's.

    Raises:
        ConfigError: one line.
    """
    for cell in planned:
        path = folder / cell.name / "config.json"
        if not path.exists():
            continue
        try:
            theirs = build(Config, read_json(path, dict, {}))
        except ConfigError as error:
            raise ConfigError(f"{path} is no config of a run ({first_line(error)}); move that folder away") from error
        mine = settled(parsed(cell))
        one, other = flat(theirs), flat(mine)
        wrong = [key for key in other if not among(key, _LOOSE) and one[key] != other[key]]
        if theirs.every_task != mine.every_task:
            wrong.insert(0, "tasks")
        if wrong:
            raise ConfigError(
                f"{folder / cell.name} was made with {wrong[0]}={one[wrong[0]]}, the study has {other[wrong[0]]}: move "
                "it away, or choose another --config.folder"
            )


def _next(folder: pathlib.Path, planned: Sequence[Cell], failed: Sequence[str]) -> tuple[Cell, IO[str]] | None:
    """A run that is left, whose start is there, and on which nobody else works, with its lock; None: there is none."""
    for cell in planned:
        ready = not cell.needs or (folder / cell.needs / "summary.json").exists()
        if not ready or cell.name in failed or finished(folder, cell):
            continue
        claim = (folder / f"{cell.name}.lock").open("a")
        try:
            lock(claim, folder / cell.name)
        except UserError:
            claim.close()
            continue
        if not finished(folder, cell):  # it may have been finished since
            return cell, claim
        claim.close()
    return None


def conclude(folder: pathlib.Path, planned: Sequence[Cell]) -> None:
    """Writes results.json, table.md and study.html of what is finished, and prints the means."""
    found = results.collected(folder, planned)
    if not found["rows"]:
        return
    text = results.tables(found)
    with (folder / CONCLUDING).open("a") as turn:  # several machines may come to their end at once
        lock(turn, folder, wait=True)
        results.write(folder / RESULTS, found)
        write_whole(folder / TABLE, text)
        write_whole(folder / PAGE, page(text, f"{len({task for _, _, task, _ in found['policies']})} tasks"))
    shown = "\n\n".join(text.split("\n\n")[:2])
    print(f"\n{shown}\n{folder / TABLE}, {folder / PAGE}, {folder / RESULTS}", flush=True)


if __name__ == "__main__":
    run_main(main)
