"""How much GRPO gains over SFT in the built-in kitchen, over tasks, seeds, branchings and controls.

Each cell is one run of `python -m z1_jax.train`; cells are independent, finished ones are read back, an interrupted
one continues. `python benchmarks/kitchen_gain.py --out runs/gain --jobs 1`
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import json
import pathlib
import statistics
import subprocess
import sys

from figures import result_line

from envs.kitchen import TASKS as TASK_TABLE

TASKS = ("TurnOnSinkFaucet", "OpenDrawer", "PnPCounterToSink")
GOALS = {"TurnOnSinkFaucet": 0.40, "OpenDrawer": 0.25, "PnPCounterToSink": 0.25}
FAUCET = TASKS[0]
SHORT = 40  # control steps: tasks with a longer horizon take a longer preset
HARD = ("TurnSinkSpout", "TurnOffStove")  # short, but 300 SFT steps hardly teach which side or burner is meant
CARRYING = ("pick_and_place", "onto_dish", "into", "out_of")  # families of tasks


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run: what to call it, its command line, and the cell whose SFT policy it starts from."""

    name: str
    task: str
    seed: int
    arguments: tuple[str, ...]
    config: str = "configs/grpo.py"
    parent: str = ""  # cell whose SFT checkpoint is the start


def preset_of(task: str) -> str:
    """The preset of configs/grpo.py that suits a task."""
    info = TASK_TABLE[task]
    if task in HARD:
        return "brief"
    if info.family in CARRYING:
        return "carry"
    return "kitchen" if info.horizon <= SHORT else "long"


def cells(seeds: list[int]) -> list[Cell]:
    """Parents come before their children; the cells that matter most come first."""
    rows = [
        Cell(f"{task}-seed{seed}", task, seed, (), config=f"configs/grpo.py:{preset_of(task)}")
        for seed in seeds
        for task in TASKS
    ]
    for seed in seeds:
        parent = f"{FAUCET}-seed{seed}"
        for branching, extra in (
            ("none", ("--config.group.prefix_chunks=0", "--config.group.prefix_chunks_end=0")),
            ("prefix", ()),
        ):
            arguments = (f"--config.group.branching={branching}", *extra)
            rows.append(Cell(f"{parent}-{branching}", FAUCET, seed, arguments, parent=parent))
        rows.append(
            Cell(f"{parent}-shuffled", FAUCET, seed, ("--config.group.shuffle_advantages=true",), parent=parent)
        )
    return rows


def sft_control(out: pathlib.Path, seed: int) -> Cell:
    """SFT alone, on demonstrations of the same settings, with the time that SFT and RL took together."""
    wall = json.loads((out / f"{FAUCET}-seed{seed}" / "summary.json").read_text())["wall_seconds"]
    config = json.loads((out / f"{FAUCET}-seed{seed}" / "config.json").read_text())
    steps = round(config["sft"]["steps"] * (1 + wall["grpo"] / wall["sft"]))
    arguments = ("--config.algorithm=sft", f"--config.sft.steps={steps}")
    return Cell(f"{FAUCET}-seed{seed}-sft", FAUCET, seed, arguments, config=f"configs/grpo.py:{preset_of(FAUCET)}")


def run(cell: Cell, out: pathlib.Path, extra: list[str], core: int | None) -> dict | None:
    """Runs a cell unless its summary is there; returns the summary, or None when it failed."""
    directory = out / cell.name
    summary = directory / "summary.json"
    if not summary.exists():
        command = [sys.executable, "-m", "z1_jax.train", f"--config={cell.config}", f"--config.run_dir={directory}"]
        command += [f"--config.task={cell.task}", f"--config.seed={cell.seed}", *cell.arguments, *extra]
        if cell.parent:
            command.append(f"--config.init={out / cell.parent / 'checkpoints' / 'sft'}")
        if core is not None:
            command = ["taskset", "-c", str(core), *command]
        out.mkdir(parents=True, exist_ok=True)
        with (out / f"{cell.name}.log").open("a") as log:
            code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT).returncode
        print(f"{cell.name}: {'finished' if code == 0 else f'failed, see {log.name}'}", flush=True)
    return json.loads(summary.read_text()) if summary.exists() else None


