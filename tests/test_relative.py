"""Relative actions: against openpi's transforms and LeRobot's steps on the same numbers, and all the way of a policy.

reference/relative_actions.npz holds what openpi's make_bool_mask, DeltaActions, Normalize, Unnormalize and
AbsoluteActions, and LeRobot's RelativeActionsProcessorStep, to_relative_actions and to_absolute_actions gave.
"""

import dataclasses
import pathlib

import numpy as np
import pytest
import tiny_policy as tiny
from seeds import fresh_seed

from envs.base import EnvObservation
from z1_jax.checkpoint import Checkpoints
from z1_jax.config.schema import Config, ConfigError, DemosConfig, EnvConfig, EvalConfig, InputsConfig, SftConfig
from z1_jax.data.loader import collate
from z1_jax.data.normalize import NormStats
from z1_jax.data.relative import RelativeActions, parse_relative, relative_from_json
from z1_jax.data.transforms import InputProcessor
from z1_jax.initial_policy import check_policy
from z1_jax.metrics import MetricsWriter
from z1_jax.policy import load_policy
from z1_jax.rl import rollout
from z1_jax.rl.tree import BranchPlan
from z1_jax.run_dir import policy_identity
from z1_jax.stages import demonstrations, supervised_policy
from z1_jax.suites import check_settings
from z1_jax.worlds import World, differences

REFERENCE = np.load(pathlib.Path(__file__).parent / "reference" / "relative_actions.npz")
CASES = sorted({name.partition("/")[0] for name in REFERENCE.files})
SEED = fresh_seed(__name__)


def of(case: str, name: str) -> np.ndarray:
    return REFERENCE[f"{case}/{name}"]


def parsed(case: str) -> RelativeActions:
    relative = parse_relative([str(n) for n in of(case, "dims")])
    assert relative
    return relative


def processor(case: str, mode: str) -> InputProcessor:
    state = of(case, "state")
    stats = {
        "actions": NormStats(**{name: of(case, name) for name in ("mean", "std", "q01", "q99")}, rule="openpi"),
        "state": NormStats(
            np.zeros(len(state)), np.ones(len(state)), -3 * np.ones(len(state)), 3 * np.ones(len(state))
        ),
    }
    return InputProcessor(tiny.processor().tokenizer, stats, ("left",), 8, 9, norm_mode=mode, relative=parsed(case))


@pytest.mark.parametrize("mode", ["quantile", "z_score"])
@pytest.mark.parametrize("case", CASES)
def test_as_openpi(case, mode):
    made, state, actions = processor(case, mode), of(case, "state"), of(case, "actions")
    np.testing.assert_allclose(parsed(case).offsets(actions, state), of(case, "offsets"), atol=1e-6)
    got = made.model_actions(actions, state)
    np.testing.assert_allclose(got[:, : actions.shape[1]], of(case, f"{mode}/model"), rtol=1e-5, atol=1e-5)
    assert not got[:, actions.shape[1] :].any()
    predicted = np.pad(of(case, f"{mode}/predicted"), ((0, 0), (0, 9 - actions.shape[1])))
    np.testing.assert_allclose(made.env_actions(predicted, state), of(case, f"{mode}/env"), rtol=1e-5, atol=1e-5)
    # Chunks of many states at once, as a rollout has them: [n, M, H, A] for states [n, 1, S].
    rng = np.random.default_rng(SEED)
    states = rng.normal(size=(3, 1, len(state)))
    together = made.env_actions(np.broadcast_to(predicted, (3, 2, *predicted.shape)), states)
    for row, one in enumerate(states[:, 0]):
        for member in range(2):
            np.testing.assert_array_equal(together[row, member], made.env_actions(predicted, one), err_msg=f"{SEED}")


@pytest.mark.parametrize("case", [case for case in CASES if f"{case}/lerobot/offsets" in REFERENCE.files])
def test_as_lerobot(case):
    relative = RelativeActions(tuple(of(case, "lerobot/mask").tolist()))
    offsets = relative.offsets(of(case, "actions"), of(case, "state"))
    np.testing.assert_allclose(offsets, of(case, "lerobot/offsets"), atol=1e-6)
    targets = relative.targets(of(case, "lerobot/offsets"), of(case, "state"))
    np.testing.assert_allclose(targets, of(case, "lerobot/targets"), atol=1e-6)


