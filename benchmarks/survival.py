"""What a run survives: kills, stops, faults of environments, damaged files and full disks, drawn from a seed.

    python benchmarks/survival.py             # about half an hour on two cores; goes on where it stopped

Small runs (demonstrations → SFT → evaluation → GRPO → evaluation in benchmarks/faulty_world.py, a minute each when
nothing is compiled yet) are disturbed, continued by the same command, and compared with one that was left alone: the
final parameters and optimiser state by their checksums, every record and every evaluated episode. Each injection is a
row of docs/results/survival.json: whether it was survived, the iterations that were lost, and the seconds until the run
was again where it had been. `survived` means: the run goes on by itself or by the same command, ends in the same
numbers, and loses at most what came after its last checkpoint; or a damaged file is refused in one line that names it,
and nothing else is touched.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any

import survival_processes
from figures import result_line
from survival_runs import (
    EVERY,
    PATIENCE_S,
    ROOT,
    SETTINGS,
    Injection,
    Runs,
    different,
    digests,
    drawn,
    fresh,
    half_way,
    in_order,
    left_behind,
    outcome,
    position,
    reached,
    workers,
)

RESULTS = ROOT / "docs" / "results" / "survival.json"
KILLS = 30  # of the whole run


def disturbed(runs: Runs, name: str, injections: list[Injection], reference: dict[str, Any], faults: str = "") -> None:
    """One run with its injections in turn, to its end; fills in what became of each."""
    run_dir = fresh(runs.work / name)
    waiting, ended = list(injections), False
    pending: list[Injection] = []  # that happened, and the run is not yet where it was
    until, at = 0, 0.0  # where that is, and when it happened
    failures = 0  # ends that nobody asked for
    while not ended:
        process, moment = runs.start(run_dir, faults=faults), None
        began, children, struck, base = time.monotonic(), [], None, position(run_dir).total
        while process.poll() is None and time.monotonic() < began + PATIENCE_S:
            time.sleep(0.01)
            if pending and position(run_dir).total > until:
                pending = recovered(pending, at)
            moved = position(run_dir).total > base or (waiting and waiting[0].stage in ("start", "demonstrations"))
            if waiting and moment is None and moved and reached(run_dir, waiting[0]):
                moment = time.monotonic() + waiting[0].delay_s
            if moment is not None and time.monotonic() >= moment:
                one, moment = waiting.pop(0), None
                children, until, at = workers(process), position(run_dir).total, time.monotonic()
                pending.append(one)
                if inflict(one, process, children):
                    struck = one
                    break
        code, now = runs.ends(process), position(run_dir)
        if struck:
            struck.lost = max(0, now.grpo - now.saved)
            struck.survived = (code == 130 or struck.kind == "kill") and not left_behind(children)
            struck.note = runs.last_line(run_dir) if struck.kind != "kill" else ""
            print(f"  {name}: {struck.kind} at {now}, {struck.lost} iterations lost", flush=True)
            until, at = now.total, time.monotonic()
            continue
        ended = code == 0
        if ended:
            pending = recovered(pending, at)
        else:  # by what should have been survived: the same command goes on once
            if not pending or failures:  # not by what was injected last, or again: it does not go on
                for one in injections:
                    one.survived = False if one not in waiting else None
                    one.note = one.note or f"exit {code}: {runs.last_line(run_dir)}"
                print(f"  {name}: given up after exit {code}: {runs.last_line(run_dir)}", flush=True)
                return
            failures += 1
            for one in pending:
                one.survived, one.note = False, f"exit {code}: {runs.last_line(run_dir)}"
                one.lost = max(0, now.grpo - now.saved)
                print(f"  {name}: {one.kind} ended the run: {one.note}", flush=True)
    difference = different(outcome(run_dir), reference)
    for one in injections:
        if one in waiting:
            one.note = "the run ended before"
        elif one.survived is not False:
            one.survived, one.note = not difference, f"differs in {difference}" * bool(difference)
    shutil.rmtree(run_dir)


def recovered(pending: list[Injection], at: float) -> list[Injection]:
    for one in pending:
        one.recovered_s = round(time.monotonic() - at, 1)
    return []


def inflict(one: Injection, process: subprocess.Popen, children: list[int]) -> bool:
    """Does it; returns whether the run is to end by it."""
    if one.kind in ("kill", "sigterm", "sigint"):
        process.send_signal({"kill": signal.SIGKILL, "sigterm": signal.SIGTERM, "sigint": signal.SIGINT}[one.kind])
        return True
    if one.kind == "stop of the run":
        process.send_signal(signal.SIGSTOP)
        time.sleep(SETTINGS["env.timeout_s"] + 4)  # type: ignore[operator]
        process.send_signal(signal.SIGCONT)
    elif children:
        number = signal.SIGSTOP if one.kind == "stop of a worker" else signal.SIGKILL
        os.kill(children[one.count % len(children)], number)
    else:
        one.note = "no worker was there"
    return False


def plan(seed: int) -> dict[str, list[Injection]]:
    """The disturbed runs and what is injected into each."""
    rng = random.Random(seed)
    simulating = ("demonstrations", "before", "grpo", "after")
    kinds = ["kill of a worker"] * 10 + ["stop of a worker"] * 6 + ["stop of the run"] * 4
    rng.shuffle(kinds)
    chains = {f"killed-{n}": in_order([drawn(rng, "kill") for _ in range(5)]) for n in range(KILLS // 5)}
    chains |= {
        f"signalled-{n}": in_order([drawn(rng, kind) for kind in ("sigterm", "sigint", "sigterm")]) for n in range(2)
    }
    chains |= {
        f"workers-{n}": in_order([drawn(rng, k, simulating) for k in kinds[5 * n : 5 * n + 5]]) for n in range(4)
    }
    return chains


FAULTS = {
    "faults-0": ("raise", "die"),
    "faults-1": ("hang", "pages"),
    "faults-2": ("demos-die", "demos-raise", "demos-pages"),
    "faults-3": ("demos-hang",),
    "built-0": ("build-die",),
    "built-1": ("build-raise",),
    "built-2": ("build-stop",),
    "state-0": ("state",),  # always where an episode of training is stepped: it costs its group
}


def faulty(runs: Runs, name: str, rng: random.Random, reference: dict[str, Any]) -> list[Injection]:
    """A run in whose environments things go wrong, once each, at calls that are drawn."""
    folder = fresh(runs.work / f"{name}.faults")
    folder.mkdir()
    rows = [(kind, 1 if kind.startswith("build-") else rng.randrange(5, 40)) for kind in FAULTS[name]]
    seeds = sorted({row["seed"] for row in reference["training episodes"]})
    rows = [(kind, rng.choice(seeds) if kind == "state" else calls) for kind, calls in rows]
    table = "".join(f"{kind} {calls} {folder / f'{n}.flag'}\n" for n, (kind, calls) in enumerate(rows))
    (folder / "faults").write_text(table)
    injections = [Injection(f"fault: {kind}", "calls", calls) for kind, calls in rows]
    run_dir = fresh(runs.work / name)
    code = runs.ends(runs.start(run_dir, faults=str(folder / "faults")))
    told = f"exit {code}: {runs.last_line(run_dir)}" if code else ""
    if code:
        runs.ends(runs.start(run_dir, faults=str(folder / "faults")))
    size = run_dir.with_suffix(".log").stat().st_size
    difference = different(outcome(run_dir), reference)
    if "state" in FAULTS[name]:  # one group of all is dropped, and the run goes on without it
        lost = json.loads((run_dir / "summary.json").read_text()).get("groups_lost")
        difference = "" if lost == 1 else f"{lost} groups are lost"
    for n, one in enumerate(injections):
        happened = (folder / f"{n}.flag").exists()
        one.survived = (not (told or difference) and size < 200_000) if happened else None
        one.note = told or f"differs in {difference}" * bool(difference) or f"the log has {size} bytes"
    shutil.rmtree(run_dir)
    return injections


# Files that say who worked on a run, when, how long and with what: they may change where nothing else may.
OWN = {"commands.jsonl", ".lock", "policies.json", "wall_seconds.json", "environments.json"}
DAMAGES: dict[str, Callable[[bytes, random.Random], bytes | None]] = {
    "truncated": lambda content, rng: content[: rng.randrange(len(content))],
    "emptied": lambda content, rng: b"",
    "removed": lambda content, rng: None,
    "bit flipped": lambda content, rng: flipped(content, rng),
    "another type": lambda content, rng: b"[1, 2]" if content[:1] == b"{" else b'{"a": 1}',
}


def flipped(content: bytes, rng: random.Random) -> bytes:
    changed = bytearray(content)
    changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def damaged(runs: Runs, name: str, rng: random.Random, template: pathlib.Path, reference: dict) -> list[Injection]:
    """A run that stopped amid RL, with one file damaged: it ends in the same numbers, or refuses in a line."""
    run_dir = fresh(runs.work / name)
    shutil.copytree(template, run_dir)
    files = sorted(p for p in run_dir.rglob("*") if p.is_file() and p.stat().st_size and p.name != ".lock")
    side = [path for path in files if "checkpoints" not in path.parts]
    path, (damage, change) = rng.choice(rng.choice([files, side])), rng.choice(list(DAMAGES.items()))
    content = change(path.read_bytes(), rng)
    path.unlink() if content is None else path.write_bytes(content)
    one = Injection(f"damage: {damage}", str(path.relative_to(run_dir)))
    before = digests(run_dir)
    began = time.monotonic()
    code = runs.ends(runs.start(run_dir))
    one.recovered_s = round(time.monotonic() - began, 1)
    if code == 0:
        difference = different(outcome(run_dir), reference)
        one.survived, one.note = not difference, f"differs in {difference}" * bool(difference)
    else:
        text = (runs.work / f"{name}.log").read_text()
        touched = [key for key, value in digests(run_dir).items() if before.get(key, value) != value]
        touched = [key for key in touched if pathlib.Path(key).name not in OWN]
        told = [line for line in text.splitlines() if line.startswith("error: ")]
        one.survived = code == 2 and len(told) == 1 and "Traceback" not in text and not touched
        one.note = f"{runs.last_line(run_dir)} {'; touched ' + ', '.join(touched) if touched else ''}".strip()
    print(f"  {name}: {one.stage} {damage}: {'survived' if one.survived else 'not survived'} {one.note}", flush=True)
    shutil.rmtree(run_dir)
    return [one]


@contextlib.contextmanager
def small_disk(folder: pathlib.Path, size: int) -> Iterator[bool]:
    """A file system of `size` bytes at `folder`; False where this user may not mount one."""
    folder.mkdir(parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    mounted = shutil.which("mount") is not None and subprocess.run(mount, capture_output=True).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)


def filled(runs: Runs, name: str, size: int, reference: dict[str, Any]) -> list[Injection]:
    """A run on a disk of `size` bytes, which is enlarged when it is full."""
    place = runs.work / "disk"
    with small_disk(place, size) as mounted:
        run_dir = (place if mounted else runs.work) / name
        one = Injection("full disk" if mounted else "files of limited size", "bytes", size)
        shutil.rmtree(run_dir, ignore_errors=True)
        (runs.work / f"{name}.log").unlink(missing_ok=True)
        code = runs.ends(runs.start(run_dir, file_bytes=0 if mounted else size // 40))
        text, now = (runs.work / f"{name}.log").read_text(), position(run_dir)
        told = [line for line in text.splitlines() if line.startswith("error: ")]
        names = bool(told) and str(run_dir.parent) in told[-1]
        reason = bool(told) and any(word in told[-1] for word in ("No space left", "File too large"))
        one.note, one.lost = runs.last_line(run_dir), max(0, now.grpo - now.saved)
        plain = code == 2 and len(told) == 1 and names and reason and "Traceback" not in text
        if code == 0:
            one.note = "it was large enough"
        elif mounted:
            subprocess.run(["mount", "-o", "remount,size=1g", str(place)], check=True)
        began = time.monotonic()
        again = 0 if code == 0 else runs.ends(runs.start(run_dir))
        one.recovered_s = round(time.monotonic() - began, 1)
        difference = f"exit {again}" if again else different(outcome(run_dir), reference)
        one.survived = None if code == 0 else plain and not difference
        one.note += f"; then differs in {difference}" * bool(difference)
        print(f"  {name}: {size / 1e6:.2f} MB: {one.note}", flush=True)
        shutil.rmtree(run_dir)
    return [one]


def summary(stored: dict[str, Any]) -> dict[str, Any]:
    """By kind: injected, survived, the most iterations lost, the median and the longest time to recover."""
    rows = [one for injections in stored["runs"].values() for one in injections if one["survived"] is not None]
    kinds: dict[str, Any] = {}
    for kind in sorted({one["kind"].partition(":")[0] for one in rows}):
        mine = [one for one in rows if one["kind"].partition(":")[0] == kind]
        seconds = sorted(one["recovered_s"] for one in mine if one["recovered_s"] is not None)
        kinds[kind] = {
            "injected": len(mine),
            "survived": sum(one["survived"] for one in mine),
            "most_iterations_lost": max(one["lost"] for one in mine),
            "median_s": seconds[len(seconds) // 2] if seconds else None,
            "longest_s": seconds[-1] if seconds else None,
        }
    return kinds


def report(stored: dict[str, Any]) -> None:
    kinds = summary(stored)
    for kind, row in kinds.items():
        print(
            f"{kind:22} {row['survived']:3} of {row['injected']:3} survived, at most {row['most_iterations_lost']} "
            f"iterations lost, {row['median_s']} s to recover (longest {row['longest_s']})"
        )
    for injections in stored["runs"].values():
        for one in injections:
            if one["survived"] is False:
                print(f"not survived: {one['kind']} at {one['stage']} {one['count']}: {one['note']}")
    injected, survived = (sum(row[key] for row in kinds.values()) for key in ("injected", "survived"))
    lost = max((row["most_iterations_lost"] for row in kinds.values()), default=0)
    print(result_line("survival/survived", survived, "injections", goal=injected, met=survived == injected, n=injected))
    print(result_line("survival/lost", lost, "iterations at most", goal=EVERY, met=lost <= EVERY, n=injected))


def main() -> None:
    """Injects what is missing, and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of every moment and choice (%(default)s)")
    parser.add_argument("--work", type=pathlib.Path, default=ROOT / "runs" / "survival", help="(%(default)s)")
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS)
    parser.add_argument("--damages", type=int, default=20, help="damaged files (%(default)s)")
    parser.add_argument("--disks", type=int, default=5, help="full disks (%(default)s)")
    parser.add_argument("--only", default="", help="runs whose name starts so")
    parser.add_argument("--report", action="store_true", help="inject nothing")
    given = parser.parse_args()
    stored = json.loads(given.results.read_text()) if given.results.exists() else {}
    if stored.get("seed") != given.seed or stored.get("settings") != SETTINGS:
        stored = {"seed": given.seed, "settings": SETTINGS, "runs": {}}
    if given.report:
        report(stored)
        return
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a shell's background jobs would pass on that they ignore it
    runs = Runs(given.work.absolute())
    alone = runs.work / "alone"
    if not (alone / "summary.json").exists():
        began = time.monotonic()
        assert runs.ends(runs.start(alone)) == 0, runs.last_line(alone)
        print(f"undisturbed run: {time.monotonic() - began:.0f} s", flush=True)
    reference = outcome(alone)
    stored["undisturbed"] = {"checkpoint": reference["checkpoint"], "sentence": reference["sentence"]}
    bytes_of_run = sum(path.stat().st_size for path in alone.rglob("*") if path.is_file())

    def to_do() -> Iterator[tuple[str, Callable[[], list[Injection]]]]:
        def chain(name: str, injections: list[Injection]) -> list[Injection]:
            disturbed(runs, name, injections, reference)
            return injections

        for name, injections in plan(given.seed).items():
            yield name, lambda name=name, injections=injections: chain(name, injections)
        draw = lambda name: random.Random(f"{given.seed} {name}")  # noqa: E731
        for name in FAULTS:
            yield name, lambda name=name: faulty(runs, name, draw(name), reference)
        for name, injections in survival_processes.plan(given.seed).items():
            yield (
                name,
                lambda name=name, injections=injections: survival_processes.disturbed(
                    runs, name, injections, survival_processes.undisturbed(runs)
                ),
            )
        for n in range(given.disks):
            name, share = f"disk-{n}", draw(f"disk-{n}").uniform(0.02, 0.9)
            yield name, lambda name=name, share=share: filled(runs, name, int(share * bytes_of_run), reference)
        for n in range(given.damages):
            name = f"damage-{n}"
            yield name, lambda name=name: damaged(runs, name, draw(name), half_way(runs), reference)

    for name, act in to_do():
        if name in stored["runs"] or not name.startswith(given.only):
            continue
        began = time.monotonic()
        shared = set(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else set()
        found = act()
        stored["runs"][name] = [dataclasses.asdict(one) for one in found]
        left = sorted(os.listdir(runs.work / "tmp"))
        stored["runs"][name][0]["left_in_tmpdir"] = left
        time.sleep(3)  # Python's resource tracker removes semaphores a moment after their process
        new = set(os.listdir("/dev/shm")) - shared if os.path.isdir("/dev/shm") else set()
        stored["runs"][name][0]["new_in_dev_shm"] = sorted(new)
        shutil.rmtree(runs.work / "tmp")
        (runs.work / "tmp").mkdir()
        loads = [*stored.get("load", []), round(os.getloadavg()[0], 1)]
        stored["load"], stored["cores"] = [min(loads), max(loads)], os.cpu_count()
        given.results.parent.mkdir(parents=True, exist_ok=True)
        aside = given.results.with_suffix(".tmp")
        aside.write_text(json.dumps(stored | {"summary": summary(stored)}, indent=1))
        aside.replace(given.results)
        good = sum(bool(one.survived) for one in found)
        print(f"{name}: {good} of {len(found)} survived, {time.monotonic() - began:.0f} s, left {left or 'nothing'}",
              flush=True)  # fmt: skip
    report(stored)


if __name__ == "__main__":
    main()