def run_all(rows: list[Cell], out: pathlib.Path, jobs: int, extra: list[str]) -> None:
    """Runs the cells, `jobs` at a time, each on a core of its own when there are several."""
    waiting, done = list(rows), {path.parent.name for path in out.glob("*/summary.json")}
    running: dict[concurrent.futures.Future, tuple[Cell, int]] = {}
    free = list(range(jobs))
    with concurrent.futures.ThreadPoolExecutor(jobs) as executor:
        while waiting or running:
            ready = [cell for cell in waiting if not cell.parent or cell.parent in done]
            while free and ready:
                cell, core = ready.pop(0), free.pop(0)
                waiting.remove(cell)
                running[executor.submit(run, cell, out, extra, core if jobs > 1 else None)] = (cell, core)
            if not running:
                print(f"not run, their parents failed: {', '.join(cell.name for cell in waiting)}")
                return
            for future in concurrent.futures.wait(running, return_when="FIRST_COMPLETED").done:
                cell, core = running.pop(future)
                free.append(core)
                if future.result() is not None:
                    done.add(cell.name)


def reached(summary: dict) -> bool:
    """Whether a run's gain, and for the faucet its end and its minutes, are what was aimed at."""
    task, minutes = summary["task"], sum(summary["wall_seconds"].values()) / 60
    high_enough = task != FAUCET or summary["after"]["rate"] >= 0.9
    return summary["difference"] >= GOALS[task] and high_enough and minutes <= (15 if task == FAUCET else 30)


def report(rows: list[Cell], out: pathlib.Path) -> None:
    """Prints the table and one RESULT line a cell group."""
    found = {}
    for cell in rows:
        path = out / cell.name / "summary.json"
        if path.exists():
            found[cell.name] = (cell, json.loads(path.read_text()))
    print(
        f"\n{'cell':34} {'SFT':>7} {'RL':>7} {'gain':>7} {'95 % interval':>16} {'McNemar p':>10} {'RL steps':>9}    min"
    )
    groups: dict[str, list[dict]] = {}
    for name, (cell, summary) in found.items():
        minutes = sum(summary["wall_seconds"].values()) / 60
        if "before" not in summary:
            print(f"{name:34} {100 * summary['after']['rate']:6.1f}% {'':>52} {minutes:6.1f}")
            continue
        low, high = summary["difference_interval"]
        print(
            f"{name:34} {100 * summary['before']['rate']:6.1f}% {100 * summary['after']['rate']:6.1f}% "
            f"{100 * summary['difference']:+7.1f} {f'{100 * low:+.1f} … {100 * high:+.1f}':>16} "
            f"{summary['mcnemar_p']:10.2g} {summary['simulated_steps']:9,} {minutes:6.1f}"
        )
        groups.setdefault(name.replace(f"-seed{cell.seed}", ""), []).append(summary)
    for name, summaries in groups.items():
        gains = [summary["difference"] for summary in summaries]
        goal = GOALS.get(name)  # none of a control
        spread = [round(100 * edge, 2) for edge in (min(gains), max(gains))]
        print(
            result_line(
                f"kitchen_gain/{name}",
                round(100 * statistics.median(gains), 2),
                "points",
                baseline="SFT, same seeds",
                goal=None if goal is None else 100 * goal,
                met=None if goal is None else all(map(reached, summaries)),
                n=len(gains),
                spread=spread,
            )
        )


def main() -> None:
    """Runs what is missing and prints what is there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/kitchen_gain"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="cells at a time, each on a core of its own")
    parser.add_argument("--only", default="", help="run cells whose name contains one of these, comma-separated")
    parser.add_argument("--report", action="store_true", help="run nothing, print what is there")
    arguments, extra = parser.parse_known_args()
    out = arguments.out.absolute()
    wanted = [part for part in arguments.only.split(",") if part]
    rows = [c for c in cells(arguments.seeds) if not wanted or any(part in c.name for part in wanted)]
    if not arguments.report:
        run_all(rows, out, arguments.jobs, extra)
    controls = [sft_control(out, s) for s in arguments.seeds if (out / f"{FAUCET}-seed{s}" / "summary.json").exists()]
    controls = [c for c in controls if not wanted or any(part in c.name for part in wanted)]
    if not arguments.report:
        run_all(controls, out, arguments.jobs, extra)
    report(rows + controls, out)


if __name__ == "__main__":
    main()
