"""How long a study takes: from its finished runs, else from what its runs count and a short measurement (`probe`)."""

from __future__ import annotations

import json
import pathlib
import platform
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence

import numpy as np

from z1_jax.config.schema import Config
from z1_jax.files import read_json
from z1_jax.study.config import SFT, Cell, parsed
from z1_jax.study.results import finished, seconds, summary_of
from z1_jax.suites import resolve, with_tasks

CAVEAT = (
    "as if every episode ran to its horizon and every group were kept and shared nothing: less where policies succeed; "
    "without starts, compilation (about a minute a run), films, and whatever else this machine does"
)


def measured(folder: pathlib.Path, planned: Sequence[Cell]) -> dict[str, float]:
    """What parts of a study's runs take here: measured once, and kept in the folder. Empty where that fails."""
    path = folder / f"probe-{platform.node() or 'here'}.json"
    if not path.exists():
        asked = path.with_suffix(".asked")
        trainings = [cell for cell in planned if cell.program == "train"]
        sft = next((cell for cell in trainings if cell.kind == SFT), None)
        rl = next((cell for cell in trainings if cell.kind != SFT), None)
        asked.write_text(json.dumps({"sft": sft.argv if sft else [], "rl": rl.argv if rl else []}))
        print("measuring how long parts of a run take here …", flush=True)
        began = time.monotonic()
        command = [sys.executable, "-m", "z1_jax.study.probe", str(asked), str(path)]
        ran = subprocess.run(command, capture_output=True, text=True)
        asked.unlink(missing_ok=True)  # another program of this study may measure here too
        if ran.returncode:
            told = (ran.stderr.strip().splitlines() or ["no reason given"])[-1]
            print(f"not measured, after {time.monotonic() - began:.0f} s: {told}", flush=True)
            return {}
        print(f"measured in {time.monotonic() - began:.0f} s", flush=True)
    return {name: float(value) for name, value in read_json(path, dict, {}).items()}


def unknown(folder: pathlib.Path, planned: Sequence[Cell]) -> bool:
    """Whether runs are left of a sort of which none is finished."""
    return any(not done for done, left in _sorts(folder, planned).values() if left)


def told(folder: pathlib.Path, planned: Sequence[Cell], rates: Mapping[str, float]) -> str:
    """How many runs are left, and their hours, by sort.

    Args:
        rates: as `probe.measure` gives them; empty: nothing was measured.
    """
    hours, lines, counted, missing = 0.0, [], False, False
    sorts = _sorts(folder, planned)
    for name, (done, left) in sorts.items():
        if not left:
            continue
        each: list[float | None]
        if done:
            each = [float(np.mean([seconds(summary_of(folder, cell)) for cell in done]))] * len(left)
            how = f"as {len(done)} took that {'is' if len(done) == 1 else 'are'} finished"
        else:
            each, how = [projected(cell, rates) for cell in left], "counted"
            counted = True
        if None in each:
            missing = True
            lines.append(f"  {name}: {len(left)} × unknown")
            continue
        total = sum(value for value in each if value is not None) / 3600
        hours += total
        lines.append(f"  {name}: {len(left)} run{'s' * (len(left) != 1)}, {total:.2f} h, {how}")
    head = f"{sum(len(left) for _, left in sorts.values())} of {len(planned)} runs left"
    if lines:
        head += f": {hours:.2f} hours of one machine" + " and what is unknown" * missing
    return "\n".join([head, *lines, *[f"  counted: {CAVEAT}"] * (counted and bool(rates))])


def _sorts(folder: pathlib.Path, planned: Sequence[Cell]) -> dict[str, tuple[list[Cell], list[Cell]]]:
    """Finished and other runs by their sort: SFT, a form of RL, a further evaluation of one of these."""
    found: dict[str, tuple[list[Cell], list[Cell]]] = {}
    for cell in planned:
        name = f"{cell.evaluation} of {cell.kind}" if cell.evaluation else cell.kind
        found.setdefault(name, ([], []))[0 if finished(folder, cell) else 1].append(cell)
    return found


def projected(cell: Cell, rates: Mapping[str, float]) -> float | None:
    """Seconds of a run by what it counts; None where a part was not measured."""
    config = with_tasks(parsed(cell))
    parts = counts(config, cell, int(rates.get("executed", 0)) or 1)
    if any(count and name not in rates for name, count in parts.items()):
        return None
    return sum(count * rates.get(name, 0.0) for name, count in parts.items())


def counts(config: Config, cell: Cell, executed: int) -> dict[str, float]:
    """What a run does at most: control steps of demonstrations, SFT steps, looks and chunks of updates."""
    suite = resolve(config)
    steps = [config.env.horizon or suite.horizon(task) for task in config.every_task]
    looks = [-(-count // (config.env.executed or executed)) for count in steps]
    evaluated = config.eval.episodes * sum(looks)
    if cell.program == "evaluate":
        return {"look": evaluated}
    if cell.kind == SFT:
        shown = 0 if config.demos.dataset else config.demos.episodes * sum(steps)
        return {"demonstration": shown, "sft": config.sft.steps, "look": evaluated}
    group = config.group
    chunks = config.train.iterations * group.count * group.size * float(np.mean(looks))
    return {"look": evaluated + group.oversample * chunks, "update": chunks}
