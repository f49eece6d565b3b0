"""The table of the 24 tasks, from run directories made by hand."""

import importlib
import json
import pathlib
import sys

import numpy as np
import pytest

from envs.kitchen import TASKS


@pytest.fixture
def kitchen_24(monkeypatch):
    monkeypatch.syspath_prepend(str(pathlib.Path(__file__).parent.parent / "benchmarks"))
    yield importlib.import_module("kitchen_24")
    for name in ("kitchen_24", "kitchen_gain"):
        sys.modules.pop(name, None)


def part(outcomes: list[int]) -> dict:
    return {"rate": float(np.mean(outcomes)), "interval": [0.1, 0.9], "episodes": len(outcomes)}


def write_run(directory: pathlib.Path, before: list[int], after: list[int], p: float) -> None:
    (directory / "evaluation").mkdir(parents=True)
    for name, outcomes in (("before", before), ("after", after)):
        lines = [json.dumps({"seed": 9 + i, "success": bool(x), "steps": 5}) for i, x in enumerate(outcomes)]
        (directory / "evaluation" / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    summary = {
        "before": part(before),
        "after": part(after),
        "difference": float(np.mean(after) - np.mean(before)),
        "difference_interval": [-0.1, 0.2],
        "mcnemar_p": p,
        "simulated_steps": 12_345,
        "wall_seconds": {"sft": 60.0, "grpo": 120.0},
    }
    (directory / "summary.json").write_text(json.dumps(summary))


def test_every_task_is_run_with_the_preset_of_its_length(kitchen_24):
    rows = kitchen_24.cells(list(TASKS), [3], "")
    assert [cell.task for cell in rows] == list(TASKS) and {cell.seed for cell in rows} == {3}
    presets = {cell.task: cell.config for cell in rows}
    assert presets["TurnOnSinkFaucet"] == "configs/grpo.py:kitchen"
    assert presets["OpenDoubleDoor"] == "configs/grpo.py:long"
    assert {cell.config for cell in kitchen_24.cells(["OpenDrawer"], [0], "smoke")} == {"configs/grpo.py:smoke"}


def test_the_mean_weighs_tasks_alike_and_names_what_went_wrong(kitchen_24, tmp_path, monkeypatch):
    """OpenDrawer's two seeds gain 50 and 100 points, TurnOnStove's one seed loses 25: the mean is (75 − 25) / 2."""
    write_run(tmp_path / "OpenDrawer-seed0", [0, 0, 0, 0], [1, 1, 0, 0], 0.5)
    write_run(tmp_path / "OpenDrawer-seed1", [0, 0, 0, 0], [1, 1, 1, 1], 0.1)
    write_run(tmp_path / "TurnOnStove-seed0", [1, 1, 1, 1], [1, 1, 1, 0], 0.01)
    cells = kitchen_24.cells(["OpenDrawer", "TurnOnStove"], [0, 1], "")
    rows = kitchen_24.finished(cells, tmp_path)
    assert [row.cell.name for row in rows] == ["OpenDrawer-seed0", "TurnOnStove-seed0", "OpenDrawer-seed1"]
    assert rows[0].differences.tolist() == [1, 1, 0, 0] and rows[1].differences.tolist() == [0, 0, 0, -1]
    gain, (low, high) = kitchen_24.mean_gain(rows)
    assert gain == pytest.approx(0.25)
    assert -0.25 <= low <= 0.25 <= high <= 1.0
    page = kitchen_24.table(rows, ["TurnOnStove-seed1"])
    assert "| OpenDrawer, 0 | long | 0.0 % [10.0, 90.0] | 50.0 % [10.0, 90.0] | +50.0 [-10.0, +20.0] | 0.5 |" in page
    assert "| 12,345 | 3.0 |" in page
    assert "Mean gain over 2 tasks: **+25.0 points**" in page
    assert "Significantly worse after RL: TurnOnStove-seed0." in page
    assert "SFT hardly starts (below 5 %): OpenDrawer-seed0, OpenDrawer-seed1." in page
    assert "Not measured yet: TurnOnStove-seed1." in page
    figures = [json.loads(line.removeprefix("RESULT ")) for line in kitchen_24.results(rows)]
    assert [(f["value"], f["met"], f["tasks_missing"]) for f in figures] == [(25.0, None, 22), (1, None, 22)]
    monkeypatch.setattr(kitchen_24, "TASKS", ("OpenDrawer", "TurnOnStove"))
    figures = [json.loads(line.removeprefix("RESULT ")) for line in kitchen_24.results(rows)]
    assert [(f["value"], f["met"]) for f in figures] == [(25.0, True), (1, False)]


def test_a_table_without_runs_says_what_is_missing(kitchen_24):
    page = kitchen_24.table([], ["OpenDrawer-seed0"])
    assert "Not measured yet: OpenDrawer-seed0." in page and "Mean gain" not in page
    assert kitchen_24.results([]) == []
