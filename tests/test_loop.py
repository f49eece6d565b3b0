"""SFT and GRPO end to end in the kitchen: an interrupted run ends with the same bits as one that was left alone."""

import dataclasses
import os
import signal

import jax
import numpy as np
import pytest
import tiny_policy as tiny
from tiny_grpo import CONFIG, SEED, assert_same_bits, compiled, grpo, records, trainer

from envs.kitchen import demos
from z1_jax.config import SftConfig, TrainConfig
from z1_jax.data.dataset import write_dataset
from z1_jax.metrics import MetricsWriter, read_records
from z1_jax.policy import named
from z1_jax.rl.trainer import GrpoTrainer
from z1_jax.sft import SftTrainer, train_sft

SFT = SftConfig(steps=5, batch_size=4, flows=2, checkpoint_every=3)


class Stopped(Exception):
    """Stands for a kill at a bad moment."""


def fresh_policy():
    """The tiny policy with its own arrays: SFT consumes what it is given."""
    policy = tiny.policy()
    return dataclasses.replace(policy, params=jax.tree.map(lambda x: x.copy(), policy.params))


@pytest.fixture(scope="module")
def untouched(tmp_path_factory):
    """A GRPO run that nobody disturbed."""
    print(f"seed {SEED}")
    run_dir = tmp_path_factory.mktemp("untouched")
    return run_dir, grpo(run_dir, trainer())


def test_a_run_trains_only_the_expert_and_writes_everything_down(untouched):
    run_dir, policy = untouched
    before, after = named(tiny.policy().params), named(policy.params)
    moved = {name for name in before if not np.array_equal(before[name], after[name])}
    assert moved and all(name.startswith("expert.") for name in moved)
    rows = records(run_dir)
    assert [row["step"] for row in rows] == [0, 1, 2] and {row["stage"] for row in rows} == {"grpo"}
    for row in rows:
        assert row["ratio/first_update_max_error"] < 1e-3  # the real path: pool, actor, caches, update
        assert row["steps/simulated"] < row["steps/unshared"]
        assert 0 <= row["success"] <= 1 and row["groups/kept"] == 4 and np.isfinite(row["loss"])
    assert rows[-1]["steps/total"] == sum(row["steps/simulated"] for row in rows)
    episodes = records(run_dir, "episodes.jsonl")
    assert len(episodes) == 3 * 16
    assert np.mean([e["success"] for e in episodes]) == pytest.approx(np.mean([row["success"] for row in rows]))
    # Nothing was compiled again after the first iterations.
    before = compiled().traces
    again = trainer()
    again.update(again.collect(tiny.pool(16), 0), 0)
    assert again.traces == before and before["update"] == 1


def test_times_add_up(untouched):
    for row in read_records(untouched[0] / "metrics.jsonl"):
        parts = sum(row[f"time/{name}"] for name in ("simulate", "render", "sample", "update", "idle"))
        assert parts == pytest.approx(row["time/total"], rel=0.05, abs=0.02)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_resumes_bit_for_bit(untouched, tmp_path, monkeypatch, number):
    """The first signal lets the running iteration end; the same call goes on after it."""
    made = trainer()
    collect = made.collect

    def interrupted(pool, iteration):
        if iteration == 0:
            os.kill(os.getpid(), number)
        return collect(pool, iteration)

    monkeypatch.setattr(made, "collect", interrupted)
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(KeyboardInterrupt):
        grpo(tmp_path, made)
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert [row["step"] for row in records(tmp_path)] == [0]
    resumed = grpo(tmp_path, trainer())
    assert_same_bits(resumed, untouched[1])
    assert records(tmp_path) == records(untouched[0])
    assert records(tmp_path, "episodes.jsonl") == records(untouched[0], "episodes.jsonl")


@pytest.mark.parametrize("moment", [1, 2])
def test_a_killed_run_resumes_bit_for_bit(untouched, tmp_path, monkeypatch, moment):
    """Killed between checkpoints: records that no checkpoint covers are written again, not twice."""
    made = trainer()
    update = made.update

    def killed(rollouts, iteration):
        if iteration == moment:
            raise Stopped
        return update(rollouts, iteration)

    monkeypatch.setattr(made, "update", killed)
    with pytest.raises(Stopped):
        grpo(tmp_path, made)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "grpo", "st')  # the line that was being written
    assert_same_bits(grpo(tmp_path, trainer()), untouched[1])
    assert records(tmp_path) == records(untouched[0])
    assert records(tmp_path, "episodes.jsonl") == records(untouched[0], "episodes.jsonl")


def test_a_finished_run_is_left_as_it_is(untouched, monkeypatch):
    run_dir, policy = untouched
    before = records(run_dir)
    made = trainer()
    monkeypatch.setattr(made, "collect", None)  # would fail if it were called
    assert_same_bits(grpo(run_dir, made), policy)
    assert records(run_dir) == before


def test_early_stopping_survives_a_resume(tmp_path, untouched):
    config = dataclasses.replace(CONFIG, train=TrainConfig(iterations=3, stop_success=0.0, stop_window=1))
    first = grpo(tmp_path, trainer(config))
    assert [row["step"] for row in records(tmp_path)] == [0]
    assert_same_bits(grpo(tmp_path, trainer(config)), first)
    assert records(tmp_path) == records(untouched[0])[:1]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    env = tiny.kitchen.make(tiny.TASK, cameras=(tiny.CAMERA,), image_size=tiny.PIXELS, horizon=tiny.HORIZON)
    episodes = (demos.run_episode(env, seed) for seed in range(3))
    return write_dataset(tmp_path_factory.mktemp("data") / "demos", episodes, {"made_by": "test"})


def sft(run_dir, dataset):
    with MetricsWriter(run_dir) as writer:
        return train_sft(
            fresh_policy(),
            dataset,
            SFT,
            SEED,
            tiny.one_device(),
            run_dir / "checkpoints" / "sft",
            writer,
            report_every=1,
        )


def test_sft_then_grpo_interrupted_in_both_ends_with_the_same_bits(tmp_path, dataset, monkeypatch):
    whole = sft(tmp_path / "whole", dataset)
    step = SftTrainer.step

    def interrupted(self, batch, number):
        if number == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, batch, number)

    with monkeypatch.context() as patch:
        patch.setattr(SftTrainer, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            sft(tmp_path / "cut", dataset)
    resumed = sft(tmp_path / "cut", dataset)
    assert_same_bits(resumed, whole)
    assert records(tmp_path / "cut") == records(tmp_path / "whole")
    assert [row["step"] for row in records(tmp_path / "cut")] == [1, 2, 3, 4, 5]
    assert_same_bits(sft(tmp_path / "cut", dataset), whole)  # a finished stage is read
    start = named(tiny.policy().params)
    assert any(not np.array_equal(start[name], value) for name, value in named(whole.params).items())

    def after_sft(policy):
        made = trainer()
        fresh = GrpoTrainer(policy, CONFIG, tiny.one_device(), 16)
        made._start, made.trainable, made.frozen, made.opt_state = (
            policy,
            fresh.trainable,
            fresh.frozen,
            fresh.opt_state,
        )
        return made

    assert_same_bits(
        grpo(tmp_path / "cut", after_sft(resumed)),
        grpo(tmp_path / "whole", after_sft(whole)),
    )
    stages = [(row["stage"], row["step"]) for row in records(tmp_path / "cut")]
    assert stages == [("sft", k) for k in range(1, 6)] + [("grpo", k) for k in range(3)]
