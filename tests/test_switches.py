"""Every key of the RL sections moves a number, or is named here as one that must not; the documented table is true."""

import copy
import dataclasses
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_policy as tiny
from flax import nnx
from tiny_grpo import CONFIG, compiled, trainer

from z1_jax.config import checks
from z1_jax.config.schema import Config, flat
from z1_jax.optim import schedule
from z1_jax.policy import named
from z1_jax.rl import diagnostics, loss, selective
from z1_jax.rl.actor import Actor
from z1_jax.rl.parts import PartOptimizer
from z1_jax.rl.trainer import GrpoTrainer
from z1_jax.rl.update import Updater, mini_batches

SECTIONS = ("group", "flow", "reward", "update", "train", "selective")
ROOT = pathlib.Path(__file__).parent.parent


def changed(config: Config, **values) -> Config:
    """`config` with other leaves; `a__b` for the key a.b."""
    for key, value in values.items():
        first, _, rest = key.partition("__")
        if rest:
            value = changed(getattr(config, first), **{rest: value})
        config = dataclasses.replace(config, **{first: value})
    return config


# ── what a config makes of one and the same thing: each returns arrays


def collected(config: Config):
    """The chains of two iterations: in one, every episode may end before the first branch."""
    made = trainer(config)
    if config.flow != CONFIG.flow:  # what is drawn on the host needs no compilation
        made.actor = copy.copy(compiled().actor)
        made.actor._config = config.flow
    return np.concatenate([made.collect(tiny.pool(16), iteration).nodes.x for iteration in (0, 1)])


def acted(config: Config):
    """Density of chains from an actor of its own."""
    made = GrpoTrainer(tiny.policy(), config, tiny.one_device(), 16)
    made.actor._sizes = made.actor._sizes[:1]
    looks = jax.tree.map(lambda x: x[:4], rollouts().looks)
    cache, _ = made.actor.encode(made.params, looks)
    chain = made.actor.sample(made.params, cache, np.zeros((4, 1, 1), int), (0,), True)
    return np.concatenate([chain.logp.ravel(), [chain.x.shape[2]]])


_ROLLOUTS = []


def rollouts():
    """Rollouts with groups of every kind: mixed, all succeed, all fail, and one success of four."""
    if not _ROLLOUTS:
        out = trainer().collect(tiny.pool(16), 0)
        success = np.array([[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0], [0, 0, 0, 1]], bool)
        chunks = np.array([[1, 2, 3, 3], [1, 2, 2, 3], [3, 3, 3, 3], [3, 3, 3, 2]])
        _ROLLOUTS.append(dataclasses.replace(out, success=success, chunks=chunks))
    return _ROLLOUTS[0]


def credited(config: Config):
    credit = trainer(config).credit(rollouts(), np.random.default_rng(0))
    return np.concatenate([np.ravel(getattr(credit, f.name)).astype(float) for f in dataclasses.fields(credit)])


def rates(config: Config):
    optim, last = config.update.optim, config.train.iterations
    return np.array([float(schedule(optim, last)(i)) for i in range(20)])


def optimised(config: Config):
    optimizer = PartOptimizer(config.update.optim, config.update.vlm_lr_factor)
    rng = np.random.default_rng(0)
    params = {part: jnp.asarray(rng.normal(size=3), jnp.float32) for part in ("vision", "expert")}
    state, total = optimizer.init(params), []
    for _ in range(3):
        grads = {part: jnp.asarray(rng.normal(size=3), jnp.float32) for part in params}
        updates, state = optimizer.update(grads, state, params)
        total += [np.asarray(x) for x in jax.tree.leaves(updates)]
    return np.concatenate(total)


def lost(config: Config):
    """The loss of a batch whose ratios lie on both sides of every bound, and of a reference apart from the policy."""
    made, out = trainer(config), rollouts()
    update = config.update
    node_loss = loss.grpo(update.clip_low, update.clip_high, update.ratio_max)
    updater = Updater(made.graphdef, None, node_loss, config.flow, update, made.actor.counted, tiny.one_device())
    rng = np.random.default_rng(0)
    n = len(out.nodes.size)
    nodes = dataclasses.replace(out.nodes, logp=(out.nodes.logp - rng.uniform(-1, 1.5, n)).astype("f"))
    signs = rng.normal(size=n).astype("f")
    inputs = {"positive": np.maximum(signs, 0), "negative": np.minimum(signs, 0)}
    batches = mini_batches(nodes, inputs, np.ones(n, bool), out.caches, n, np.random.default_rng(1))
    ((batch, normaliser),) = batches
    reference = jax.tree.map(lambda x: 1.1 * x, made.trainable)

    def value(trainable, frozen, reference, *rest):
        model, other = (nnx.merge(made.graphdef, weights, frozen) for weights in (trainable, reference))
        return updater._loss(model, other, *rest)[0]

    return np.asarray(jax.jit(value)(made.trainable, made.frozen, reference, batch, normaliser, 0.5))


