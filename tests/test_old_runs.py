"""Runs, checkpoints and datasets of an old revision open, go on and are evaluated: see reference/old_runs/README.md."""

import json
import os
import pathlib
import subprocess
import sys
import tarfile
import textwrap

import pytest

from z1_jax.data.dataset import open_dataset
from z1_jax.metrics import read_records

ROOT = pathlib.Path(__file__).parents[1]
OLD = ROOT / "tests" / "reference" / "old_runs"
SCENE = (
    "--config.task=OpenDrawer",
    "--config.model.preset=small",
    "--config.env.cameras=robot0_agentview_left,",
    "--config.env.image_size=28",
    "--config.env.workers=0",
    "--config.env.parallel=2",
    "--config.env.horizon=40",
)
# The numbers of demonstrations that the preset `smoke` had; they have no effect beside a dataset.
DATA = ("--config.demos.dataset=dataset", "--config.demos.episodes=24", "--config.demos.noise=0.2")
SFT = (*DATA, "--config.sft.steps=3", "--config.sft.batch_size=8")
GRPO = (
    "--config.eval.episodes=4",
    "--config.eval.videos=0",
    "--config.group.count=1",
    "--config.group.size=2",
    "--config.train.iterations=4",
    "--config.train.checkpoint_every=1",
    "--config.reward.keep_low=0.0",
    "--config.reward.keep_high=1.0",
    "--config.update.batch_size=8",
    "--config.update.micro_batch=8",
)
COMMANDS = {
    "sft": ("train", f"--config={ROOT}/configs/sft.py:smoke", *SCENE, *SFT, "--config.eval.episodes=2"),
    "run": ("train", f"--config={ROOT}/configs/grpo.py:smoke", *SCENE, *SFT, *GRPO),
    "evaluation": (
        *("evaluate", f"--config={ROOT}/configs/eval.py:smoke", *SCENE),
        *("--config.checkpoint=sft", "--config.eval.episodes=6"),
    ),
}


def go_on(folder: pathlib.Path) -> str:
    """Gives each command again, as its user would, and returns what they print."""
    commands = [(name, *rest, f"--config.run_dir={run_dir}") for run_dir, (name, *rest) in COMMANDS.items()]
    program = f"""
        import importlib
        from z1_jax.models.gemma import GemmaConfig
        from z1_jax.models.pi05 import Pi05Config
        from z1_jax.models.presets import PRESETS
        from z1_jax.models.siglip import SiglipConfig

        small = GemmaConfig(width=16, depth=2, mlp=16, heads=2, kv_heads=1, head_dim=8)
        vision = SiglipConfig(width=16, depth=1, mlp=16, heads=2, patch=14, image_size=28)
        PRESETS["small"] = Pi05Config(
            vision, small, small, vocab_size=512, cameras=1, prompt_length=44, action_dim=12, horizon=8, dtype="float32"
        )
        for name, *arguments in {commands!r}:
            importlib.import_module("z1_jax." + name).main([name, *arguments])
    """
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def unpack(folder: pathlib.Path) -> pathlib.Path:
    with tarfile.open(OLD / "files.tar.xz") as files:
        files.extractall(folder, filter="data")
    return folder


@pytest.fixture(scope="module")
def before(tmp_path_factory) -> pathlib.Path:
    """The files as they were left."""
    return unpack(tmp_path_factory.mktemp("old"))


@pytest.fixture(scope="module")
def after(tmp_path_factory) -> tuple[pathlib.Path, str]:
    """The files after each command was given again, and what was printed."""
    folder = unpack(tmp_path_factory.mktemp("new"))
    return folder, go_on(folder)


def test_a_dataset_opens(before):
    dataset = open_dataset(before / "dataset")
    assert (len(dataset.episodes), len(dataset), dataset.cameras) == (2, 13, {"robot0_agentview_left": (28, 28, 3)})


def test_a_finished_run_is_known_to_be_finished(before, after):
    folder, out = after
    sentence = json.loads((before / "sft" / "summary.json").read_text())["sentence"]
    assert f"already finished: {sentence}" in out
    assert (folder / "sft" / "summary.json").read_bytes() == (before / "sft" / "summary.json").read_bytes()


def test_a_run_stopped_in_grpo_goes_on_with_the_same_numbers(before, after):
    """Nothing is done again, and what follows is what the old revision did itself."""
    folder, out = after
    kept = (before / "run" / "metrics.jsonl").read_bytes()
    assert (folder / "run" / "metrics.jsonl").read_bytes().startswith(kept) and len(kept.splitlines()) == 2
    first = pathlib.Path("run", "evaluation", "before.jsonl")
    assert (folder / first).read_bytes() == (before / first).read_bytes()
    rows = [row for row in read_records(folder / "run" / "metrics.jsonl") if row["stage"] == "grpo"]
    theirs = [json.loads(line) for line in (OLD / "grpo.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [row["step"] for row in theirs] == [0, 1, 2, 3]
    for row, other in zip(rows, theirs, strict=True):
        for key in (key for key in other if not key.startswith("time/")):
            known = other[key] if isinstance(other[key], str) else pytest.approx(other[key], rel=1e-4, abs=1e-4)
            assert row[key] == known, (row["step"], key)
    summary = json.loads((folder / "run" / "summary.json").read_text())
    assert summary["sentence"] in out and len(read_records(folder / "run/evaluation/after.jsonl")) == 4


def test_an_evaluation_stopped_half_way_goes_on(before, after):
    folder, out = after
    results = pathlib.Path("evaluation", "evaluation", "checkpoint.jsonl")
    kept = (before / results).read_bytes()
    assert (folder / results).read_bytes().startswith(kept) and len(kept.splitlines()) == 2
    rows = read_records(folder / results)
    assert [row["seed"] for row in rows] == list(range(900_000_000, 900_000_006))
    assert json.loads((folder / "evaluation" / "summary.json").read_text())["after"]["episodes"] == 6
