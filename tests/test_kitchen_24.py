"""The table of the 24 tasks, from run directories made by hand."""

import importlib
import json
import pathlib
import sys

import numpy as np
import pytest

from envs.kitchen import TASKS
from z1_jax.presets.grpo import get_config


@pytest.fixture
def kitchen_24(monkeypatch):
    monkeypatch.syspath_prepend(str(pathlib.Path(__file__).parent.parent / "benchmarks"))
    yield importlib.import_module("kitchen_24")
    for name in ("kitchen_24", "kitchen_gain"):
        sys.modules.pop(name, None)


def part(outcomes: list[int]) -> dict:
    return {"rate": float(np.mean(outcomes)), "interval": [0.1, 0.9], "episodes": len(outcomes)}


def write_run(directory: pathlib.Path, before: list[int], after: list[int], p: float) -> None:
    directory.mkdir(parents=True)
    changes = np.subtract(after, before)
    summary = {
        "seeds": {"run": int(directory.name[-1])},
        "before": part(before),
        "after": part(after),
        "difference": float(np.mean(after) - np.mean(before)),
        "difference_interval": [-0.1, 0.2],
        "mcnemar_p": p,
        "gained": int((changes == 1).sum()),
        "lost": int((changes == -1).sum()),
        "simulated_steps": 12_345,
        "wall_seconds": {"sft": 60.0, "grpo": 120.0},
    }
    (directory / "summary.json").write_text(json.dumps(summary))
    task, seed = directory.name.split("-seed")
    config = get_config("long" if task == "OpenDrawer" else "kitchen").to_dict()
    config |= {"task": task, "seed": int(seed), "run_dir": str(directory)}
    if directory.name == "OpenDrawer-seed1":  # beside its preset
        config["sft"]["steps"] = 7
    (directory / "config.json").write_text(json.dumps(config))


def test_every_task_is_run_with_the_preset_that_suits_it(kitchen_24):
    rows = kitchen_24.cells(list(TASKS), [3], "")
    assert [cell.task for cell in rows] == list(TASKS) and {cell.seed for cell in rows} == {3}
    presets = {cell.task: cell.config for cell in rows}
    assert presets["TurnOnSinkFaucet"] == "configs/grpo.py:kitchen"
    assert presets["OpenDoubleDoor"] == "configs/grpo.py:long"
    assert presets["TurnOffStove"] == "configs/grpo.py:brief"
    carrying = {task for task, config in presets.items() if config == "configs/grpo.py:carry"}
    assert carrying == {task for task in TASKS if task.startswith("PnP") or task.endswith("Mug")}
    assert {cell.config for cell in kitchen_24.cells(["OpenDrawer"], [0], "smoke")} == {"configs/grpo.py:smoke"}


