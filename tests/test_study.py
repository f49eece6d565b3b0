"""A study: its runs, what is refused, its tables by hand, and a whole one that is stopped and goes on."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from z1_jax.config.schema import ConfigError
from z1_jax.study import __main__ as program
from z1_jax.study.config import cells, parse_study
from z1_jax.study.table import Outcome, markdown, means, rows

ROOT = pathlib.Path(__file__).parents[1]


def study(*arguments: str, preset: str = "smoke"):
    return parse_study(["study", f"--config={ROOT / 'configs' / 'study.py'}:{preset}", *arguments])


def test_the_runs_of_a_study(tmp_path):
    made = cells(study(f"--config.folder={tmp_path}", "--config.seeds=3,5", "--joint.group.count=4"))
    assert [cell.name for cell in made] == [
        "sft-seed3", "specialists-OpenDrawer-seed3", "specialists-CloseDrawer-seed3", "joint-seed3",
        "sft-seed5", "specialists-OpenDrawer-seed5", "specialists-CloseDrawer-seed5", "joint-seed5",
    ]  # fmt: skip
    special, joint = made[1], made[3]
    assert special.needs == joint.needs == "sft-seed3" and f"--config.init={tmp_path / 'sft-seed3'}" in special.argv
    assert "--config.task=OpenDrawer" in special.argv and "--config.tasks=drawers" in joint.argv
    assert "--config.group.count=4" in joint.argv and "--config.group.count=2" in special.argv
    assert "--config.eval.episodes=16" in special.argv and "--config.eval.episodes=16" in made[0].argv


def test_the_kitchens_study_has_24_tasks():
    assert [cell.kind for cell in cells(study(preset="kitchen24"))] == ["sft", *["specialists"] * 24, "joint"]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--config.seeds=x"], "config key seeds: got 'x', expected whole numbers"),
        (["--config.seeds=1,1"], "config key seeds: got 1, 1, expected each once"),
        (["--config.forms=solo"], "config key forms: got 'solo', expected one or more of specialists, joint"),
        (["--config.tasks="], "config key tasks: got nothing"),
        (["--config.tasks=OpenDrawer"], "config key tasks: got OpenDrawer, expected two tasks or more"),
        (["--config.tasks=drawers,OpenDrawer"], "sft: config key tasks: OpenDrawer is there twice"),
        (["--config.tasks=robocasa24"], "sft: config key tasks: robocasa24 is a set of env.suite=robocasa"),
        (["--config.foldr=x"], "config key foldr does not exist; did you mean folder"),
        (["--joint.group.cuont=3"], "joint: config key group.cuont does not exist; did you mean group.count"),
        (["--grpo.seed=3"], "grpo.seed: the study sets seed of each run itself"),
        (["--specialists.group.spread=adaptive"], "specialists: config key group.spread: .*no effect on one task"),
        (["--joint.eval.episodes=8"], r"joint.eval.episodes: all runs are evaluated alike; give it as --every.eval"),
        (["--solo.seed=3"], "argument '--solo.seed=3' is not understood, expected --config.key=value, --every.key"),
    ],
)
def test_what_cannot_be_is_one_line(arguments, text):
    with pytest.raises(ConfigError, match=text) as error:
        cells(study(*arguments))
    assert "\n" not in str(error.value)


def test_a_folder_of_another_study_is_refused(tmp_path):
    program._claim(study(), tmp_path / "a")
    program._claim(study(), tmp_path / "a")
    with pytest.raises(ConfigError, match=r"belongs to another study \(seeds is \['0'\], asked for \['1'\]\)"):
        program._claim(study("--config.seeds=1"), tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "mine").touch()
    with pytest.raises(ConfigError, match="is not empty and holds no study"):
        program._claim(study(), tmp_path / "b")


def outcome(form: str, task: str, pattern: str, seed: int = 0, steps: int = 0) -> Outcome:
    return Outcome(form, task, seed, tuple(range(len(pattern))), np.array([c == "x" for c in pattern]), steps)


def test_tables_by_hand():
    # A: 2/8 → 8/8, gains 6, loses none: p = 2/64. B: 8/8 → 8/8: p = 1. Holm of two: 2·2/64 and 1.
    found = [
        outcome("sft", "A", "xx......"), outcome("sft", "B", "xxxxxxxx"),
        outcome("specialists", "A", "xxxxxxxx"), outcome("specialists", "B", "xxxxxxxx"),
        outcome("joint", "A", "xxxx...."),
    ]  # fmt: skip
    each = {(row.task, row.form): row for row in rows(found, 0.95)}
    assert (each["A", "specialists"].before, each["A", "specialists"].after) == (0.25, 1.0)
    assert each["A", "specialists"].p_value == pytest.approx(4 / 64) and each["B", "specialists"].p_value == 1.0
    over = means(found, 0.95)
    assert [(mean.form, mean.rate) for mean in over] == [("sft", 0.625), ("specialists", 1.0)]  # joint lacks a task
    assert over[1].difference == 0.375
    assert over[1].difference_interval == (0.0, 0.75)  # two tasks drawn: both B, or both A
    text = markdown(over, list(each.values()), {"tasks": 2, "seeds": 1}, 0.95)
    # Two of two tasks: Wilson's interval of them. With one training seed the interquartile mean has none.
    assert "| specialists | 100.0 [34.2, 100.0] | +37.5 [+0.0, +75.0] | 100.0 |" in text
    low, high = each["B", "specialists"].interval  # eight equal pairs: Tango's ±z²/(8 + z²)
    assert low == -high and high == pytest.approx(3.8415 / (8 + 3.8415), abs=1e-4)
    assert "| A | specialists | 25.0 | 100.0 | +75.0 [" in text and "| 0.062 |" in text


def test_training_noise_is_in_the_intervals():
    """Three training seeds of one task that end at 0, 1/2 and 1: episodes alone would say much less."""
    found = [outcome("sft", task, "........", seed) for task in "AB" for seed in range(3)]
    found += [outcome("joint", task, p * 8, seed) for task in "AB" for seed, p in enumerate(".x")]
    found += [outcome("joint", task, "xxxx....", 2) for task in "AB"]
    row = rows(found, 0.95)[0]
    assert row.interval == (0.0, 1.0) and row.after == 0.5
    assert "nan" not in markdown(means(found, 0.95), [row], {"tasks": 2, "seeds": 3}, 0.95)
    assert means(found, 0.95)[0].interquartile_interval == (0.0, 0.0)  # of three training seeds that all fail
    with pytest.raises(ValueError, match="on different seeds"):
        rows([*found[:6], Outcome("joint", "A", 0, tuple(range(1, 9)), np.ones(8, bool))], 0.95)


@pytest.mark.slow
def test_a_study_that_is_stopped_goes_on(tmp_path):
    """Of two tasks, with a run that is taken away in between; a second program finds nothing to do."""
    command = [
        sys.executable, "-m", "z1_jax.study", f"--config={ROOT / 'configs' / 'study.py'}:smoke",
        f"--config.folder={tmp_path / 'study'}", "--every.eval.episodes=4", "--sft.demos.episodes=6",
        "--sft.sft.steps=10", "--every.env.workers=0",
    ]  # fmt: skip
    folder = tmp_path / "study"
    ran = subprocess.run([*command, "--config.forms=joint"], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr
    results = json.loads((folder / "results.json").read_text())
    assert set(results["means"]) == {"sft", "joint"} and len(results["rows"]) == 2 * 2 * 4
    assert (folder / "study.html").exists() and "| joint | " in (folder / "table.md").read_text()
    before = (folder / "joint-seed0" / "summary.json").stat().st_mtime_ns
    (folder / "table.md").unlink()
    again = subprocess.run([*command, "--config.forms=joint"], cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 0 and (folder / "table.md").exists() and "══" not in again.stdout
    assert (folder / "joint-seed0" / "summary.json").stat().st_mtime_ns == before
    other = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert other.returncode == 2 and other.stderr.startswith("error: ") and "belongs to another study" in other.stderr
