"""One iteration of GRPO: credit, placement of the prefix caches, compilations, and the change of scope."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest
import tiny_policy as tiny
from tiny_grpo import CONFIG, compiled, trainer

from z1_jax.config.schema import ConfigError, FlowConfig, RewardConfig, SelectiveConfig, TrainConfig
from z1_jax.errors import UserError
from z1_jax.policy import named
from z1_jax.rl import trainer as grpo_trainer
from z1_jax.rl.diagnostics import RatioError
from z1_jax.rl.prefix_cache import DevicePrefixStore, PrefixStore
from z1_jax.rl.trainer import GrpoTrainer, training_seeds
from z1_jax.rl.update import Launched


def with_update(**changes):
    return dataclasses.replace(CONFIG, update=dataclasses.replace(CONFIG.update, **changes))


STATS = ("loss", "ratio_error", "ratio_sum", "ratio_max", "clipped", "clipped_positive", "clipped_negative", "kl_sum")


class Recorder:
    """An updater that keeps what it is given and changes nothing."""

    def __init__(self, **stats):
        self.batches, self.options, self.traces = [], [], 0
        self.stats = {**dict.fromkeys((*STATS, "grad_norm", "update_to_weight"), 0.0), "nodes": 1.0, **stats}

    def place(self, batch):
        return batch

    def launch(self, trainable, opt_state, frozen, batch, normaliser, **options):
        self.batches.append((batch, normaliser))
        self.options.append(options)
        return trainable, opt_state, Launched(self.stats, batch.logp_old)


def recorded(monkeypatch, config, rollouts, **stats):
    """The advantages and batches of one update, and its diagnostics."""
    made, seen = trainer(config), []
    made._updater = Recorder(**stats)
    real = grpo_trainer.tree.signed_advantage_sums
    monkeypatch.setattr(grpo_trainer.tree, "signed_advantage_sums", lambda a, *rest: seen.append(a) or real(a, *rest))
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
    nodes = dataclasses.replace(rollouts.nodes, trainable=np.arange(len(rollouts.nodes.size)) % 3 > 0)
    varied = dataclasses.replace(rollouts, success=success, chunks=np.ones((4, 4), int), nodes=nodes)
    config = dataclasses.replace(CONFIG, reward=RewardConfig())  # 0.1 … 0.99: drops groups 0 and 2
    _, batches, result = recorded(monkeypatch, config, varied)
    assert (result["groups/kept"], result["groups/all_success"], result["groups/all_fail"]) == (2, 1, 1)
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


def iteration(made: GrpoTrainer, number: int = 0):
    """Metrics without rounding-free counts, and the parameters, after one whole iteration."""
    out = made.collect(tiny.pool(16), number)
    return out, made.update(out, number), {name: np.asarray(x) for name, x in named(made.trainable).items()}


@pytest.fixture(scope="module")
def hosted():
    made = trainer(with_update(prefix_cache="host"))
    result = iteration(made)
    assert made.placement == "host" and isinstance(result[0].caches, PrefixStore)
    return result


def assert_same_iteration(a, b, exact: bool):
    (rollouts, stats, params), (others, other, moved) = a, b
    np.testing.assert_array_equal(rollouts.nodes.x, others.nodes.x)
    if exact:
        assert stats == other
    numbers = {name: value for name, value in other.items() if not isinstance(value, str)}
    # A ratio is the exponential of what is left of two sums of hundreds; the loss sums terms of both signs.
    assert {name: stats[name] for name in numbers} == pytest.approx(numbers, rel=2e-4, abs=1e-4)
    change = np.sqrt(sum(np.sum((params[name] - moved[name]) ** 2) for name in params))
    # A thousandth of what the updates move: AdamW's first steps follow the sign of gradients that are nearly zero.
    assert change <= (0.0 if exact else 1e-5) * np.sqrt(sum(np.sum(x**2) for x in params.values()))


def test_caches_on_the_device_change_no_bit(hosted):
    made = trainer(with_update(prefix_cache="device"))
    result = iteration(made)
    assert made.placement == "device" and isinstance(result[0].caches, DevicePrefixStore)
    assert_same_iteration(hosted, result, exact=True)
    again = made._store.traces.copy()
    made.update(made.collect(tiny.pool(16), 1), 1)  # another number of observations, of batches, of kept groups
    assert made._store.traces["take"] == again["take"] == 1


def test_recomputing_changes_no_number(hosted):
    made = GrpoTrainer(tiny.policy(), with_update(prefix_cache="recompute"), tiny.one_device(), 16)
    made.actor = compiled().actor
    result = iteration(made)
    assert made.placement == "recompute" and result[0].caches is None
    assert_same_iteration(hosted, result, exact=False)


def test_auto_places_the_caches_by_memory(monkeypatch, capsys):
    for free, expected in (((10**12, 10**12), "device"), ((10, 10**12), "host"), ((10, 10), "recompute")):
        monkeypatch.setattr(grpo_trainer, "free_device_bytes", lambda mesh, free=free: free[0])
        monkeypatch.setattr(grpo_trainer, "free_host_bytes", lambda free=free: free[1])
        made = trainer()
        made._place_caches(tiny.HORIZON)
        assert made.placement == expected and f"prefix cache: {expected}" in capsys.readouterr().out


@pytest.mark.parametrize("placement", ["device", "host"])
def test_a_cache_is_refused_where_the_vlm_is_trained(placement):
    """Also past the config's own check: what counts is which parameters are trained."""
    config = dataclasses.replace(with_update(prefix_cache=placement), train=TrainConfig(scope="joint"))
    with pytest.raises(ConfigError, match="stale after the first update") as error:
        GrpoTrainer(tiny.policy(), config, tiny.one_device(), 16)
    assert "\n" not in str(error.value)