def test_masks_and_their_errors():
    assert parse_relative([]) is None
    assert parse_relative(["2", "-2", "2"]) == RelativeActions((True, True, False, False, True, True))
    told = RelativeActions((True, False, True), ("x", "gripper", "y"))
    assert relative_from_json(told.to_json()) == told and relative_from_json(None) is None
    assert parse_relative(["3", "-1", "1"]).words == "action dimensions 0..2, 4 are offsets from the state"
    with pytest.raises(ValueError, match="'6,x' is no mask.*6,-1"):
        parse_relative(["6", "x"])
    with pytest.raises(ValueError, match="no dimension is relative"):
        parse_relative(["-3"])
    with pytest.raises(ValueError, match="dimension 5 is relative to the state, but states have 4"):
        RelativeActions((True,) * 6).check(7, 4)
    made = processor(CASES[0], "quantile")
    for call in (made.env_actions, made.model_actions):
        with pytest.raises(ValueError, match="relative to the state: give the raw states"):
            call(np.zeros((5, 7)))


@pytest.mark.parametrize(
    ("counts", "message"),
    [(("6", "a"), "is no mask"), (("13",), "dimension 12 is relative.*actions have 12"), (("-6",), "no dimension")],
)
def test_a_config_is_checked(counts, message):
    with pytest.raises(ConfigError, match=f"^config key inputs.relative_actions: .*{message}"):
        check_settings(Config(inputs=InputsConfig(relative_actions=counts)))
    check_settings(Config(inputs=InputsConfig(relative_actions=("7", "-5"))))