def test_the_mean_weighs_tasks_alike_and_names_what_went_wrong(kitchen_24, tmp_path, monkeypatch):
    """OpenDrawer's two seeds gain 50 and 100 points, TurnOnStove's one seed loses 25: the mean is (75 − 25) / 2."""
    write_run(tmp_path / "OpenDrawer-seed0", [0, 0, 0, 0], [1, 1, 0, 0], 0.5)
    write_run(tmp_path / "OpenDrawer-seed1", [0, 0, 0, 0], [1, 1, 1, 1], 0.1)
    write_run(tmp_path / "TurnOnStove-seed0", [1, 1, 1, 1], [1, 1, 1, 0], 0.01)
    cells = kitchen_24.cells(["OpenDrawer", "TurnOnStove"], [0, 1], "")
    rows = kitchen_24.finished(cells, tmp_path, {})
    assert [row.cell.name for row in rows] == ["OpenDrawer-seed0", "TurnOnStove-seed0", "OpenDrawer-seed1"]
    assert sorted(rows[0].differences) == [0, 0, 1, 1] and sorted(rows[1].differences) == [-1, 0, 0, 0]
    gain, (low, high) = kitchen_24.mean_gain(rows)
    assert gain == pytest.approx(0.25)
    assert -0.25 <= low <= 0.25 <= high <= 1.0
    page = kitchen_24.table(rows, ["TurnOnStove-seed1"])
    assert "| OpenDrawer, 0 | long | 0.0 % [10.0, 90.0] | 50.0 % [10.0, 90.0] | +50.0 [-10.0, +20.0] | 0.5 |" in page
    assert "| not counted | 1 | 12,345 | 3.0 |" in page
    rows[0].summary.update(training_unstable=2, protocol={"physics": 2})
    rows[0].summary["after"]["unstable"] = 1
    assert "| 2, 1 | 2 | 12,345 | 3.0 |" in kitchen_24.table(rows, [])
    assert "Mean gain over 2 tasks: **+25.0 points**" in page
    assert "Significantly worse after RL: TurnOnStove-seed0." in page
    assert "SFT leaves few successes (below 5 %): OpenDrawer-seed0, OpenDrawer-seed1." in page
    assert "RL does not lift (interval of the gain includes zero): OpenDrawer-seed0," in page
    assert "Not measured yet: TurnOnStove-seed1." in page and "- OpenDrawer-seed0" not in page
    assert "\n- OpenDrawer-seed1: `--config.sft.steps=7`\n" in page
    rows[0].summary["note"] = "the handle is not seen"
    assert "\n- OpenDrawer-seed0: the handle is not seen\n" in kitchen_24.table(rows, [])
    figures = [json.loads(line.removeprefix("RESULT ")) for line in kitchen_24.results(rows)]
    assert [(f["value"], f["met"], f["tasks_missing"]) for f in figures] == [(25.0, None, 22), (1, None, 22)]
    monkeypatch.setattr(kitchen_24, "TASKS", ("OpenDrawer", "TurnOnStove"))
    figures = [json.loads(line.removeprefix("RESULT ")) for line in kitchen_24.results(rows)]
    assert [(f["value"], f["met"]) for f in figures] == [(25.0, True), (1, False)]


def test_a_table_without_runs_says_what_is_missing(kitchen_24):
    page = kitchen_24.table([], ["OpenDrawer-seed0"])
    assert "Not measured yet: OpenDrawer-seed0." in page and "Mean gain" not in page
    assert kitchen_24.results([]) == []


def test_finished_runs_are_kept_and_only_missing_ones_are_run(kitchen_24, tmp_path, monkeypatch, capsys):
    """One row stands in the results, one is run now, by a stand-in for the hours that training takes."""
    results, page = tmp_path / "results.json", tmp_path / "table.md"
    options = ["--results", str(results), "--table", str(page), "--only", "OpenDrawer,TurnOnStove"]
    ran = []

    def run_all(rows, out, jobs, extra):
        ran.extend(cell.name for cell in rows)
        for cell in rows:
            write_run(out / cell.name, [0, 0, 1, 0], [1, 0, 0, 1], 0.5)

    def main(out, *more):
        monkeypatch.setattr(sys, "argv", ["kitchen_24.py", "--out", str(tmp_path / out), *options, *more])
        kitchen_24.main()
        return json.loads(results.read_text())

    monkeypatch.setattr(kitchen_24, "run_all", run_all)
    write_run(tmp_path / "first" / "OpenDrawer-seed0", [0, 0, 0, 0], [1, 1, 0, 0], 0.5)
    assert list(main("first", "--report")) == ["OpenDrawer-seed0"] and not ran
    with page.open("a") as file:
        file.write("\n## Written by hand\n\nA line.\n")
    stored = main("second", "--preset", "smoke")
    assert ran == ["TurnOnStove-seed0"] and set(stored) == {"OpenDrawer-seed0", "TurnOnStove-seed0"}
    presets = [stored[f"{task}-seed0"]["config"] for task in ("OpenDrawer", "TurnOnStove")]
    assert presets == ["configs/grpo.py:long", "configs/grpo.py:smoke"]
    assert "+50.0 [-10.0" in page.read_text() and "+25.0 [-10.0" in page.read_text()
    assert (
        page.read_text().endswith("\n## Written by hand\n\nA line.\n")
        and page.read_text().count("# The kitchen's 24") == 1
    )
    main("third", "--again")
    assert ran == ["TurnOnStove-seed0", "OpenDrawer-seed0", "TurnOnStove-seed0"]
    capsys.readouterr()
