"""SFT's loss on held-out episodes."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_policy as tiny
from flax import nnx

from envs.kitchen import demos
from z1_jax.agreement import dataset_world
from z1_jax.config.schema import SftConfig
from z1_jax.data.dataset import write_dataset
from z1_jax.data.loader import Loader
from z1_jax.errors import UserError
from z1_jax.metrics import MetricsWriter, read_records
from z1_jax.rl import flow
from z1_jax.sft import SftTrainer, train_sft
from z1_jax.validation import HELD_OUT, TRAINED, Split, sentence, split

TASKS = ("TurnOnSinkFaucet", "CloseDrawer")
SFT = SftConfig(steps=6, batch_size=4, flows=2, checkpoint_every=3, validation=0.25)


def collect(tasks, count):
    for task in tasks:
        env = tiny.kitchen.make(task, cameras=(tiny.CAMERA,), image_size=tiny.PIXELS, horizon=tiny.HORIZON)
        for seed in range(count):
            yield dataclasses.replace(demos.run_episode(env, seed), task=task)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Four episodes of each of two tasks."""
    return write_dataset(tmp_path_factory.mktemp("data") / "demos", collect(TASKS, 4), {"made_by": "test"})


def episodes_of(dataset, records):
    """Task and number of the episodes that records belong to, and whether they are whole."""
    found, whole = [], True
    for row in dataset.episodes:
        mine = np.isin(np.arange(row.first_record, row.first_record + row.records), records)
        whole &= mine.all() or not mine.any()
        found += [(row.task, row.episode)] * bool(mine.any())
    return found, whole


@pytest.mark.parametrize(("share", "each"), [(0.25, 1), (0.5, 2), (0.01, 1), (0.9, 3)])
def test_whole_episodes_of_each_task_are_held_out(share, each, dataset, rng):
    seed = int(rng.integers(1000))
    parts = split(dataset, share, seed)
    held, whole = episodes_of(dataset, parts.held_out)
    assert whole and [sum(task == name for task, _ in held) for name in TASKS] == [each, each]
    assert parts.episodes == len(held)
    assert sorted([*parts.trained, *parts.held_out]) == list(range(len(dataset)))
    again = split(dataset, share, seed)
    assert np.array_equal(again.held_out, parts.held_out)
    others = {tuple(split(dataset, share, seed + more).held_out) for more in range(30)}
    assert len(others) > 1


def test_data_without_a_second_episode_of_any_task_are_refused(tmp_path):
    one = write_dataset(tmp_path / "one", collect(TASKS[:1], 1), {"made_by": "test"})
    with pytest.raises(UserError, match="sft.validation: no task of .*one has two episodes.* set 0"):
        split(one, 0.5, 0)


@pytest.mark.parametrize("memory_bytes", [0, 1 << 30])
@pytest.mark.parametrize("sampling", ["proportional", "balanced"])
def test_held_out_records_are_in_no_batch(sampling, memory_bytes, dataset, rng):
    parts, seed = split(dataset, 0.5, 1), int(rng.integers(1000))
    how = {"sampling": sampling, "records": parts.trained, "memory_bytes": memory_bytes}
    loader = Loader(dataset, tiny.policy().processor, 5, seed, **how)
    drawn = np.concatenate([next(loader)["index"] for _ in range(2 * len(dataset))])
    assert set(drawn) == set(parts.trained)
    if sampling == "proportional":  # each once an epoch
        assert sorted(drawn[: len(parts.trained)]) == sorted(parts.trained)
    wanted = parts.held_out[:3]
    np.testing.assert_array_equal(loader.rows(wanted)["index"], wanted)
    whole = Loader(dataset, tiny.policy().processor, 5, seed, sampling=sampling)
    with pytest.raises(UserError, match="saved with records"):
        whole.set_state(loader.get_state())
    with pytest.raises(UserError, match="saved with records=None.*; use the same tasks, sft.validation and version"):
        loader.set_state(whole.get_state())


