"""SFT and GRPO end to end in the kitchen: an interrupted run ends with the same bits as one that was left alone."""

import dataclasses
import functools
import os
import signal

import jax
import numpy as np
import pytest
import tiny_policy as tiny
from tiny_grpo import CONFIG, SEED, assert_same_bits, compiled, differing, grpo, records, trainer

from envs.base import Episode
from envs.kitchen import demos
from z1_jax.checkpoint import Checkpoints
from z1_jax.config.schema import LogConfig, LoraConfig, SelectiveConfig, SftConfig, TrainConfig
from z1_jax.data.dataset import write_dataset
from z1_jax.metrics import MetricsWriter, read_records
from z1_jax.policy import find_policy, load_policy, named
from z1_jax.resuming import concluded, counted_grpo
from z1_jax.rl import loop
from z1_jax.rl import trainer as grpo_trainer
from z1_jax.rl.rollout import BrokenIteration
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


def ratio_errors(rows):
    """The largest error of the first updates' ratios; an iteration that ends before members part updates nothing."""
    return max(row["ratio/first_update_max_error"] for row in rows if row["updates"])


def test_unstable_episodes_are_recorded_counted_and_shown(tmp_path, capsys, monkeypatch):
    """Odd seeds, which all are here, break in their second chunk; a run that goes on counts on."""
    seeds = grpo_trainer.training_seeds
    monkeypatch.setattr(grpo_trainer, "training_seeds", lambda *args: seeds(*args) | 1)
    for iterations in (1, 3):
        made = trainer(dataclasses.replace(CONFIG, train=TrainConfig(iterations=iterations, checkpoint_every=1)))
        with MetricsWriter(tmp_path) as writer:
            loop.train_grpo(made, tiny.breaking_pool(16), tmp_path / "checkpoints" / "grpo", writer)
    rows, episodes = records(tmp_path), records(tmp_path, "episodes.jsonl")
    for row in rows:
        broken = [e for e in episodes if e["step"] == row["step"] and e["unstable"]]
        assert row["unstable"] == len(broken)
        assert not any(e["success"] for e in broken)
        assert all(e["unstable"] for e in episodes if e["chunks"] > 1)
    assert len(rows) == 3 and any(row["unstable"] for row in rows)
    assert f" {sum(row['unstable'] for row in rows)} unstable" in capsys.readouterr().out.splitlines()[-1]


def test_a_group_that_is_lost_is_counted_and_shown_and_the_run_goes_on(tmp_path, capsys, untouched):
    """A seed of two iterations fails where its group comes to a second chunk; a run that goes on counts on."""
    seeds = [grpo_trainer.training_seeds(SEED, iteration, 4) for iteration in range(3)]
    first = [e for e in records(untouched[0], "episodes.jsonl") if e["step"] == 0]
    failing = next(e["seed"] for e in first if e["chunks"] > 1)  # the same policy: it comes to a second chunk here too
    with tiny.failing_pool(16, frozenset({failing, int(seeds[2][3])})) as pool:
        for iterations in (1, 3):
            made = trainer(dataclasses.replace(CONFIG, train=TrainConfig(iterations=iterations, checkpoint_every=1)))
            with MetricsWriter(tmp_path) as writer:
                loop.train_grpo(made, pool, tmp_path / "checkpoints" / "grpo", writer)
    rows, episodes = records(tmp_path), records(tmp_path, "episodes.jsonl")
    missing = [set(map(int, block)) - {e["seed"] for e in episodes} for block in seeds]
    assert missing[1] == set() and missing[0] == {failing} and missing[2] <= {int(seeds[2][3])}
    assert [row.get("groups/lost", 0) for row in rows] == list(map(len, missing))
    assert [row.get("groups/drawn", 4) for row in rows] == [4, 4, 4]
    count = sum(map(len, missing))
    told = capsys.readouterr().out
    assert f" {count} groups lost" in told.splitlines()[-1]
    assert told.count("is dropped: worker 0 failed on slot") == count
    counts = counted_grpo(tmp_path, 3, Checkpoints(tmp_path / "checkpoints" / "grpo").document(3))
    assert (counts.lost, counts.groups) == (count, 12)