def test_offsets_are_not_held_against_absolute_ranges():
    """The spans of offsets say nothing about an environment's -1..1, nor about a dataset's targets."""
    wide = NormStats(np.zeros(2), np.ones(2), -5 * np.ones(2), 5 * np.ones(2))
    faint = NormStats(np.zeros(2), 1e-3 * np.ones(2), -2e-3 * np.ones(2), 2e-3 * np.ones(2))
    policy = World("the policy", stats={"actions": wide}, offsets=True)
    dataset = World("the data", stats={"actions": faint})
    for other in (World("the environment"), dataset):
        assert differences(policy, other) == [] and differences(other, policy) == []
    assert differences(dataclasses.replace(policy, offsets=False), World("the environment"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """SFT of a few steps in the kitchen with relative actions: (config, dataset, folder, policy)."""
    folder = tmp_path_factory.mktemp("relative")
    config = Config(
        algorithm="sft",
        task="OpenDrawer",
        inputs=InputsConfig(relative_actions=("3", "-1", "3", "-5")),
        demos=DemosConfig(episodes=3),
        env=EnvConfig(workers=0, cameras=(tiny.CAMERA,), image_size=28),
        sft=SftConfig(steps=2, batch_size=4, flows=1),
        eval=EvalConfig(episodes=1),
    )
    dataset = demonstrations(config, folder / "data")
    with MetricsWriter(folder / "run") as writer:
        policy = supervised_policy(config, dataset, tiny.one_device(), folder / "checkpoints" / "sft", writer)
    return config, dataset, folder, policy


def test_labels_and_statistics_are_of_offsets(trained):
    _, dataset, _, policy = trained
    states, actions = (np.concatenate(part) for part in zip(*dataset.numbers(), strict=True))
    mask = np.array([1, 1, 1, 0, 1, 1, 1, 0, 0, 0, 0, 0], bool)
    offsets = actions.astype(np.float64)
    for row, state in enumerate(states):  # by hand: every action of a chunk against the one state before it
        for step in range(dataset.chunk):
            offsets[row, step, mask] -= state[:12][mask]
    flat = offsets.reshape(-1, 12)
    stats = policy.processor.stats["actions"]
    np.testing.assert_allclose(stats.mean, flat.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(stats.q99, np.quantile(flat, 0.99, axis=0), atol=1e-6)
    np.testing.assert_allclose(policy.processor.stats["state"].mean, dataset.stats["state"].mean)
    low, high = stats.q01, stats.q99
    moves = ~stats.constant
    batch = collate(dataset, policy.processor, range(len(dataset)))["actions"][..., :12]
    expected = (offsets - low) / (high - low + 1e-6) * 2 - 1
    np.testing.assert_allclose(batch[..., moves], expected[..., moves], atol=1e-4)


def test_a_policy_keeps_them_and_acts_with_them(trained):
    """Saved, loaded, sampled as evaluation and RL do: the environment gets state + offset, cut to its range."""
    _, _, folder, policy = trained
    loaded = load_policy(Checkpoints(folder / "checkpoints" / "sft"), 2, tiny.one_device())
    assert loaded.processor.relative == policy.processor.relative
    assert loaded.document()["relative_actions"]["mask"][:4] == [True, True, True, False]
    graphdef, trainable, frozen = loaded.split("expert")
    actor = rollout_actor(loaded, graphdef)
    pool = _Recording(tiny.pool(4))
    from envs.base import Episode

    plan = BranchPlan(group_size=2, points=(1,), fanout=(2,))
    out = rollout.collect(
        pool, actor, (trainable, frozen), loaded.processor, plan, [Episode(5), Episode(6)], (1,), executed=8
    )
    stats = loaded.processor.stats["actions"]
    node = 0
    for states, actions in pool.steps:
        for state, got in zip(states, actions, strict=True):
            x = out.nodes.x[node, -1][:8, :12].astype(np.float64)
            raw = (x + 1) / 2 * (stats.q99 - stats.q01 + 1e-6) + stats.q01
            raw = np.where(stats.constant, stats.mean, raw)
            raw[:, loaded.processor.relative.dims] += state[list(loaded.processor.relative.dims)]
            np.testing.assert_allclose(got, np.clip(raw, -1, 1), atol=1e-4)
            node += 1
    assert node == len(out.nodes.x) > 4


class _Recording:
    """A pool that keeps the state of each observation with the actions that were taken on it."""

    def __init__(self, pool):
        self._pool, self.steps, self._states = pool, [], {}

    def __getattr__(self, name):
        return getattr(self._pool, name)

    def begin_reset(self, slots, episodes):
        return self._pool.begin_reset(slots, episodes)

    def branch(self, sources, targets):
        self._states |= {target: self._states[source] for source, target in zip(sources, targets, strict=True)}
        return self._pool.branch(sources, targets)

    def begin_step(self, slots, actions):
        self.steps.append(([self._states[slot] for slot in slots], np.array(actions)))
        return self._pool.begin_step(slots, actions)

    def finish(self, call):
        answers = self._pool.finish(call)
        looks = [answer[1] if isinstance(answer, tuple) else answer for answer in answers]
        self._states |= {slot: look.state for slot, look in zip(call.slots, looks, strict=True) if look is not None}
        return answers


def rollout_actor(policy, graphdef):
    from z1_jax.evaluation import make_actor

    return make_actor(policy, graphdef, tiny.EVERY_STEP, tiny.one_device(), 4)


def test_another_mask_than_the_policys_is_refused(trained):
    config, _, folder, _ = trained
    path = str(folder / "checkpoints" / "sft")
    check_policy(config, path)
    check_policy(dataclasses.replace(config, inputs=InputsConfig()), path)  # it brings its own
    other = dataclasses.replace(config, inputs=InputsConfig(relative_actions=("3",)))
    with pytest.raises(ConfigError, match=r"inputs.relative_actions: got \('3',\); the policy .* was trained with"):
        check_policy(other, path)


def test_the_same_parameters_with_another_mask_are_another_policy(tmp_path):
    def identity(name, **changes):
        checkpoints = Checkpoints(tmp_path / name)
        checkpoints.save(1, tiny.policy().parts(), {**tiny.policy().document(), **changes})
        checkpoints.close()
        return policy_identity(str(tmp_path / name))

    masks = [None, {"mask": [True], "names": []}, {"mask": [False, True], "names": []}]
    found = [identity(str(i), relative_actions=mask) for i, mask in enumerate(masks)]
    assert len(set(found)) == 3
    document = tiny.policy().document()
    del document["relative_actions"]  # of a policy that is older
    checkpoints = Checkpoints(tmp_path / "old")
    checkpoints.save(1, tiny.policy().parts(), document)
    checkpoints.close()
    assert policy_identity(str(tmp_path / "old")) == found[0]


def test_a_dataset_that_is_too_narrow_is_told(trained):
    _, dataset, _, _ = trained
    from z1_jax.initial_policy import dataset_statistics

    with pytest.raises(ConfigError, match="dimension 11 is relative.*but states have 6"):
        dataset_statistics(dataclasses.replace(dataset, state_dim=6), RelativeActions((False,) * 11 + (True,)))


def test_the_observation_is_untouched(trained):
    """Only actions are relative: prompts hold the state as before."""
    _, dataset, _, policy = trained
    record = dataset[0]
    seen = EnvObservation(record.images, record.state, record.instruction)
    absolute = dataclasses.replace(policy.processor, relative=None)
    np.testing.assert_array_equal(policy.processor.observation([seen]).tokens, absolute.observation([seen]).tokens)
