"""A policy survives its checkpoint bit for bit, with its tokenizer and statistics."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny_policy as tiny

from z1_jax import sharding
from z1_jax.checkpoint import CheckpointError, Checkpoints, Keep
from z1_jax.config.schema import Config
from z1_jax.initial_policy import newest_policy, with_pinned_init
from z1_jax.policy import find_policy, fresh_policy, load_policy, named, unnamed


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A run directory with one policy of each stage."""
    root = tmp_path_factory.mktemp("run")
    for stage, seed, step in (("sft", 0, 30), ("grpo", 1, 2)):
        checkpoints = Checkpoints(root / "checkpoints" / stage)
        policy = tiny.policy(seed)
        checkpoints.save(step, policy.parts(), policy.document())
        checkpoints.close()
    return root


def test_round_trip_is_bit_identical(run_dir):
    directory, step = find_policy(run_dir / "checkpoints" / "sft")
    loaded, policy = load_policy(Checkpoints(directory), step, tiny.one_device()), tiny.policy(0)
    for (path, a), (_, b) in zip(
        jax.tree_util.tree_leaves_with_path(loaded.params),
        jax.tree_util.tree_leaves_with_path(policy.params),
        strict=True,
    ):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(path))
    assert jax.tree.structure(loaded.params) == jax.tree.structure(policy.params)
    assert (loaded.config, loaded.executed, loaded.denoising_steps) == (policy.config, 8, 4)
    assert loaded.document() == policy.document()
    a, b = loaded.processor, policy.processor
    assert a.tokenizer.model_bytes == b.tokenizer.model_bytes and a.tokenizer.prompt_length == 48
    for key in ("state", "actions"):
        assert a.stats[key].rule == b.stats[key].rule
        for name in ("mean", "std", "q01", "q99"):
            x, y = getattr(a.stats[key], name), getattr(b.stats[key], name)
            np.testing.assert_array_equal(x, y)
            assert x.dtype == y.dtype
    env = tiny.make_env()
    for x, y in zip(
        jax.tree.leaves(a.observation([env.observe()])), jax.tree.leaves(b.observation([env.observe()])), strict=True
    ):
        np.testing.assert_array_equal(x, y)
    actions = np.random.default_rng(0).normal(size=(8, 16))
    np.testing.assert_array_equal(a.env_actions(actions), b.env_actions(actions))


def test_the_best_policy_is_found_by_path(tmp_path):
    policy = tiny.policy(0)
    for stage in ("sft", "grpo"):
        checkpoints = Checkpoints(tmp_path / "checkpoints" / stage, Keep(best=True))
        for step, success in ((1, None), (2, 0.9), (3, 0.5), (4, 0.6)):
            checkpoints.save(step, policy.parts(), policy.document(), success=success if stage == "grpo" else None)
        checkpoints.close()
    grpo = tmp_path / "checkpoints" / "grpo"
    assert find_policy(f"{tmp_path}@best") == find_policy(f"{grpo}@best") == find_policy(grpo / "2") == (grpo, 2)
    assert find_policy(tmp_path) == (grpo, 4)
    assert newest_policy(f"{tmp_path}@best") == str(grpo / "2")  # what a command pins, should the run go on
    config = Config(run_dir=str(tmp_path / "new"), init=f"{tmp_path}@best")
    assert with_pinned_init(config).init == str(grpo / "2")
    with pytest.raises(CheckpointError, match="no checkpoint in .*sft has been rated yet"):
        find_policy(f"{tmp_path / 'checkpoints' / 'sft'}@best")
    with pytest.raises(CheckpointError, match="no policy of RL at .*; @best is for a run directory"):
        find_policy(f"{tmp_path / 'nowhere'}@best")