def test_a_run_trains_only_the_expert_and_writes_everything_down(untouched):
    run_dir, policy = untouched
    before, after = named(tiny.policy().params), named(policy.params)
    moved = {name for name in before if not np.array_equal(before[name], after[name])}
    assert moved and all(name.startswith("expert.") for name in moved)
    rows = records(run_dir)
    assert [row["step"] for row in rows] == [0, 1, 2] and {row["stage"] for row in rows} == {"grpo"}
    assert ratio_errors(rows) < 1e-3  # the real path: pool, actor, caches, update
    for row in rows:
        assert row["steps/simulated"] < row["steps/unshared"]
        assert 0 <= row["success"] <= 1 and row["groups/kept"] == 4
        assert row["updates"] == 0 or np.isfinite(row["loss"])
    assert rows[-1]["steps/total"] == sum(row["steps/simulated"] for row in rows)
    episodes = records(run_dir, "episodes.jsonl")
    assert len(episodes) == 3 * 16
    assert np.mean([e["success"] for e in episodes]) == pytest.approx(np.mean([row["success"] for row in rows]))
    # Nothing was compiled again after the first iterations.
    before = compiled().traces
    again = trainer()
    again.update(differing(again), 0)
    assert again.traces == before and before["update"] == 1


def test_chosen_iterations_are_traced(untouched, tmp_path, capsys):
    """One folder an iteration, whatever the clock says; the digits are those of a run without."""
    config = dataclasses.replace(CONFIG, log=LogConfig(profile=("1", "2")))
    assert_same_bits(grpo(tmp_path, trainer(config)), untouched[1])
    traces = sorted(path.relative_to(tmp_path / "profile").parts[0] for path in tmp_path.rglob("*.xplane.pb"))
    assert traces == ["iteration-1", "iteration-2"]
    assert all(path.stat().st_size > 1000 for path in tmp_path.rglob("*.xplane.pb"))
    longer = dataclasses.replace(config, train=dataclasses.replace(CONFIG.train, iterations=4))
    capsys.readouterr()
    grpo(tmp_path, trainer(longer))
    assert "log.profile: of 1, 2 no trace is written, they were trained before" in capsys.readouterr().out


def test_nothing_goes_to_a_device_unsaid_in_an_update(monkeypatch):
    """What an update is given by accident, here a NumPy batch that was not placed, is refused."""
    made = trainer()
    out = differing(made)
    monkeypatch.setattr(made._updater, "place", lambda batch: batch)
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        made.update(out, 0)


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


def test_adapters_train_resume_and_leave_a_whole_policy(tmp_path):
    """Scope lora through the real loop: ratios of 1, adapters alone move, a run that was cut goes on bit for bit."""
    config = dataclasses.replace(
        CONFIG,
        lora=LoraConfig(vlm_rank=2, expert_rank=2),
        train=TrainConfig(iterations=3, scope="lora", checkpoint_every=1),
    )
    made = [GrpoTrainer(tiny.policy(), config, tiny.one_device(), 16) for _ in range(3)]
    for other in made[1:]:
        other.actor, other._updater = made[0].actor, made[0]._updater
    start = jax.device_get(named(made[0].trainable))
    whole = grpo(tmp_path / "whole", made[0])
    assert all(not np.array_equal(start[name], now) for name, now in named(made[0].trainable).items())
    assert all("_lora." in name for name in start)
    assert ratio_errors(records(tmp_path / "whole")) < 1e-3
    before, after = named(tiny.policy().params), named(whole.params)
    targets = {name.rsplit("_lora.", 1)[0] for name in start}
    assert {name for name in before if not np.array_equal(before[name], after[name])} == targets
    collect = made[1].collect

    def killed(pool, iteration):
        if iteration == 1:
            raise Stopped
        return collect(pool, iteration)

    made[1].collect = killed
    with pytest.raises(Stopped):
        grpo(tmp_path / "cut", made[1])
    assert_same_bits(grpo(tmp_path / "cut", made[2]), whole)
    directory, step = find_policy(tmp_path / "cut")
    assert_same_bits(load_policy(Checkpoints(directory), step, tiny.one_device()), whole)


