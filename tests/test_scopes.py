"""Training scopes, proved from what the compiled steps take and give; averaged parameters; remat and attention."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pi05_reference as reference
import pytest
import tiny_policy as tiny
from flax import nnx

from z1_jax import distributed, initial_policy, sharding
from z1_jax.checkpoint import Checkpoints
from z1_jax.config import checks
from z1_jax.config import schema as z1_config
from z1_jax.config.schema import Config, ConfigError, LoraConfig, ModelConfig, OptimConfig, SftConfig
from z1_jax.convert import openpi_names
from z1_jax.models import pi05
from z1_jax.models.choices import trains_vlm
from z1_jax.models.compute import Compute
from z1_jax.models.params import initialise
from z1_jax.models.presets import get_preset
from z1_jax.models.siglip import Siglip, SiglipConfig
from z1_jax.optim import init_optimizer, make_optimizer
from z1_jax.policy import Policy, load_policy, named
from z1_jax.rl import loss
from z1_jax.rl.update import NodeBatch, Updater
from z1_jax.sft import SftTrainer
from z1_jax.types import PrefixCache

ADAPTERS = LoraConfig(vlm_rank=2, vlm_alpha=4.0, expert_rank=0)
EMA = 0.9


def policy(dtype: str = "float32") -> Policy:
    """A copy that a trainer may use up."""
    config = dataclasses.replace(tiny.CONFIG, dtype=dtype)
    params = jax.tree.map(lambda x: x.copy(), tiny.policy().params)
    return dataclasses.replace(
        tiny.policy(), config=config, graphdef=nnx.split(pi05.abstract_model(config))[0], params=params
    )


def batch(rng, size: int = 2) -> dict[str, np.ndarray]:
    return {
        "images": rng.integers(0, 256, (size, 1, 28, 28, 3), dtype=np.uint8),
        "image_mask": np.ones((size, 1), bool),
        "tokens": rng.integers(1, 500, (size, 48)).astype(np.int32),
        "token_mask": np.arange(48) < rng.integers(30, 48, (size, 1)),
        "actions": rng.normal(size=(size, 8, 16)).astype("f"),
    }


def sft(scope: str, dtype: str = "float32", ema: float = 0.0) -> SftTrainer:
    config = SftConfig(steps=10, scope=scope, ema=ema, flows=1, optim=OptimConfig(lr=1e-2, warmup_steps=0))
    return SftTrainer(policy(dtype), config, 3, tiny.one_device(), ADAPTERS)


def count(state) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(state))


def sizes(tree) -> dict[str, int]:
    """Entries by dtype."""
    total: dict[str, int] = {}
    for leaf in jax.tree.leaves(tree):
        total[leaf.dtype.name] = total.get(leaf.dtype.name, 0) + int(np.prod(leaf.shape))
    return total


# By hand from tiny.CONFIG: vision 16 wide, language and expert 32; per part (entries, of which used in float32).
ALL = {name: leaf.size for name, leaf in named(tiny.policy().params).items()}
FLOAT32 = ("norm", "patch_", "position", "action_", "time_")


def entries(*parts: str, float32: bool | None = None) -> int:
    """Entries of parts of the model; those used in float32 only, or the others: recognised by name."""

    def wide(name: str) -> bool:
        return any(piece in name for piece in FLOAT32) and "modulation" not in name

    return sum(n for name, n in ALL.items() if name.startswith(parts) and float32 in (None, wide(name)))


EMBEDDING = 512 * 32
UNREACHED = 32 * 32 + 32 * 32 + 3 * 32 * 32 + 32 + 32  # the last layer's q, out, MLP and its norm; the final norm


@pytest.mark.parametrize(
    ("scope", "trained"),
    [
        ("expert", entries("expert")),
        ("joint", sum(ALL.values()) - EMBEDDING - UNREACHED),
        ("everything", sum(ALL.values())),
    ],
)
def test_what_each_scope_trains(scope, trained):
    _, trainable, frozen = policy().split(scope)
    assert count(trainable) == trained and count(frozen) == sum(ALL.values()) - trained
    assert not set(named(trainable)) & set(named(frozen))
    assert trains_vlm(scope, 0) == (not pi05.vlm_is_frozen(trainable))
    if scope == "joint":
        assert "language.embedding" in named(frozen)
        assert {path[0] for path, _ in nnx.to_flat_state(trainable)} == {"vision", "language", "expert"}


def test_full_size_scopes():
    """π0.5 in millions; joint leaves out 526.6 of the embedding and 109.1 that no gradient reaches."""
    model = pi05.abstract_model(get_preset("pi05"))
    for scope, millions in (("expert", 430.1), ("joint", 3353.4 - 526.6 - 109.1), ("everything", 3353.4)):
        _, trainable, frozen = pi05.split_model(model, scope, "bfloat16")
        assert pi05.count_parameters(trainable) / 1e6 == pytest.approx(millions, abs=0.1)
        assert set(sizes(trainable)) == {"float32"}
        assert sizes(frozen).get("float32", 0) < 1.5e6  # norms, patch and position embeddings


def test_what_joint_leaves_out_gets_no_gradient_from_openpi_either():
    """openpi's own gradients of the reference model, all of it trained."""
    grads = openpi_names.from_openpi(
        reference.section(reference.load("tiny_pi05_grads.npz"), "grads/"), get_preset("tiny")
    )
    dead = {name for name, leaf in named(grads).items() if not np.any(leaf)}
    _, _, frozen = pi05.split_model(pi05.abstract_model(get_preset("tiny")), "joint")
    assert dead | {"language.embedding"} == set(named(frozen))


