"""SFT and GRPO end to end in the kitchen: an interrupted run ends with the same bits as one that was left alone."""

import dataclasses
import functools
import os
import pathlib
import signal

import jax
import numpy as np
import pytest
import tiny_policy as tiny

from envs.kitchen import demos
from z1_jax.config import (
    Config,
    EnvConfig,
    GroupConfig,
    OptimConfig,
    RewardConfig,
    SftConfig,
    TrainConfig,
    UpdateConfig,
)
from z1_jax.data.dataset import write_dataset
from z1_jax.metrics import MetricsWriter, read_records
from z1_jax.policy import named
from z1_jax.rl import loop
from z1_jax.rl.loop import GrpoTrainer, train_grpo, training_seeds
from z1_jax.rl.update import RatioError
from z1_jax.sft import SftTrainer, train_sft

SEED = int(np.random.SeedSequence().generate_state(1)[0]) % 10_000
CONFIG = Config(
    seed=SEED,
    env=EnvConfig(parallel=16),
    group=GroupConfig(count=4, size=4, branching="tree", prefix_chunks=2, prefix_chunks_end=2),
    reward=RewardConfig(keep_low=0.0, keep_high=1.0),
    update=UpdateConfig(
        epochs=2, batch_size=8, micro_batch=8, optim=OptimConfig(lr=1e-3, warmup_steps=2, schedule="constant")
    ),
    train=TrainConfig(iterations=3, checkpoint_every=2),
)
SFT = SftConfig(steps=5, batch_size=4, flows=2, checkpoint_every=3)


class Stopped(Exception):
    """Stands for a kill at a bad moment."""


def fresh_policy():
    """The tiny policy with its own arrays: SFT consumes what it is given."""
    policy = tiny.policy()
    return dataclasses.replace(policy, params=jax.tree.map(lambda x: x.copy(), policy.params))


@functools.cache
def trainer_of_the_files() -> GrpoTrainer:
    return GrpoTrainer(tiny.policy(), CONFIG, tiny.one_device(), 16)


def trainer(config: Config = CONFIG) -> GrpoTrainer:
    """A trainer at iteration 0 that shares its compiled functions with the others of this file."""
    new, shared = GrpoTrainer(tiny.policy(), config, tiny.one_device(), 16), trainer_of_the_files()
    new.actor, new._updater = shared.actor, shared._updater
    return new


def grpo(run_dir: pathlib.Path, made: GrpoTrainer):
    with MetricsWriter(run_dir) as writer:
        return train_grpo(made, tiny.pool(16), run_dir / "checkpoints" / "grpo", writer)


def records(run_dir: pathlib.Path, name: str = "metrics.jsonl"):
    """The records without what is measured by the clock."""
    return [{k: v for k, v in record.items() if not k.startswith("time/")} for record in read_records(run_dir / name)]


def assert_same_bits(a, b):
    a, b = named(a.params), named(b.params)
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


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
    before = trainer_of_the_files().traces
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


class Recorder:
    """An updater that keeps what it is given and changes nothing."""

    def __init__(self, **stats):
        self.batches, self.traces = [], 0
        names = ("loss", "ratio_error", "ratio_sum", "ratio_max", "clipped", "kl_sum", "grad_norm", "update_to_weight")
        self.stats = {**dict.fromkeys(names, 0.0), "nodes": 1.0, **stats}

    def step(self, trainable, opt_state, frozen, batch, normaliser, lr_scale):
        self.batches.append((batch, normaliser))
        return trainable, opt_state, self.stats


def recorded(monkeypatch, config, rollouts, **stats):
    """The advantages and batches of one update, and its diagnostics."""
    made, seen = trainer(config), []
    made._updater = Recorder(**stats)
    real = loop.tree.signed_advantage_sums
    monkeypatch.setattr(loop.tree, "signed_advantage_sums", lambda a, *rest: seen.append(a) or real(a, *rest))
    result = made.update(rollouts, 0)
    monkeypatch.undo()
    return seen[0], made._updater.batches, result