def test_a_finished_run_is_left_as_it_is(untouched, monkeypatch):
    run_dir, policy = untouched
    before = records(run_dir)
    made = trainer()
    monkeypatch.setattr(made, "collect", None)  # would fail if it were called
    assert_same_bits(grpo(run_dir, made), policy)
    assert records(run_dir) == before


def test_the_best_by_training_success_is_kept_and_told(tmp_path):
    """A mean over two iterations, by hand from the records; over an interruption, which saves in between."""
    train = TrainConfig(iterations=6, checkpoint_every=1, keep_last=1, keep_best=2, stop_window=1)
    config = dataclasses.replace(CONFIG, train=train)
    made = trainer(config)
    collect = made.collect

    def killed(pool, iteration):
        if iteration == 3:
            raise Stopped
        return collect(pool, iteration)

    made.collect = killed
    with pytest.raises(Stopped):
        grpo(tmp_path, made)
    grpo(tmp_path, trainer(config))
    success = [row["success"] for row in records(tmp_path)]
    means = {step: (success[step - 2] + success[step - 1]) / 2 for step in range(2, 7)}
    best = max(means, key=lambda step: (means[step], step))
    assert Checkpoints(tmp_path / "checkpoints" / "grpo").steps() == sorted({best, 6})
    directory, step = find_policy(f"{tmp_path}@best")
    assert step == best
    told = concluded(config, tmp_path)["best_checkpoint"]
    assert told == {"step": best, "success": pytest.approx(means[best]), "window": 2}
    assert "best_checkpoint" not in concluded(dataclasses.replace(config, train=TrainConfig(6, keep_best=0)), tmp_path)


class OneForAll:
    """A pool of one task, whatever the names in episodes."""

    def __getattr__(self, name):
        return getattr(tiny.pool(16), name)

    def begin_reset(self, slots, episodes):
        return tiny.pool(16).begin_reset(slots, [dataclasses.replace(episode, task="") for episode in episodes])


def test_the_best_of_several_tasks_is_by_the_mean_over_them(tmp_path):
    """By hand from each task's own records, over an interruption: the last two iterations that had groups of it."""
    train = TrainConfig(iterations=6, checkpoint_every=1, keep_last=6, keep_best=2, stop_window=1)
    group = dataclasses.replace(CONFIG.group, count=3)  # of one task two groups, of the other one, in turn
    config = dataclasses.replace(CONFIG, task="", tasks=("A", "B"), train=train, group=group)
    for iterations in (3, 6):
        length = dataclasses.replace(train, iterations=iterations)
        made = trainer(dataclasses.replace(config, train=length), episode_of=lambda task, seed: Episode(seed, task))
        grpo(tmp_path, made, OneForAll())
    rows = records(tmp_path)
    checkpoints = Checkpoints(tmp_path / "checkpoints" / "grpo")
    ratings = {}
    for step in range(2, 7):
        seen = {task: [row[f"tasks/{task}/success"] for row in rows[:step]] for task in "AB"}
        ratings[step] = np.mean([np.mean(values[-2:]) for values in seen.values()])
    best = max(ratings, key=lambda step: (ratings[step], step))
    assert checkpoints.best() == (best, pytest.approx(ratings[best]))
    told = concluded(config, tmp_path)["best_checkpoint"]
    assert told == {"step": best, "success": pytest.approx(ratings[best]), "window": 2, "tasks": 2}