def test_caches_of_other_rollouts_are_never_trained_on():
    made = trainer()
    first = made.collect(tiny.pool(16), 0)
    made._store.clear()
    with pytest.raises(ValueError, match="those of other rollouts"):
        made.update(first, 0)


def test_a_prefix_beyond_the_episode_is_refused():
    group = dataclasses.replace(CONFIG.group, prefix_chunks=3)
    with pytest.raises(ConfigError, match="got 3, but an episode of 24 steps has 3 chunks of 8: expected at most 2"):
        trainer(dataclasses.replace(CONFIG, group=group)).collect(tiny.pool(16), 0)


class Compilations:
    """Counts what XLA compiles or fetches compiled, whoever asked for it."""

    def __enter__(self):
        self.events = []
        jax.monitoring.register_event_duration_secs_listener(self._listen)
        return self

    def _listen(self, name, seconds, fun_name="", **_):
        if name == "/jax/core/compile/backend_compile_duration":
            self.events.append(fun_name)

    def __exit__(self, *_):
        jax.monitoring.unregister_event_duration_listener(self._listen)


@pytest.mark.parametrize("branching", ["none", "prefix", "tree"])
def test_nothing_is_compiled_between_iterations(branching):
    """Iterations with other numbers of kept groups, batches, looks and living episodes: the same compiled functions."""
    jax.clear_caches()  # full of other tests' functions, they would forget one of this test's
    prefix = 0 if branching == "none" else 1
    group = dataclasses.replace(CONFIG.group, branching=branching, prefix_chunks=prefix, prefix_chunks_end=prefix)
    made = trainer(dataclasses.replace(CONFIG, group=group, reward=RewardConfig()))

    def kept(groups, iteration):
        """An iteration with one success in each of the first `groups`, as far as the filter knows."""
        out = made.collect(tiny.pool(16), iteration)
        mixed = (np.arange(4)[:, None] < groups) & (np.arange(4) == 1)
        return made.update(dataclasses.replace(out, success=mixed), iteration)["groups/kept"]

    for iteration in itertools.count():  # all of a group's episodes may end before they part: nothing is updated then
        assert kept(4, iteration) == 4
        if made.traces["update"]:
            break
    known = made.traces
    with Compilations() as compilations:
        assert [kept(groups, 10 + groups) for groups in (1, 2, 3, 4, 0)] == [1, 2, 3, 4, 0]
    new = {name: made.traces[name] - known[name] for name in known}
    # A batch size that an earlier iteration had no use for may come up; each is compiled once, and nothing else is.
    assert new["update"] == 0 and new["encode"] + new["sample"] == len(compilations.events), compilations.events
    shapes = len(made.actor._sizes) * 2
    assert new["encode"] <= len(made.actor._sizes) and new["sample"] <= shapes


