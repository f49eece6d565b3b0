"""What a study's finished runs found, as one JSON file from which its tables can be made again.

The file: `means`, `intervals` and `simulated_steps` by form; `runs`, by name, with their seconds and how training went;
`policies`, each a form, a training seed (-1: a start that was given), a task and the name of a further evaluation
(empty: the run's own); `rows`, one an episode, with the `columns` policy (its number), seed and success.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from z1_jax.errors import UserError
from z1_jax.files import read_json, write_whole
from z1_jax.metrics import METRICS, read_records
from z1_jax.study.config import JOINT, SFT, Cell
from z1_jax.study.table import GIVEN, Falls, Outcome, elsewhere, largest_fall, means, rows
from z1_jax.study.text import markdown

CONFIDENCE = 0.95
COLUMNS = ["policy", "seed", "success"]


def finished(folder: pathlib.Path, cell: Cell) -> bool:
    """Whether a run has come to its end."""
    return (folder / cell.name / "summary.json").exists()


def summary_of(folder: pathlib.Path, cell: Cell) -> dict[str, Any]:
    """What a finished run says of itself.

    Raises:
        UserError: the file is damaged.
    """
    path = folder / cell.name / "summary.json"
    summary = read_json(path, dict, {})
    if not isinstance(summary.get("wall_seconds"), dict) or "task" not in summary:
        raise UserError(f"{path} is damaged; delete it, and the run's command writes it anew")
    return summary


def seconds(summary: Mapping[str, Any]) -> float:
    """Wall seconds of a finished run, all stages."""
    return sum(map(float, summary["wall_seconds"].values()))


def collected(folder: pathlib.Path, planned: Sequence[Cell]) -> dict[str, Any]:
    """What the finished runs of a study found."""
    done = [cell for cell in planned if finished(folder, cell)]
    given = any(cell.kind == SFT and cell.program == "evaluate" and not cell.evaluation for cell in planned)
    seeds = [GIVEN if given and cell.kind == SFT else cell.seed for cell in done]
    found = [one for cell, seed in zip(done, seeds, strict=True) for one in _outcomes(folder, cell, seed)]
    runs = {cell.name: _run(folder, cell) for cell in done}
    over = means(found, CONFIDENCE)
    steps: dict[str, int] = {}
    for run in runs.values():
        if run["form"] != SFT and not run["evaluation"]:
            steps[run["form"]] = steps.get(run["form"], 0) + run["simulated_steps"]
    return {
        "means": {mean.form: mean.rate for mean in over},
        "intervals": {mean.form: mean.interval for mean in over},
        "simulated_steps": steps,
        "runs": runs,
        "policies": [[one.form, one.seed, one.task, one.evaluation] for one in found],
        "columns": COLUMNS,
        "rows": [
            [number, seed, int(success)]
            for number, one in enumerate(found)
            for seed, success in zip(one.episodes, one.success, strict=True)
        ],
    }


def _outcomes(folder: pathlib.Path, cell: Cell, seed: int) -> list[Outcome]:
    """The held-out episodes of a run by task, under this training seed."""
    by_task: dict[str, list[dict]] = {}
    name = "checkpoint" if cell.program == "evaluate" else "after"
    for record in read_records(folder / cell.name / "evaluation" / f"{name}.jsonl"):
        by_task.setdefault(str(record.get("task", cell.task)), []).append(record)
    return [
        Outcome(
            cell.kind,
            task,
            seed,
            tuple(int(record["seed"]) for record in records),
            np.array([bool(record["success"]) for record in records]),
            cell.evaluation,
        )
        for task, records in by_task.items()
    ]


def _run(folder: pathlib.Path, cell: Cell) -> dict[str, Any]:
    summary = summary_of(folder, cell)
    trains = cell.kind != SFT and not cell.evaluation
    records = [r for r in read_records(folder / cell.name / METRICS) if r.get("stage") == "grpo"] if trains else []
    tasks = summary["task"] if isinstance(summary["task"], list) else [summary["task"]]
    prefixes = {task: f"tasks/{task}/" if cell.kind == JOINT else "" for task in tasks}

    def told(key: str) -> list[float]:
        return [record[key] for record in records if key in record]

    falls = {task: largest_fall(told(f"{one}success"), told(f"{one}groups")) for task, one in prefixes.items()}
    return {
        "form": cell.kind,
        "training_seed": cell.seed,
        "task": cell.task,
        "evaluation": cell.evaluation,
        "wall_seconds": round(seconds(summary), 1),
        "simulated_steps": int(summary.get("simulated_steps", 0)),
        **({"largest_fall": falls} if trains else {}),
    }


def write(path: pathlib.Path, results: Mapping[str, Any]) -> None:
    """Writes results as JSON, a line a policy."""
    head = json.dumps({**results, "rows": []}, indent=None, ensure_ascii=False)
    lines: dict[int, list[str]] = {}
    for row in results["rows"]:
        lines.setdefault(row[0], []).append(json.dumps(row, separators=(",", ":")))
    body = ",\n".join(",".join(line) for line in lines.values())
    write_whole(path, f"{head.removesuffix(']}')}\n{body}\n]}}\n")


def read(path: pathlib.Path) -> dict[str, Any]:
    """Results from such a file.

    Raises:
        UserError: it is absent or damaged: one line.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist; expected the {path.name} that a study has written")
    results = read_json(path, dict, {})
    try:
        outcomes_of(results), _falls(results)
        if not (results["rows"] and set(results["means"]) <= {row[0] for row in results["policies"]}):
            raise ValueError("it has no rows, or means of other forms")
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise UserError(
            f"{path} holds no results of a study ({type(error).__name__}: {error}); expected its results.json"
        ) from error
    return results


def outcomes_of(results: Mapping[str, Any]) -> list[Outcome]:
    """The episodes of results, by policy and task."""
    if results["columns"] != COLUMNS:
        raise ValueError(f"columns {results['columns']}, expected {COLUMNS}")
    seeds: list[list[int]] = [[] for _ in results["policies"]]
    success: list[list[bool]] = [[] for _ in results["policies"]]
    for number, seed, won in results["rows"]:
        if number < 0 or won not in (0, 1):
            raise ValueError(f"a row {[number, seed, won]}")
        seeds[number].append(int(seed))
        success[number].append(bool(won))
    return [
        Outcome(str(form), str(task), int(seed), tuple(seeds[number]), np.array(success[number], bool), str(evaluation))
        for number, (form, seed, task, evaluation) in enumerate(results["policies"])
    ]


def _falls(results: Mapping[str, Any]) -> Falls:
    return {
        (run["form"], task, run["training_seed"]): fall
        for run in results["runs"].values()
        for task, fall in run.get("largest_fall", {}).items()
    }


def tables(results: Mapping[str, Any]) -> str:
    """The tables of results as Markdown."""
    found = outcomes_of(results)
    each, others = rows(found, CONFIDENCE, _falls(results)), elsewhere(found, CONFIDENCE)
    text = markdown(found, means(found, CONFIDENCE), each, others, CONFIDENCE)
    spent = ", ".join(f"{form} {count:,}" for form, count in results["simulated_steps"].items()) or "none"
    hours = sum(run["wall_seconds"] for run in results["runs"].values()) / 3600
    return text + f"\nSimulated control steps of RL: {spent}. Hours of all runs: {hours:.2f}.\n"