@pytest.fixture(scope="module")
def rollouts():
    return trainer().collect(tiny.pool(16), 0)


def test_shuffled_advantages_are_permuted_within_each_group(monkeypatch, rollouts, rng):
    varied = dataclasses.replace(
        rollouts, success=rng.random((4, 4)) < 0.99, chunks=np.stack([rng.permutation(4) + 1 for _ in range(4)])
    )
    group = dataclasses.replace(CONFIG.group, shuffle_advantages=True)
    plain, _, _ = recorded(monkeypatch, CONFIG, varied)
    shuffled, _, _ = recorded(monkeypatch, dataclasses.replace(CONFIG, group=group), varied)
    np.testing.assert_array_equal(np.sort(plain, axis=1), np.sort(shuffled, axis=1))
    assert not np.array_equal(plain, shuffled)  # sixteen places: by chance less than one in 300,000
    again, _, _ = recorded(monkeypatch, dataclasses.replace(CONFIG, group=group), varied)
    np.testing.assert_array_equal(again, shuffled)  # and the shuffle resumes


def test_only_trainable_nodes_of_kept_groups_are_dealt(monkeypatch, rollouts):
    success = np.array([[0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1], [0, 1, 1, 0]], bool)
    varied = dataclasses.replace(rollouts, success=success, chunks=np.ones((4, 4), int))
    config = dataclasses.replace(CONFIG, reward=RewardConfig())  # 0.1 … 0.99: drops groups 0 and 2
    _, batches, result = recorded(monkeypatch, config, varied)
    assert (result["groups/kept"], result["groups/all_success"], result["groups/all_fail"]) == (2, 1, 1)
    nodes = rollouts.nodes
    usable = nodes.trainable & np.isin(nodes.group, [1, 3])
    assert result["nodes/used"] == usable.sum() > 0
    assert sum(batch.valid.sum() for batch, _ in batches) == 2 * usable.sum()  # two epochs
    assert sum(normaliser for _, normaliser in batches) == 2 * nodes.size[usable].sum()
    dealt = np.concatenate([batch.logp_old[batch.valid] for batch, _ in batches])
    np.testing.assert_array_equal(np.unique(dealt), np.unique(nodes.logp[usable]))


def test_an_iteration_without_a_usable_group_trains_nothing(monkeypatch, rollouts):
    config = dataclasses.replace(CONFIG, reward=RewardConfig())
    _, batches, result = recorded(monkeypatch, config, dataclasses.replace(rollouts, success=np.zeros((4, 4), bool)))
    assert batches == [] and result["updates"] == 0 and result["groups/kept"] == 0


def test_a_broken_ratio_or_number_stops_the_run(monkeypatch, rollouts):
    with pytest.raises(RatioError, match="off by 0.002, expected at most 0.001"):
        recorded(monkeypatch, CONFIG, rollouts, ratio_error=2e-3)
    monkeypatch.undo()
    with pytest.raises(RatioError, match="loss of the update is not finite"):
        recorded(monkeypatch, CONFIG, rollouts, loss=np.nan)


def test_wrong_stored_densities_are_noticed_by_the_real_update(rollouts):
    shifted = dataclasses.replace(rollouts, nodes=dataclasses.replace(rollouts.nodes, logp=rollouts.nodes.logp + 0.01))
    with pytest.raises(RatioError, match="does not score what the rollout sampled"):
        trainer().update(shifted, 0)


def test_training_seeds_stay_apart():
    drawn = np.concatenate([training_seeds(s, i, 8) for s in range(5) for i in range(50)])
    assert len(np.unique(drawn)) == len(drawn)
    assert (
        drawn.min() >= 100_000_000 and drawn.max() < 800_000_000 < 900_000_000
    )  # demonstrations below, evaluation above
    np.testing.assert_array_equal(training_seeds(3, 7, 4), training_seeds(3, 7, 8)[:4])


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
        made._policy, made.trainable, made.frozen, made.opt_state = (
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