def test_a_prefix_schedule_compiles_each_shape_once():
    """P = 2, 1, 0, and back: clusters that part in two, in four, and all at once; the second time nothing is new."""
    group = dataclasses.replace(CONFIG.group, prefix_chunks=2, prefix_chunks_end=0)
    made = trainer(dataclasses.replace(CONFIG, group=group))
    assert [grpo_trainer.group_plan(made.config, i).points for i in range(3)] == [(1, 2), (0, 1), (0, 0)]
    for number in range(3):
        made.update(made.collect(tiny.pool(16), number), number)
    known = made.traces
    with Compilations() as compilations:
        for number in range(3):
            made.update(made.collect(tiny.pool(16), number), number)
    # Other episodes may bring a batch size that the first round had no use for; nothing is compiled beside it.
    assert len(compilations.events) == sum(made.traces.values()) - sum(known.values())


def test_noise_schedule_reaches_sampler_and_update():
    """An iteration at the end's noise level, without a new compilation: the ratios are 1, and the chains wider."""
    flow = FlowConfig(noise_level=0.5, noise_level_end=1.0, noise_schedule="linear")
    made = trainer(dataclasses.replace(CONFIG, flow=flow))
    assert [made.noise_level(i) for i in range(3)] == [0.5, 0.75, 1.0]
    out = made.collect(tiny.pool(16), 2)
    stats = made.update(out, 2)
    assert stats["ratio/first_update_max_error"] < 1e-3 and stats["sampler/noise_level"] == 1.0
    plain = trainer().collect(tiny.pool(16), 2)
    first = (out.nodes.chunk == 0, plain.nodes.chunk == 0)
    wide, narrow = (np.diff(o.nodes.x[rows], axis=1).std() for o, rows in zip((out, plain), first, strict=True))
    assert wide > 1.3 * narrow
    counted, steps = int(made.actor.counted.sum()), 4
    assert stats["sampler/entropy"] - made.update(made.collect(tiny.pool(16), 0), 0)["sampler/entropy"] == (
        pytest.approx(counted * steps * np.log(2.0), rel=1e-5)
    )


# ── changing the scope


SELECTIVE = dataclasses.replace(
    CONFIG,
    train=TrainConfig(iterations=5, scope="auto", checkpoint_every=1),
    selective=SelectiveConfig(iterations=3, confidence=0.9999, enough=1.01),
)


def test_entering_joint_keeps_the_experts_moments_and_starts_the_rest_afresh():
    made = trainer(SELECTIVE)
    made.update(made.collect(tiny.pool(16), 0), 0)
    trained = {name: np.asarray(x) for name, x in named(made.trainable).items()}
    moments = {name: np.asarray(x) for name, x in named(made.opt_state).items()}
    assert set(made.opt_state) == {"expert"} and any(x.any() for x in moments.values())
    made.enter("joint")
    assert made.scope == "joint" and made.placement == "recompute"
    after = {name: np.asarray(x) for name, x in named(made.opt_state).items()}
    for name, value in after.items():
        if name.startswith("expert."):
            np.testing.assert_array_equal(value, moments[name])
        else:
            assert not value.any(), name
    assert {name.partition(".")[0] for name in after} == {"vision", "language", "expert"}
    start = named(tiny.policy().params)
    for name, value in named(made.trainable).items():
        np.testing.assert_array_equal(value, trained.get(name, start[name]))