def test_the_losses_are_those_of_the_formula(dataset):
    """One record, one flow time after the other: the mean of (v(x_t, t) − (ε − a))², x_t = t ε + (1 − t) a."""
    policy = tiny.policy()
    trainer = SftTrainer(policy, dataclasses.replace(SFT, loss_dims="real"), 0, tiny.one_device())
    parts = split(dataset, 0.25, 3)
    loader = Loader(dataset, policy.processor, 4, 0, records=parts.trained)
    told = trainer.validation(loader, dataset, parts)(*trainer.state.acting)

    model = nnx.merge(policy.graphdef, policy.params)
    count = len(parts.held_out)
    assert count < len(parts.trained)
    compared = parts.trained[
        [number * len(parts.trained) // count for number in range(count)]
    ]  # as many, evenly spread
    by_record = {}
    for record in (*parts.held_out, *compared):
        batch = loader.rows(np.array([record] * 4))
        actions = batch["actions"][0]
        observation = policy.processor.observation([dataset[record]])
        cache, errors = model.encode_prefix(observation), []
        key = jax.random.fold_in(jax.random.key(0x5A11D), record)
        noises = np.asarray(jax.random.normal(jax.random.fold_in(key, 1), (SFT.flows, *actions.shape)))
        for t, noise in zip(np.asarray(flow.training_times(key, (SFT.flows,))), noises, strict=True):
            v = model.velocity(cache, jnp.asarray(t * noise + (1 - t) * actions)[None, None], jnp.full((1, 1), t))
            errors.append((np.asarray(v)[0, 0] - (noise - actions))[:, : policy.processor.env_action_dim] ** 2)
        by_record[record] = np.mean(errors)
    tasks = [row.task for row in dataset.episodes for _ in range(row.records)]
    for name, records in ((HELD_OUT, parts.held_out), (TRAINED, compared)):
        means = [np.mean([by_record[r] for r in records if tasks[r] == task]) for task in TASKS]
        np.testing.assert_allclose([told[f"tasks/{task}/{name}"] for task in TASKS], means, rtol=1e-5)
        np.testing.assert_allclose(told[name], np.mean(means), rtol=1e-5)


def test_it_looks_at_no_more_records_at_once_than_sft(dataset):
    """And each process at its own rows of them."""
    parts, losses = split(dataset, 0.25, 3), []
    for micro in (0, 2):
        trainer = SftTrainer(tiny.policy(), dataclasses.replace(SFT, micro_batch=micro), 0, tiny.one_device())
        loader = Loader(dataset, tiny.policy().processor, 4, 0, records=parts.trained)
        validate, looked = trainer.validation(loader, dataset, parts), []
        loader.rows = lambda records, rows=loader.rows, looked=looked: looked.append(len(records)) or rows(records)
        losses.append(validate(*trainer.state.acting))
        assert set(looked) == {micro or 4}
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    for index in range(2):
        loader = Loader(dataset, tiny.policy().processor, 4, 0, process_index=index, process_count=2)
        for records in (np.array([3, 1]), np.array([5, 2, 4, 0])):
            np.testing.assert_array_equal(loader.rows(records)["index"], np.split(records, 2)[index])


def test_both_losses_are_of_the_same_tasks(dataset):
    """Of a task with one episode none is held out: it tells nothing of what is known by heart."""
    first, second = dataset.episodes[4].span, dataset.episodes[5].span
    trainer = SftTrainer(tiny.policy(), SFT, 0, tiny.one_device())
    parts = Split(np.concatenate([dataset.episodes[0].span, first]), np.array(second), 1)
    told = trainer.validation(Loader(dataset, tiny.policy().processor, 4, 0), dataset, parts)(*trainer.state.acting)
    parts = dataclasses.replace(parts, trained=np.array(first))
    alone = trainer.validation(Loader(dataset, tiny.policy().processor, 4, 0), dataset, parts)
    assert told == alone(*trainer.state.acting)


def train(run_dir, dataset, config=SFT, report_every=2, tasks=()):
    how = {"report_every": report_every, "tasks": tasks}
    with MetricsWriter(run_dir) as writer:
        where = run_dir / "checkpoints"
        return train_sft(tiny.consumable(), dataset, config, 5, tiny.one_device(), where, writer, **how)


@pytest.mark.parametrize("validation", [0.0, 0.25])
def test_of_a_dataset_of_more_tasks_a_run_takes_its_own(validation, dataset, tmp_path, monkeypatch, capsys):
    """All of its records within an epoch, but those that are held out, and no others."""
    seen, step = [], SftTrainer.step

    def noted(self, batch, number):
        seen.extend(batch["index"].tolist())
        return step(self, batch, number)

    monkeypatch.setattr(SftTrainer, "step", noted)
    tasks = [row.task for row in dataset.episodes for _ in range(row.records)]
    own = [number for number, task in enumerate(tasks) if task == TASKS[1]]
    steps = 1 + len(own) // SFT.batch_size
    config = dataclasses.replace(SFT, validation=validation, steps=steps)
    train(tmp_path / "run", dataset, config, tasks=[("drawer/0", TASKS[1])])
    held = split(dataset, validation, 5, np.array(own)).held_out if validation else []
    assert set(seen) == set(own) - set(held) and bool(validation) == bool(set(held) & set(own))
    out = capsys.readouterr().out
    assert f"of the dataset's {len(dataset):,} records {len(own)} are of this run's tasks" in out
    assert (f"held out for validation: 1 of 4 episodes, {len(held)} of {len(own)} records" in out) == bool(validation)


def test_which_records_are_a_runs_own(dataset):
    first = dataset.episodes[4].first_record
    for names in (TASKS[1:], ("drawer/0", TASKS[1]), TASKS[::-1]):  # by its own name, where that is there
        np.testing.assert_array_equal(dataset.records_of([names]), np.arange(first, len(dataset)))
        assert [row.task for row in dataset.episodes_of([names])] == [TASKS[1]] * 4
        world = dataset_world(dataset, [names])  # what the policy then says that it was trained in
        assert world.tasks == (TASKS[1],) and set(world.instructions) == {r.instruction for r in dataset.episodes[4:]}
    assert dataset.records_of([["any", *TASKS]]) is None  # all of them
    both = [[task] for task in TASKS]
    assert dataset.records_of(both) is dataset.records_of([]) is None
    assert dataset.records_of([*both, ["PressButton"]]) is None and dataset.records_of([["PressButton"]]) is None


def test_a_dataset_of_more_tasks_that_knows_not_the_runs_is_told_of(dataset, tmp_path, capsys):
    train(tmp_path / "run", dataset, dataclasses.replace(SFT, steps=1, validation=0.0), tasks=[("PressButton", "x")])
    line = f"SFT takes all {len(dataset):,} records of the dataset's 2 tasks: none of these is called PressButton\n"
    assert line in capsys.readouterr().out


def test_a_run_tells_both_losses_at_each_checkpoint_and_goes_on(tmp_path, dataset, monkeypatch, capsys):
    whole = train(tmp_path / "whole", dataset)
    out = capsys.readouterr().out
    rows = read_records(tmp_path / "whole" / "metrics.jsonl")
    assert [(row["step"], HELD_OUT in row) for row in rows] == [(2, False), (3, True), (4, False), (6, True)]
    assert "held out for validation: 2 of 8 episodes, " in out
    assert all("loss" in row for row in rows) and "loss on held-out episodes: " in out
    assert "validation held out" in out  # a column
    step = SftTrainer.step

    def killed(self, batch, number):
        if number == 4:
            raise RuntimeError("killed")
        return step(self, batch, number)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(SftTrainer, "step", killed)
        train(tmp_path / "cut", dataset)
    again = train(tmp_path / "cut", dataset)
    assert read_records(tmp_path / "cut" / "metrics.jsonl") == rows
    for a, b in zip(jax.tree.leaves(again.params), jax.tree.leaves(whole.params), strict=True):
        np.testing.assert_array_equal(a, b)


def test_looking_moves_no_number(tmp_path, dataset):
    """How often it looks, that is, for another set of records is another training."""
    often = train(tmp_path / "often", dataset, dataclasses.replace(SFT, checkpoint_every=1))
    seldom = train(tmp_path / "seldom", dataset, dataclasses.replace(SFT, checkpoint_every=6))
    for a, b in zip(jax.tree.leaves(often.params), jax.tree.leaves(seldom.params), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_what_is_known_by_heart_is_told(dataset, tmp_path):
    """Trained on one record of each task again and again: their loss falls more than that of other episodes."""
    record = np.array([row.first_record for row in dataset.episodes])
    parts = Split(record[[0, 4]], record[[1, 2, 3, 5, 6, 7]])
    optim = dataclasses.replace(SFT.optim, lr=5e-3, warmup_steps=10)
    config = dataclasses.replace(SFT, steps=300, flows=16, loss_dims="real", optim=optim)
    trainer = SftTrainer(tiny.consumable(), config, 0, tiny.one_device())
    loader = Loader(dataset, tiny.policy().processor, 4, 0, records=parts.trained)
    validate = trainer.validation(loader, dataset, parts)
    before = validate(*trainer.state.acting)
    for number in range(config.steps):
        trainer.step(next(loader), number)
    after = validate(*trainer.state.acting)
    assert after[TRAINED] < 0.25 * before[TRAINED] and after[HELD_OUT] > 1.5 * after[TRAINED], after
    assert "known by heart, so more demonstrations (demos.episodes) help" in sentence(after, collected=True)
    assert "more demonstrations help" in sentence(after, collected=False)
    assert "by heart" not in sentence({HELD_OUT: 0.1, TRAINED: 0.09}, collected=True)
    assert json.loads(json.dumps(after)) == after