def test_early_stopping_survives_a_resume(tmp_path, untouched):
    config = dataclasses.replace(CONFIG, train=TrainConfig(iterations=3, stop_success=0.0, stop_window=1))
    first = grpo(tmp_path, trainer(config))
    assert [row["step"] for row in records(tmp_path)] == [0]
    assert_same_bits(grpo(tmp_path, trainer(config)), first)
    assert records(tmp_path) == records(untouched[0])[:1]


@pytest.mark.parametrize("moment", ["update", "collect"])
def test_a_broken_iteration_is_kept_and_stops_the_run(tmp_path, monkeypatch, moment):
    """A parameter that became infinite after the first checkpoint: nothing is trained on it, the checkpoint stays."""
    made = trainer(dataclasses.replace(CONFIG, train=TrainConfig(iterations=3, checkpoint_every=1)))
    method = getattr(made, moment)

    def spoil(*arguments):
        if arguments[-1] == 1:
            leaves, tree = jax.tree.flatten(made.trainable)
            made.trainable = jax.tree.unflatten(tree, [leaves[0].at[...].set(np.inf), *leaves[1:]])
        return method(*arguments)

    monkeypatch.setattr(made, moment, spoil)
    path = tmp_path / "broken" / "iteration-1.npz"
    with pytest.raises(BrokenIteration, match="^iteration 1: .*not finite.*kept in") as error:
        grpo(tmp_path, made)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert [row["step"] for row in records(tmp_path)] == [0]
    assert sorted(p.name for p in (tmp_path / "checkpoints" / "grpo").iterdir() if p.name.isdigit()) == ["1"]
    with np.load(path) as kept:
        if moment == "collect":
            assert not np.isfinite(kept["x"]).all()
        else:
            ratio, node = kept["update/ratio"], kept["update/node"]
            assert not np.isfinite(ratio).all() and kept["nodes/logp"].shape == kept["credit/usable"].shape
            assert kept["credit/usable"][node].all() and kept["nodes/x"].shape[1] == 5


# ── train.scope=auto, end to end

SELECTIVE = dataclasses.replace(
    CONFIG,
    seed=0,  # a few of all seeds succeed along a rising straight line, and the expert alone goes on
    train=TrainConfig(iterations=5, scope="auto", checkpoint_every=1),
    selective=SelectiveConfig(iterations=3, confidence=0.9999, enough=1.01),  # else it surely switches
)


@functools.cache
def switched() -> GrpoTrainer:
    """A trainer that has entered joint, for its compiled functions."""
    made = trainer(SELECTIVE)
    made.enter("joint")
    return made


def selective_trainer(monkeypatch) -> GrpoTrainer:
    made = trainer(SELECTIVE)
    enter = made.enter

    def entered(scope):
        enter(scope)
        made.actor, made._updater = switched().actor, switched()._updater

    monkeypatch.setattr(made, "enter", entered)
    return made


def test_a_run_that_switches_its_scope_resumes_bit_for_bit(tmp_path, monkeypatch, capsys):
    """Left alone; killed in the iteration that decides; and killed after the decision, in joint training."""
    seeds = []
    reset = tiny.pool(16).begin_reset
    monkeypatch.setattr(tiny.pool(16), "begin_reset", lambda slots, given: seeds.extend(given) or reset(slots, given))
    whole = grpo(tmp_path / "whole", selective_trainer(monkeypatch))
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("train.scope=auto: ")]
    rows = records(tmp_path / "whole")
    assert [row["scope"] for row in rows] == ["expert"] * 3 + ["joint"] * 2
    decided = [row for row in rows if "selective/scope" in row]
    assert [row["step"] for row in decided] == [2] and len(said) == 1 and decided[0]["selective/reason"] in said[0]
    slope = np.polyfit(np.arange(3), [row["success"] for row in rows[:3]], 1)[0]
    assert decided[0]["selective/slope"] == pytest.approx(slope, abs=1e-12)
    assert all("grad_norm/vision" in row for row in rows[3:]) and "grad_norm/vision" not in rows[0]
    assert max(episode.seed for episode in seeds) < 800_000_000  # no held-out seed was looked at
    before, after = named(tiny.policy().params), named(whole.params)
    moved = {name.partition(".")[0] for name in before if not np.array_equal(before[name], after[name])}
    assert moved == {"vision", "language", "expert"}
    for moment in (2, 3):
        made = selective_trainer(monkeypatch)
        update = made.update

        def killed(rollouts, iteration, moment=moment, update=update):
            if iteration == moment:
                raise Stopped
            return update(rollouts, iteration)

        monkeypatch.setattr(made, "update", killed)
        with pytest.raises(Stopped):
            grpo(tmp_path / str(moment), made)
        resumed = selective_trainer(monkeypatch)
        assert_same_bits(grpo(tmp_path / str(moment), resumed), whole)
        assert records(tmp_path / str(moment)) == rows and resumed.scope == "joint"