def dealt(config: Config):
    """Sizes of an iteration's batches."""
    made = trainer(config)
    out = rollouts()
    credit = made.credit(out, np.random.default_rng(0))
    return np.array([len(batch.valid) for batch, _ in made._batches(out, credit, np.random.default_rng(0))])


def decided(config: Config):
    probe, c = [0.5, 0.55, 0.5, 0.62, 0.58, 0.66], config.selective
    decision = selective.decide(probe[: c.iterations], c.confidence, c.enough, c.then)
    return np.array([len(probe[: c.iterations]), *(float(s == decision.scope) for s in ("expert", "joint"))])


def gated(config: Config):
    stats = {"ratio_error": 0.05}
    try:
        diagnostics.check_step(stats, True, trainer(config)._gate)
    except diagnostics.RatioError:
        return np.array([1.0])
    return np.array([0.0])


def trained(config: Config):
    """Which parameters an iteration trains."""
    made = GrpoTrainer(tiny.policy(), config, tiny.one_device(), 16)
    return np.array([len(named(made.trainable)), float(config.train.scope == "auto")])


def spread(config: Config):
    """Of which tasks the groups are, after one task was learned, one half and one not at all."""
    made = trainer(changed(config, task="", tasks=("A", "B", "C")))
    success = np.array([[True, True], [True, False], [False, False]])
    told = [made.tasks.of_groups(0, 4)]
    for iteration in range(1, 12):
        made.tasks.observe(["A", "B", "C"], success)
        told.append(made.tasks.of_groups(iteration, 4))
    return np.array([[ord(task) for task in tasks] for tasks in told])


COSINE = {"update__optim__schedule": "cosine"}
PENALTY = {"reward__kind": "penalty"}
AUTO = {"train__scope": "auto"}
# key: (function, another value, what must be set for the key to have an effect)
EFFECTS = {
    "group.count": (collected, 3, {}),
    "group.size": (collected, 2, {}),
    "group.branching": (collected, "prefix", {}),
    "group.prefix_chunks": (collected, 1, {}),
    "group.prefix_chunks_end": (collected, 0, {}),
    "group.prefix_schedule": (collected, "constant", {"group__prefix_chunks_end": 0}),
    "group.shuffle_advantages": (credited, True, {}),
    "group.spread": (spread, "adaptive", {}),
    "group.floor": (spread, 1.0, {"group__spread": "adaptive"}),
    "group.oversample": (collected, 2.0, {"reward__keep_low": 0.95, "reward__keep_high": 0.96}),  # none of four is kept
    "flow.steps": (acted, 3, {}),
    "flow.noise_level": (collected, 0.9, {}),
    "flow.noise_level_end": (collected, 0.9, {"flow__noise_schedule": "linear"}),
    "flow.noise_schedule": (collected, "cosine", {"flow__noise_level_end": 0.9, "train__iterations": 4}),
    "flow.sde_steps": (collected, "one", {}),
    "flow.last_step": (collected, "ode", {}),
    "flow.logprob_reduce": (acted, "mean", {}),
    "flow.logprob_coords": (None, "horizon", {}),  # see below: the tiny policy executes its whole horizon
    "reward.kind": (credited, "sparse", {}),
    "reward.discount": (credited, 0.9, {}),
    "reward.penalty": (credited, 0.1, PENALTY),
    "reward.std": (credited, "sample", {}),
    "reward.filter_on": (credited, "success", {"reward__keep_high": 0.999}),
    "reward.keep_low": (credited, 0.3, {}),
    "reward.keep_high": (credited, 0.6, {}),
    "update.epochs": (dealt, 3, {}),
    "update.batch_size": (dealt, 4, {}),
    "update.clip_low": (lost, 0.4, {}),
    "update.clip_high": (lost, 0.4, {}),
    "update.ratio_max": (lost, 1.5, {}),
    "update.kl_coef": (lost, 0.5, {}),
    "update.ratio_gate": (gated, 0.1, {}),
    "update.vlm_lr_factor": (optimised, 0.1, {}),
    "update.optim.lr": (optimised, 2e-3, {}),
    "update.optim.lr_end": (rates, 1e-4, COSINE),
    "update.optim.warmup_steps": (rates, 5, {}),
    "update.optim.schedule": (rates, "cosine", {}),
    "update.optim.b1": (optimised, 0.5, {}),
    "update.optim.b2": (optimised, 0.5, {}),
    "update.optim.eps": (optimised, 0.5, {}),
    "update.optim.weight_decay": (optimised, 0.9, {}),
    "update.optim.clip_norm": (optimised, 0.1, {"update__optim__eps": 0.5}),
    "train.iterations": (rates, 50, COSINE),
    "train.scope": (trained, "joint", {}),
    "selective.iterations": (decided, 4, AUTO),
    "selective.confidence": (decided, 0.9999, AUTO),
    "selective.enough": (decided, 0.6, {**AUTO, "selective__confidence": 0.9999}),
}
# Keys that change when, where or how long, and no number of an iteration; each is tested where it acts.
ELSEWHERE = {
    "update.micro_batch": ("test_update.py", "test_micro_batches_change_nothing"),
    "update.prefix_cache": ("test_trainer.py", "test_caches_on_the_device_change_no_bit"),
    "train.checkpoint_every": ("test_config.py", "test_free_keys_may_change_and_are_told"),
    "train.keep_last": ("test_loop.py", "test_the_best_by_training_success_is_kept_and_told"),
    "train.keep_every": ("test_checkpoint.py", "test_which_checkpoints_are_kept"),
    "train.keep_best": ("test_loop.py", "test_the_best_by_training_success_is_kept_and_told"),
    "train.stop_success": ("test_loop.py", "test_early_stopping_survives_a_resume"),
    "train.stop_window": ("test_loop.py", "test_early_stopping_survives_a_resume"),
    "flow.temperature": ("test_initial_policy.py", "test_the_temperature_is_the_policys_own_or_the_configs"),
    "selective.then": ("test_selective.py", "test_reasons_are_one_line_with_the_numbers"),
}
SLOW = (acted, lost, trained)  # compile functions of their own