def test_statistics_of_any_value_survive(tmp_path, rng):
    """JSON keeps every bit of a float64."""
    policy = tiny.policy(0)
    stats = {
        key: dataclasses.replace(value, mean=rng.normal(size=value.dim) / 3, std=rng.random(value.dim) + 1e-17)
        for key, value in policy.processor.stats.items()
    }
    policy = dataclasses.replace(policy, processor=dataclasses.replace(policy.processor, stats=stats))
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, policy.parts(), policy.document())
    loaded = load_policy(checkpoints, 1, tiny.one_device())
    for key, value in stats.items():
        np.testing.assert_array_equal(loaded.processor.stats[key].mean, value.mean)
        np.testing.assert_array_equal(loaded.processor.stats[key].std, value.std)


def test_a_policy_loads_onto_a_mesh(run_dir):
    mesh = sharding.make_mesh(2, 2, 2)
    loaded = load_policy(Checkpoints(run_dir / "checkpoints" / "sft"), 30, mesh)
    leaves = jax.tree.leaves(loaded.params)
    assert all(len(leaf.sharding.device_set) == 8 for leaf in leaves)
    assert any(leaf.addressable_shards[0].data.size < leaf.size for leaf in leaves)
    for a, b in zip(leaves, jax.tree.leaves(tiny.policy(0).params), strict=True):
        np.testing.assert_array_equal(a, b)


def test_find_policy_takes_a_run_a_stage_or_a_step(run_dir):
    assert find_policy(run_dir) == (run_dir / "checkpoints" / "grpo", 2)  # the later stage
    assert find_policy(str(run_dir / "checkpoints" / "sft")) == (run_dir / "checkpoints" / "sft", 30)
    assert find_policy(run_dir / "checkpoints" / "sft" / "30") == (run_dir / "checkpoints" / "sft", 30)


@pytest.mark.parametrize("path", ["nothing", ".", "checkpoints/other"])
def test_no_policy_is_one_line(tmp_path, path):
    with pytest.raises(CheckpointError, match="no policy at .*; expected a run directory") as error:
        find_policy(tmp_path / path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "change",
    [
        lambda d: {},
        lambda d: {**d, "architecture": {"width": 3}},
        lambda d: {**d, "architecture": {**d["architecture"], "colour": 1}},
        lambda d: {k: v for k, v in d.items() if k != "norm_stats"},
        lambda d: {**d, "norm_stats": {"state": d["norm_stats"]["state"]}},
        lambda d: {k: v for k, v in d.items() if k != "cameras"},
        lambda d: {**d, "tokenizer_sha256": "0" * 64},
        lambda d: {**d, "architecture": {**d["architecture"], "horizon": 9, "action_dim": 18}},
    ],
)
def test_a_checkpoint_that_is_no_policy_is_one_line(tmp_path, change):
    policy = tiny.policy(0)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, policy.parts(), change(policy.document()))
    with pytest.raises(CheckpointError) as error:
        load_policy(checkpoints, 1, tiny.one_device())
    assert "\n" not in str(error.value)


def test_names_are_unique_and_invert(rng):
    params = tiny.policy(0).params
    leaves = named(params)
    assert len(leaves) == len(jax.tree.leaves(params))
    assert all(set(name) <= set("abcdefghijklmnopqrstuvwxyz_0123456789.") for name in leaves)
    back = unnamed(params, dict(reversed(leaves.items())))
    assert jax.tree.structure(back) == jax.tree.structure(params)
    assert all(a is b for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(params), strict=True))


def test_split_scopes_and_back():
    policy = tiny.policy(0)
    for scope, parts in (("expert", {"expert"}), ("everything", {"expert", "vision", "language"})):
        _, trainable, frozen = policy.split(scope)
        assert set(trainable) == parts and set(frozen) == {"expert", "vision", "language"} - parts
        assert named(policy.with_params(trainable, frozen).params).keys() == named(policy.params).keys()


def test_fresh_policies_follow_their_seed():
    def fresh(seed):
        return fresh_policy(tiny.CONFIG, tiny.processor(), seed, tiny.one_device(), executed=8, denoising_steps=4)

    a, b, c = (jax.tree.leaves(fresh(seed).params) for seed in (5, 5, 6))
    assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
    assert sum(not np.array_equal(x, y) for x, y in zip(a, c, strict=True)) > len(a) / 3