def test_frozen_parameters_enter_the_rl_update_in_bfloat16():
    graphdef, trainable, frozen = policy("bfloat16").split("expert")
    optimizer = make_optimizer(OptimConfig(), 1e-3)
    config = Config()
    updater = Updater(
        graphdef,
        optimizer,
        loss.grpo(0.2, 0.2, 0.0),
        config.flow,
        config.update,
        np.ones((8, 16), bool),
        tiny.one_device(),
    )
    cache = PrefixCache(*[jnp.zeros((2, 128, 52, 1, 16), jnp.bfloat16)] * 2, jnp.ones((128, 52), bool))
    nodes = NodeBatch(
        seen=cache,
        node=jnp.zeros(128, int),
        x=jnp.zeros((128, 5, 8, 16)),
        stochastic=jnp.ones((128, 4), bool),
        **{name: jnp.zeros(128) for name in ("logp_old", "members")},
        inputs={name: jnp.zeros(128) for name in ("positive", "negative")},
        valid=jnp.ones(128, bool),
    )
    state = init_optimizer(optimizer, trainable, tiny.one_device())
    lowered = updater._step.lower(trainable, state, frozen, None, nodes, *[jnp.float32(1)] * 3)
    given, moments, kept = lowered.args_info[0][:3]
    n = entries("expert")
    assert sizes(given) == {"float32": n} and sizes(moments)["float32"] == 2 * n
    assert sizes(kept)["bfloat16"] == entries("vision", "language", float32=False)
    out = jax.tree.leaves(lowered.out_info)
    assert "bfloat16" not in sizes(out) and sizes(out)["float32"] < 3 * n + 128 + 100


@functools.cache
def adapted() -> SftTrainer:
    """Adapters on the VLM, the expert whole, averaged, in bfloat16; shared: compiled once."""
    return sft("lora", "bfloat16", EMA)


# Rank 2, by hand: rank × (inputs + outputs) of each kernel. Two vision layers, a whole language layer, and the last.
VISION_ADAPTERS = 2 * (4 * 2 * (16 + 16) + 2 * 2 * (16 + 32))
LANGUAGE_ADAPTERS = 2 * (32 + 32) + 2 * 2 * (32 + 16) + 2 * (32 + 32) + 2 * 2 * (32 + 32) + 2 * (32 + 32)
LAST_ADAPTERS = 2 * 2 * (32 + 16)


