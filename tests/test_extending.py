"""A run that is given another length goes on; what was concluded stays beside it; what cannot be is one line."""

import dataclasses
import json
import pathlib

import pytest
import tiny_policy as tiny

from z1_jax import train
from z1_jax.checkpoint import Checkpoints
from z1_jax.config.schema import Config, ConfigError, OptimConfig, SftConfig, TrainConfig
from z1_jax.extending import Change, changed_lengths, known_changes, take_lengths
from z1_jax.optim import schedule
from z1_jax.run_dir import claim_directory

ROOT = pathlib.Path(__file__).parents[1]


def made(run_dir, **values) -> Config:
    return Config(run_dir=str(run_dir), **values)


def done(run_dir, stage: str, step: int) -> None:
    (run_dir / "checkpoints" / stage / str(step) / "params").mkdir(parents=True)


def test_more_is_taken_and_less_than_is_done_refused(tmp_path, capsys):
    began = made(tmp_path, train=TrainConfig(iterations=240))
    claim_directory(began)
    done(tmp_path, "sft", 300)
    done(tmp_path, "grpo", 230)
    done(tmp_path, "grpo", 240)
    (tmp_path / "summary.json").write_text("{}")
    assert changed_lengths(began, tmp_path) == []
    with pytest.raises(ConfigError, match=r"train.iterations: got 239, but .* has done 240; expected at least that"):
        changed_lengths(made(tmp_path, train=TrainConfig(iterations=239)), tmp_path)
    assert changed_lengths(made(tmp_path, train=TrainConfig(iterations=240)), tmp_path) == []
    longer = made(tmp_path, train=TrainConfig(iterations=360))
    claim_directory(longer)
    changes = changed_lengths(longer, tmp_path)
    assert changes == [Change("train.iterations", 240, 360, 240)]
    take_lengths(longer, tmp_path, changes)
    out = capsys.readouterr().out
    assert (
        "train.iterations: 240 → 360; the run continues from 240, where learning rate, noise and prefixes follow" in out
    )
    assert (tmp_path / "until-240" / "summary.json").exists() and not (tmp_path / "summary.json").exists()
    assert changed_lengths(longer, tmp_path) == [] and known_changes(tmp_path) == [dataclasses.asdict(changes[0])]
    (tmp_path / "summary.json").write_text("[]")  # concluded again before anything was done: nothing is overwritten
    again = made(tmp_path, train=TrainConfig(iterations=300))
    take_lengths(again, tmp_path, changed_lengths(again, tmp_path))
    assert (tmp_path / "until-240" / "summary.json").read_text() == "{}"
    assert (tmp_path / "until-240-2" / "summary.json").read_text() == "[]"


def test_sft_below_rl_cannot_be_longer(tmp_path):
    claim_directory(made(tmp_path))
    done(tmp_path, "sft", 300)
    longer = made(tmp_path, sft=SftConfig(steps=400))
    claim_directory(longer)
    assert changed_lengths(longer, tmp_path) == [Change("sft.steps", 300, 400, 300)]
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "before.jsonl").touch()
    with pytest.raises(ConfigError, match="sft.steps: got 400, but RL in .* started from the policy after 300; choose"):
        changed_lengths(longer, tmp_path)


def test_other_keys_and_other_stages_stay_refused(tmp_path):
    claim_directory(made(tmp_path, algorithm="sft"))
    longer = made(tmp_path, algorithm="sft", sft=SftConfig(steps=400), train=TrainConfig(iterations=3))
    with pytest.raises(ConfigError, match="train.iterations is .*, asked for 3"):
        claim_directory(longer)
    with pytest.raises(ConfigError, match="seed is 0, asked for 1"):
        claim_directory(made(tmp_path, algorithm="sft", sft=SftConfig(steps=400), seed=1))


def test_a_finished_run_goes_on(tmp_path, capsys):
    """RL in the kitchen from the tiny policy: one iteration, then two; evaluation and videos are made anew."""
    checkpoints = Checkpoints(tmp_path / "policy")
    checkpoints.save(1, tiny.policy().parts(), tiny.policy().document())
    checkpoints.close()
    run_dir = tmp_path / "run"
    command = [
        "train.py", f"--config={ROOT / 'configs' / 'grpo.py'}", f"--config.init={tmp_path / 'policy' / '1'}",
        f"--config.env.cameras={tiny.CAMERA}", "--config.env.workers=0", "--config.env.horizon=32",
        "--config.env.parallel=4", "--config.group.count=1", "--config.group.size=4", "--config.eval.episodes=2",
        "--config.eval.video_size=32", "--config.eval.videos=1", "--config.update.batch_size=8",
        "--config.update.micro_batch=8", "--config.reward.keep_low=0", f"--config.run_dir={run_dir}",
    ]  # fmt: skip
    train.main([*command, "--config.train.iterations=1"])
    capsys.readouterr()
    train.main([*command, "--config.train.iterations=1"])
    assert "already finished" in capsys.readouterr().out
    train.main([*command, "--config.train.iterations=2"])
    out = capsys.readouterr().out
    assert "train.iterations: 1 → 2; the run continues from 1" in out and "already finished" not in out
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1]
    kept = json.loads((run_dir / "config.json").read_text())
    optim = OptimConfig(**kept["update"]["optim"])
    assert kept["train"]["iterations"] == 2
    assert [row["lr"] for row in rows] == pytest.approx([float(schedule(optim, n)(i)) for i, n in ((0, 1), (1, 2))])
    summary, before = (json.loads((run_dir / name).read_text()) for name in ("summary.json", "until-1/summary.json"))
    assert (before["iterations"], summary["iterations"]) == (1, 2) and "lengths" not in before
    assert summary["lengths"] == [{"key": "train.iterations", "was": 1, "wanted": 2, "done": 1}]
    assert summary["before"] == before["before"]
    for name in ("evaluation/after.jsonl", "report.html", "videos/after_seed900000000.webp"):
        assert (run_dir / name).exists() and (run_dir / "until-1" / name).exists()
    with pytest.raises(ConfigError, match="got 1, but .* has done 2"):
        train.main([*command, "--config.train.iterations=1"])