def leaves() -> list[str]:
    return [key for key in flat(Config()) if key.partition(".")[0] in SECTIONS]


def test_no_key_is_forgotten():
    assert set(EFFECTS) | set(ELSEWHERE) == set(leaves()) and not set(EFFECTS) & set(ELSEWHERE)
    for key, (file, name) in ELSEWHERE.items():
        assert f"def {name}(" in (ROOT / "tests" / file).read_text(), f"{file} does not test {key}"


def _move(key: str) -> None:
    function, value, needs = EFFECTS[key]
    base = changed(CONFIG, **needs)
    before, after = function(base), function(changed(base, **{key.replace(".", "__"): value}))
    assert np.isfinite(before).all()
    assert before.shape != after.shape or not np.array_equal(before, after), f"{key} = {value} changes nothing"
    if key == "update.epochs":
        assert len(after) * 2 == len(before) * 3


@pytest.mark.parametrize("key", [k for k, (f, _, _) in EFFECTS.items() if f not in SLOW and f is not None])
def test_a_key_moves_a_number(key):
    _move(key)


@pytest.mark.slow
@pytest.mark.parametrize("key", [k for k, (f, _, _) in EFFECTS.items() if f in SLOW])
def test_a_compiled_key_moves_a_number(key):
    _move(key)


def test_counted_coordinates_reach_the_density():
    policy = dataclasses.replace(tiny.policy(), executed=5)
    counts = []
    for coords in ("executed", "horizon"):
        made = GrpoTrainer(policy, changed(CONFIG, flow__logprob_coords=coords), tiny.one_device(), 16)
        assert isinstance(made.actor, Actor) and made._updater._counted is made.actor.counted
        counts.append(int(made.actor.counted.sum()))
    assert counts[1] * 5 == counts[0] * 8


def test_the_other_choices_of_a_switch_differ_too():
    for key, values in {
        "reward__kind": ("decay", "penalty", "sparse"),
        "reward__std": ("population", "sample", "none"),
    }.items():
        outcomes = [credited(changed(CONFIG, **{key: value})) for value in values]
        assert all(not np.array_equal(a, b) for i, a in enumerate(outcomes) for b in outcomes[:i])


@pytest.mark.parametrize("rule", checks._INERT, ids=lambda rule: rule[0])
def test_what_is_refused_as_without_effect_has_none(rule):
    """The rule is true: with the deciding key at that value, another value of the first changes nothing."""
    key, by, without = rule
    if key.startswith("selective.") or key == "update.vlm_lr_factor":
        return  # the scope decides: without a probe, or without VLM parameters, nothing reads them
    if key == "sft.optim.muon_rms":
        return  # no switch of the RL: see test_optim
    function, value, needs = EFFECTS[key]
    for choice in without:
        extra = {"group__prefix_chunks": 0, "group__prefix_chunks_end": 0} if choice == "none" else {}
        base = changed(CONFIG, **{**needs, **extra, by.replace(".", "__"): choice})
        before, after = function(base), function(changed(base, **{key.replace(".", "__"): value}))
        np.testing.assert_array_equal(before, after, err_msg=f"{key} has an effect with {by}={choice}")


def test_the_table_names_every_key_with_its_default():
    text = (ROOT / "docs" / "switches.md").read_text().partition("## What each iteration logs")[0]
    values, rows = flat(Config()), {}
    for row in re.findall(r"^\| (`.*?) \| (.*?) \|", text, flags=re.M):
        keys = re.findall(r"`([^`]+)`", row[0])
        prefix = keys[0].rpartition(".")[0]
        shown = [cell.strip() for cell in row[1].split(",")]
        for key, default in zip(keys, shown * len(keys) if len(shown) == 1 else shown, strict=False):
            rows[prefix + key if key.startswith(".") else key] = default
    undocumented = set(leaves()) - set(rows) - {"train.checkpoint_every"}
    assert not undocumented and set(rows) <= set(values)
    for key, shown in rows.items():
        default = values[key]
        wanted = str(default).lower() if isinstance(default, bool) else default
        assert (float(shown) == wanted) if isinstance(wanted, int | float) else (shown == wanted), f"{key}: {shown}"