def test_frozen_parameters_enter_the_compiled_sft_step_in_bfloat16_and_nothing_else_of_them_does(rng):
    compiled = adapted().lower(batch(rng)).compile()
    (trainable, opt_state, average), frozen = compiled.in_avals[0][:2]
    n = entries("expert") + VISION_ADAPTERS + LANGUAGE_ADAPTERS + LAST_ADAPTERS
    assert sizes(trainable) == sizes(average) == {"float32": n}
    assert sizes(opt_state) == {"float32": 2 * n, "int32": sizes(opt_state)["int32"]}  # two moments of the trained
    narrow, wide = entries("vision", "language", float32=False), entries("vision", "language", float32=True)
    assert sizes(frozen) == {"bfloat16": narrow, "float32": wide}
    # What the step gives back: the trained parameters, moments and averages, two statistics. Nothing of the frozen.
    out = jax.tree.leaves(compiled.out_info)
    assert sizes(out)["float32"] == 4 * n + 2 and "bfloat16" not in sizes(out)
    # And in bytes, as XLA counts them. It drops arguments that it does not read: what no gradient reaches.
    unread = 2 * (UNREACHED - 64) + 4 * 64
    data = sum(leaf.nbytes for leaf in batch(rng).values()) + 4
    scalars = 4 * sizes(opt_state)["int32"]
    expected = 4 * 4 * n + 2 * narrow + 4 * wide - unread + data + scalars
    assert compiled.memory_analysis().argument_size_in_bytes == pytest.approx(expected, rel=2e-3)


def test_averaged_parameters_by_hand_and_from_a_checkpoint(rng, tmp_path):
    trainer = adapted()
    steps = [batch(rng) for _ in range(4)]
    expected = jax.device_get(trainer.state.trainable)
    frozen = jax.device_get(trainer.state.frozen)
    checkpoints = Checkpoints(tmp_path)
    for number, step in enumerate(steps):
        stats = trainer.step(step, number)
        assert np.isfinite(stats["loss"]) and stats["grad_norm"] > 0
        raw = jax.device_get(trainer.state.trainable)
        expected = jax.tree.map(lambda mean, now: EMA * mean + (1 - EMA) * now, expected, raw)
        if number == 1:
            acting = trainer.policy()
            checkpoints.save(2, trainer.state.parts(acting), acting.document())
    for (name, average), hand, now in zip(
        named(trainer.state.average).items(), jax.tree.leaves(expected), jax.tree.leaves(raw), strict=True
    ):
        np.testing.assert_allclose(average, hand, rtol=1e-5, atol=1e-7, err_msg=name)
        assert not name.endswith(".b") or np.any(np.asarray(average) != now)  # acting is not training
    for before, after in zip(jax.tree.leaves(frozen), jax.tree.leaves(trainer.state.frozen), strict=True):
        np.testing.assert_array_equal(before, after)

    finished = jax.device_get(trainer.state)
    step, trainer.state, _ = trainer.state.restored(checkpoints)
    assert step == 2
    loaded = load_policy(checkpoints, 2, tiny.one_device())
    for (name, a), b in zip(named(loaded.params).items(), jax.tree.leaves(trainer.policy().params), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=name)
        assert a.dtype == b.dtype
    for number in (2, 3):  # the raw parameters go on, to the same bits
        trainer.step(steps[number], number)
    for a, b in zip(jax.tree.leaves(trainer.state), jax.tree.leaves(finished), strict=True):
        np.testing.assert_array_equal(a, b)


def test_an_sft_step_refuses_what_was_not_placed(rng, monkeypatch):
    trainer = sft("expert")
    monkeypatch.setattr(distributed, "put_batch", lambda tree, mesh: tree)
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        trainer.step(batch(rng), 0)


def test_without_an_average_the_policy_is_what_is_trained():
    trainer = sft("joint")
    assert trainer.state.average is None and set(trainer.state.parts(trainer.policy())) == {
        "params",
        "assets",
        "optimizer",
    }
    assert named(trainer.policy().params).keys() == ALL.keys()