def test_a_resumed_run_fills_its_prefix_caches_anew(tmp_path, monkeypatch):
    """Killed within an update: the resumed iteration trains on the caches of its own looks, encoded after the load."""
    made = trainer()
    monkeypatch.setattr(made, "update", lambda *_: (_ for _ in ()).throw(Stopped))
    with pytest.raises(Stopped):
        grpo(tmp_path, made)
    resumed, seen = trainer(), []
    update = resumed.update

    def watched(rollouts, iteration):
        seen.append(rollouts)
        return update(rollouts, iteration)

    monkeypatch.setattr(resumed, "update", watched)
    collected = resumed.collect

    def collect(pool, iteration):
        assert resumed._store is None or iteration > 0
        return collected(pool, iteration)

    monkeypatch.setattr(resumed, "collect", collect)
    monkeypatch.setattr(loop, "settled", lambda *_: len(seen) == 1)  # one iteration is enough
    grpo(tmp_path, resumed)
    rollouts = seen[0]
    assert rollouts.caches.rows == len(rollouts.looks.tokens) > 0
    some = np.arange(min(4, rollouts.caches.rows))
    fresh, _ = resumed.actor.encode(resumed.params, jax.tree.map(lambda x: x[some], rollouts.looks))
    np.testing.assert_allclose(rollouts.caches.take(some).k, np.asarray(fresh.k)[:, some], atol=1e-5)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    env = tiny.kitchen.make(tiny.TASK, cameras=(tiny.CAMERA,), image_size=tiny.PIXELS, horizon=tiny.HORIZON)
    episodes = (demos.run_episode(env, seed) for seed in range(3))
    return write_dataset(tmp_path_factory.mktemp("data") / "demos", episodes, {"made_by": "test"})


def sft(run_dir, dataset, config=SFT, report_every=1):
    with MetricsWriter(run_dir) as writer:
        return train_sft(
            fresh_policy(),
            dataset,
            config,
            SEED,
            tiny.one_device(),
            run_dir / "checkpoints" / "sft",
            writer,
            report_every=report_every,
        )


@pytest.mark.parametrize("stopped", [False, True])
def test_numbers_that_are_not_finite_are_never_saved(stopped, tmp_path, dataset, monkeypatch):
    """Also between reports, and when Ctrl-C comes before one."""
    step = SftTrainer.step

    def breaking(self, batch, number):
        if number == 2:
            batch = {**batch, "actions": np.full_like(batch["actions"], np.nan)}
            if stopped:
                os.kill(os.getpid(), signal.SIGINT)
        return step(self, batch, number)

    monkeypatch.setattr(SftTrainer, "step", breaking)
    config = dataclasses.replace(SFT, checkpoint_every=3 if stopped else 1)
    with pytest.raises(
        FloatingPointError, match="grad_norm nan and loss nan at step 3 are not finite; the checkpoints"
    ):
        sft(tmp_path, dataset, config, report_every=5)
    kept = {int(path.name) for path in (tmp_path / "checkpoints" / "sft").iterdir()}
    assert kept == (set() if stopped else {1, 2})


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