def test_a_scope_that_was_left_is_decided_once(monkeypatch):
    made = trainer(SELECTIVE)
    enter, entered = made.enter, []

    def watched(scope):
        entered.append(scope)
        enter(scope)

    monkeypatch.setattr(made, "enter", watched)
    assert made.observe(0.3) is None and made.observe(0.5) is None and entered == []
    decision = made.observe(0.1)
    assert decision.scope == "joint" and entered == ["joint"] and decision.trend.slope == pytest.approx(-0.1)
    assert all(made.observe(0.0) is None for _ in range(6)) and entered == ["joint"]
    other = trainer(SELECTIVE)
    other.resume(made.progress())
    assert other.scope == "joint" and other.decision == decision
    assert all(other.observe(0.0) is None for _ in range(6))


def test_a_checkpoint_from_before_the_scope_was_left_is_for_the_next_start():
    made = trainer(SELECTIVE)
    early = made.progress()
    made.enter("joint")
    with pytest.raises(UserError, match="train.scope=expert comes before .* the same command again"):
        made.resume(early)


def test_a_rising_probe_stays_with_the_expert_and_another_begins():
    made = trainer(dataclasses.replace(SELECTIVE, selective=SelectiveConfig(iterations=4, confidence=0.9)))
    decisions = [made.observe(value) for value in (0.1, 0.2, 0.32, 0.41)]
    assert decisions[:3] == [None] * 3 and decisions[3].scope == made.scope == "expert"
    assert "rising" in decisions[3].reason and "\n" not in decisions[3].reason
    assert made.observe(0.4) is None
    other = trainer(made.config)
    other.resume(made.progress())
    assert other.probe == [0.4] and other.decision == decisions[3]
    for run in (made, other):  # flat, however much it rose before
        later = [run.observe(value) for value in (0.41, 0.4, 0.4)]
        assert later[:2] == [None] * 2 and later[2].scope == run.scope == "joint"
    assert trainer(CONFIG).observe(0.5) is None  # another scope never probes


def test_groups_that_the_filter_drops_are_drawn_again():
    """The first are those of a run that draws none again; then as many as were dropped, until the budget is spent."""
    reward = dataclasses.replace(CONFIG.reward, keep_low=0.3, keep_high=0.8, filter_on="success")
    plain = dataclasses.replace(CONFIG, reward=reward)
    more = dataclasses.replace(plain, group=dataclasses.replace(plain.group, oversample=3.3))
    first = trainer(plain).collect(tiny.pool(16), 1)
    made = trainer(more)
    rollouts = made.collect(tiny.pool(16), 1)
    for name in ("success", "chunks"):
        np.testing.assert_array_equal(getattr(rollouts, name)[:4], getattr(first, name))
    kept = [0.3 <= group.mean() <= 0.8 for group in rollouts.success]
    rounds = [4]  # groups that were drawn at a time, by hand
    while sum(rounds) < 13 and (dropped := kept[sum(rounds[:-1]) : sum(rounds)].count(False)):
        rounds.append(min(dropped, 13 - sum(rounds)))
    drawn = sum(rounds)
    assert drawn == len(kept) == len(rollouts.episodes) and sum(kept) <= 4
    assert sum(kept) == 4 or len(kept) == 13
    assert len(set(rollouts.seeds.tolist())) == len(kept)
    assert rollouts.seeds.tolist() == training_seeds(CONFIG.seed, 1, 13).tolist()[: len(kept)]
    assert set(rollouts.nodes.group.tolist()) == set(range(len(kept)))
    assert rollouts.caches is None or rollouts.caches.rows == len(rollouts.looks.tokens)
    assert made.credit(rollouts, np.random.default_rng(0)).kept.tolist() == kept


def test_seeds_of_groups_do_not_depend_on_how_many_there_are(rng):
    seed, iteration = int(rng.integers(10**4)), int(rng.integers(10**3))
    np.testing.assert_array_equal(training_seeds(seed, iteration, 5), training_seeds(seed, iteration, 40)[:5])