def test_frozen_parameters_stay_as_wide_as_float32_runs_need_them():
    _, trainable, frozen = policy("float32").split("expert")
    assert sizes(frozen) == {"float32": count(frozen)} and sizes(trainable) == {"float32": count(trainable)}
    narrow = dataclasses.replace(policy(), params=pi05.cast_state(tiny.policy().params, "bfloat16"))
    _, trainable, _ = narrow.split("expert")  # a policy stored in bfloat16 is trained in float32
    assert sizes(trainable) == {"float32": count(trainable)}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"sft__scope": "lora"}, "sft.scope: got lora for a fresh policy"),
        ({"sft__scope": "expert"}, "sft.scope: got expert for a fresh policy"),
        ({"lora__vlm_rank": 8}, "lora.vlm_rank: got 8, but no scope of this run is lora"),
        ({"train__scope": "lora", "lora__vlm_rank": 0, "lora__expert_rank": 0}, "got 0, and lora.expert_rank is 0"),
        ({"train__scope": "vlm"}, "train.scope: got 'vlm', expected one of expert, joint, lora, everything"),
        ({"sft__ema": 1.0}, r"sft.ema: got 1.0, expected 0.0 … 0.99999"),
        ({"lora__vlm_rank": -1}, "lora.vlm_rank: got -1"),
        ({"model__remat": "some"}, "model.remat: got 'some', expected one of none, dots, full"),
        ({"model__attention": "flash"}, "model.attention: got 'flash', expected one of einsum, xla, cudnn"),
        ({"model__attention": "cudnn"}, "cudnn computes in bfloat16 only; set model.dtype=bfloat16"),
    ],
)
def test_settings_that_cannot_work_are_refused(overrides, message):
    with pytest.raises(ConfigError, match=message) as error:
        checks.checked(z1_config.defaults(**overrides).to_dict())
    assert "\n" not in str(error.value)


def test_scopes_that_work_are_taken():
    for overrides in (
        {"train__scope": "lora", "lora__expert_rank": 0, "lora__vlm_alpha": 32.0},
        {"algorithm": "sft", "init": "runs/x", "sft__scope": "lora", "lora__vlm_rank": 4},
        {"sft__scope": "joint", "sft__ema": 0.99, "train__scope": "everything"},
    ):
        checks.checked(z1_config.defaults(**overrides).to_dict())


def test_remat_and_attention_reach_the_model():
    config = Config(model=ModelConfig(remat="dots", attention="xla"))
    shapes = initial_policy.configured_model(config)
    assert (shapes.remat, shapes.attention) == ("dots", "xla")
    given = policy().with_compute("full", "xla")  # a checkpoint's policy follows the run
    model = nnx.merge(given.graphdef, given.params)
    assert (model.vision.compute.remat, model.language.compute.remat, model.expert.compute.remat) == ("full",) * 3
    assert (model.vision.compute.attention, model.language.compute.attention) == ("xla", "xla")
    cudnn = Config(model=ModelConfig(dtype="bfloat16", attention="cudnn"))
    with pytest.raises(ConfigError, match="got cudnn on cpu, expected einsum or xla without a GPU"):
        initial_policy.check_attention(cudnn)


def test_remat_gives_the_same_gradients_from_fewer_bytes(rng):
    size = SiglipConfig(width=32, depth=8, mlp=128, heads=2, patch=4, image_size=16)
    images = rng.uniform(-1, 1, (16, 16, 16, 3)).astype("f")
    grads, temporary = {}, {}
    for remat in ("none", "dots", "full"):
        graphdef, abstract = nnx.split(Siglip(size, 16, Compute(dtype="float32", remat=remat)))
        state = initialise(abstract, 5)
        loss = lambda state, graphdef=graphdef: jnp.mean(jnp.square(nnx.merge(graphdef, state)(images)))  # noqa: E731
        compiled = jax.jit(jax.grad(loss)).lower(state).compile()
        temporary[remat] = compiled.memory_analysis().temp_size_in_bytes
        grads[remat] = jax.tree.leaves(compiled(state))
    print(temporary)
    assert temporary["full"] < 0.5 * temporary["dots"] < 0.5 * temporary["none"]
    for remat in ("dots", "full"):
        for a, b in zip(grads[remat], grads["none"], strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6 * float(np.abs(b).max()))


def test_moments_are_created_on_their_shards():
    mesh = sharding.make_mesh(2, 2, 2)
    params = sharding.shard(tiny.policy().params, mesh)
    optimizer = make_optimizer(OptimConfig(), 1e-3)
    state = init_optimizer(optimizer, params, mesh)
    moments = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim]
    for moment, param in zip(moments, jax.tree.leaves(params) * 2, strict=True):
        assert moment.sharding == param.sharding
