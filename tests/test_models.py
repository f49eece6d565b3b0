"""π0.5 against openpi's reference numbers, and the properties that the rest of the project relies on."""

import dataclasses
import json

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pi05_reference as reference
import pytest
from flax import nnx
from seeds import fresh_seed

from z1_jax import policy
from z1_jax.convert import openpi_names
from z1_jax.models import attention, pi05
from z1_jax.models.compute import Compute
from z1_jax.models.gemma import GemmaConfig
from z1_jax.models.layers import scan_layers
from z1_jax.models.presets import PRESETS, get_preset
from z1_jax.models.siglip import SiglipConfig
from z1_jax.types import Observation, PrefixCache

SHAPES = json.loads((reference.FOLDER / "pi05_openpi_jax_full_shapes.json").read_text())


@pytest.fixture(scope="module")
def case() -> reference.Case:
    return reference.load_case()


@pytest.fixture(scope="module")
def rng() -> np.random.Generator:
    seed = fresh_seed(__name__, "rng")
    return np.random.default_rng(seed)


@pytest.fixture(scope="module")
def encode(case):
    return jax.jit(lambda obs: nnx.merge(case.graphdef, case.state).encode_prefix(obs))


@pytest.fixture(scope="module")
def velocity(case):
    return jax.jit(lambda cache, x, t: nnx.merge(case.graphdef, case.state).velocity(cache, x, t))


def relative_error(got, expected) -> float:
    return float(np.abs(np.asarray(got) - np.asarray(expected)).max() / np.abs(np.asarray(expected)).max())


def test_every_array_matches_openpi(case):
    rows = reference.all_comparisons(case)
    names = {row.name for row in rows}
    assert {f"grads/{name}" for name in SHAPES} <= names
    assert {"v_t_joint", "loss", "kv_cache_k", "sampled_actions_10", "sampled_actions_4"} <= names
    assert not [f"{row.name}: {row.error:.2e}" for row in rows if not row.ok]


def test_chunks_that_share_a_prefix_do_not_see_each_other(case, encode, velocity):
    """The reference's ten trajectory points, all at once as M = 10 chunks of each observation."""
    x = case.expected["traj_10_x"][:-1].transpose(1, 0, 2, 3)
    t = np.broadcast_to(case.expected["traj_10_t"], x.shape[:2])
    v = velocity(encode(case.obs), x, t)
    assert relative_error(v, case.expected["traj_10_v"].transpose(1, 0, 2, 3)) < reference.TOLERANCE


def unread(config) -> set[str]:
    """VLM parameters that no operation of `encode_prefix` reads."""
    graphdef, state = nnx.split(pi05.abstract_model(dataclasses.replace(config, unroll=False)))
    size = config.vision.image_size
    looks = Observation(
        jax.ShapeDtypeStruct((1, config.cameras, size, size, 3), jnp.uint8),
        jax.ShapeDtypeStruct((1, config.cameras), bool),
        jax.ShapeDtypeStruct((1, config.prompt_length), jnp.int32),
        jax.ShapeDtypeStruct((1, config.prompt_length), bool),
    )
    trace = jax.make_jaxpr(lambda state, looks: nnx.merge(graphdef, state).encode_prefix(looks))(state, looks).jaxpr
    read = {id(var) for eqn in trace.eqns for var in eqn.invars} | {id(var) for var in trace.outvars}
    names = list(policy.named(state))
    return {
        name for name, var in zip(names, trace.invars, strict=False) if id(var) not in read and "expert" not in name
    }


def test_of_the_last_layer_only_keys_and_values_are_computed():
    """By the operations themselves: its queries, output and MLP enter none. At full size 5.5 % of the layers' work."""
    expected = {"language.norm.scale", "language.last.norm_mlp.scale"}
    kernels = {"language.last.q.kernel", "language.last.out.kernel"}
    left_out = unread(get_preset("tiny"))
    assert expected | kernels < left_out
    assert {name.split(".")[2] for name in left_out if name.startswith("language.last.")} == {
        "q",
        "out",
        "mlp",
        "norm_mlp",
    }
    assert all(name.startswith("language.last.") or name == "language.norm.scale" for name in left_out)
    full = policy.named(nnx.split(pi05.abstract_model(get_preset("pi05")))[1])
    layers = {name: x.size for name, x in full.items() if name.startswith(("language.layers.", "language.last."))}
    assert sum(layers[name] for name in left_out & set(layers)) / sum(layers.values()) == pytest.approx(0.055, abs=5e-4)


def test_cache_rows_can_be_taken_and_repeated(case, encode, velocity, rng):
    rows = rng.integers(0, 3, 5)
    x, t = rng.normal(size=(5, 2, 6, 8)).astype("f"), rng.uniform(size=(5, 2)).astype("f")
    cache = encode(case.obs)
    v = velocity(cache.take(jnp.asarray(rows)), x, t)
    for i, row in enumerate(rows):
        alone = velocity(cache.take(jnp.asarray([row] * 5)), np.stack([x[i]] * 5), np.stack([t[i]] * 5))[0]
        assert relative_error(v[i], alone) < 1e-5


def test_masked_inputs_never_matter_and_can_be_left_out(case, encode, velocity, rng):
    x, t = rng.normal(size=(3, 1, 6, 8)).astype("f"), rng.uniform(size=(3, 1)).astype("f")
    camera_off = jnp.asarray([[True, False, True]] * 3)
    prompt_off = jnp.asarray(np.arange(12) < [[7], [5], [3]])
    obs = dataclasses.replace(case.obs, image_mask=camera_off, token_mask=prompt_off)
    expected = velocity(encode(obs), x, t)
    noise = rng.uniform(-1, 1, case.obs.images[:, 1].shape)
    scrambled = Observation(
        images=obs.images.at[:, 1].set(noise),
        image_mask=camera_off,
        tokens=jnp.where(prompt_off, obs.tokens, rng.integers(0, 512, (3, 12))),
        token_mask=prompt_off,
    )
    np.testing.assert_array_equal(velocity(encode(scrambled), x, t), expected)
    kept = jnp.asarray([0, 2])
    shorter = Observation(obs.images[:, kept], obs.image_mask[:, kept], obs.tokens[:, :7], obs.token_mask[:, :7])
    assert relative_error(velocity(encode(shorter), x, t), expected) < 1e-5


def test_uint8_images_are_scaled_to_minus_one_to_one(case, encode, rng):
    images = rng.integers(0, 256, case.obs.images.shape, dtype=np.uint8)
    from_bytes = encode(dataclasses.replace(case.obs, images=jnp.asarray(images)))
    scaled = jnp.asarray(images / 255.0 * 2 - 1, jnp.float32)
    assert relative_error(from_bytes.k, encode(dataclasses.replace(case.obs, images=scaled)).k) < 1e-5


@pytest.mark.parametrize("options", [{"remat": "full", "attention": "xla"}, {"remat": "dots", "unroll": True}])
def test_options_change_cost_but_not_numbers(case, options):
    other = reference.load_case(**options)
    grads = jax.jit(jax.grad(lambda state, obs: reference.loss(other, state, obs)[0]))(other.state, other.obs)
    assert not [row for row in reference.gradient_comparisons(other, grads) if not row.ok]


def test_remat_saves_activations(case):
    def saved(remat: str) -> int:
        config = get_preset("tiny", remat=remat)
        graphdef, state = nnx.split(pi05.init_model(config, 0))
        other = dataclasses.replace(case, graphdef=graphdef)
        _, pullback = jax.eval_shape(
            lambda state: jax.vjp(lambda state: reference.loss(other, state, case.obs)[0], state), state
        )
        return sum(leaf.size for leaf in jax.tree.leaves(pullback))

    assert saved("full") < saved("dots") < saved("none")


def test_bfloat16_compute_is_near_openpis():
    case, misc = reference.load_case(dtype="bfloat16"), reference.load("misc.npz")
    cast = dataclasses.replace(case, state=pi05.cast_state(case.state, "bfloat16"))
    for run, kind in ((case, "fp32params_bf16compute"), (cast, "bf16params_bf16compute")):
        per_step = jax.jit(lambda state, run=run: reference.loss(run, state, run.obs)[1]["loss"])(run.state)
        assert per_step.dtype == jnp.float32
        assert relative_error(per_step, misc[f"bf16/A/{kind}/loss"]) < 0.02
        actions = reference.euler(run, run.state, run.obs, 10)[0][-1]
        assert relative_error(actions, misc[f"bf16/A/{kind}/sampled_actions_10"]) < 0.03


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention_implementations_agree_with_plain_numpy(rng, kv_heads):
    q, k, v = (rng.normal(size=(2, 5, heads, 8)).astype("f") for heads in (4, kv_heads, kv_heads))
    mask = rng.random((2, 5)) < 0.6
    mask[:, 0] = True
    expected = np.zeros_like(q)
    for b in range(2):
        for head in range(4):
            logits = q[b, :, head] @ k[b, :, head * kv_heads // 4].T
            weight = np.exp(logits) * mask[b]
            expected[b, :, head] = weight / weight.sum(-1, keepdims=True) @ v[b, :, head * kv_heads // 4]
    for implementation in ("einsum", "xla"):
        assert relative_error(attention.attend(q, k, v, mask, implementation), expected) < 1e-5
    for implementation in ("einsum", "xla"):  # the same with queries in their order
        assert relative_error(attention.attend_in_order(q, k, v, mask[:, None], implementation), expected) < 1e-5
    # A chunk over the first two tokens as its prefix: every other token stands for one chunk of one step.
    for implementation in ("einsum", "xla"):
        shared = attention.attend_shared_prefix(
            q[:, 2:, None], k[:, 2:, None], v[:, 2:, None], k[:, :2], v[:, :2], np.ones((2, 2), bool), implementation
        )
        for i in range(3):
            own = [0, 1, 2 + i]
            alone = attention.attend(q[:, own], k[:, own], v[:, own], None)[:, -1]
            assert relative_error(shared[:, i, 0], alone) < 1e-5


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_attentions_gradients_are_those_of_the_plain_formula(rng, kv_heads):
    """Differentiated by JAX, chunk by chunk, keys repeated for each head; masked keys get none."""
    batch, chunks, horizon, heads, width, prefix = 2, 3, 2, 4, 8, 5
    q = rng.normal(size=(batch, chunks, horizon, heads, width))
    k, v = rng.normal(size=(2, batch, chunks, horizon, kv_heads, width))
    prefix_k, prefix_v = rng.normal(size=(2, batch, prefix, kv_heads, width))
    mask = rng.random((batch, prefix)) < 0.6
    weight = rng.normal(size=q.shape)

    def plain(q, k, v, prefix_k, prefix_v):
        keys, values = (
            jnp.repeat(jnp.concatenate([jnp.stack([shared] * chunks, 1), own], axis=2), heads // kv_heads, axis=3)
            for shared, own in ((prefix_k, k), (prefix_v, v))
        )
        allowed = jnp.concatenate([mask, np.ones((batch, horizon), bool)], axis=1)
        logits = jnp.einsum("bmhnd,bmsnd->bmnhs", q, keys)
        weights = jax.nn.softmax(jnp.where(allowed[:, None, None, None], logits, -jnp.inf))
        return jnp.sum(weight * jnp.einsum("bmnhs,bmsnd->bmhnd", weights, values))

    def ours(*factors):
        return jnp.sum(weight * attention.attend_shared_prefix(*factors, mask))

    def within(q, k, v):
        return jnp.sum(weight[:, 0] * attention.attend(q[:, 0], k[:, 0], v[:, 0], None))

    factors = [x.astype("f") for x in (q, k, v, prefix_k, prefix_v)]
    found, expected = (jax.grad(loss, argnums=range(5))(*factors) for loss in (ours, plain))
    for one, other in zip(found, expected, strict=True):
        assert relative_error(one, other) < 1e-5
    for gradient in found[3:]:
        assert not gradient[~mask].any()
    alone = jax.grad(within, argnums=range(3))(*factors[:3])
    mask[:], weight[:, 1:] = False, 0  # no prefix, and only the first chunk: what `attend` does
    for one, other in zip(alone, jax.grad(plain, argnums=range(3))(*factors), strict=True):
        assert relative_error(one, other) < 1e-5


def test_attentions_gradients_in_bfloat16_do_not_drown_in_what_values_share(rng):
    """Weights add up to one: what all values have in common moves no logit, however large it is."""
    q, k, v, weight = (rng.normal(size=(2, 64, heads, 32)) for heads in (4, 1, 1, 4))
    v = v + 4 * rng.normal(size=32)
    narrow = [jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)]

    def loss(q, k, v):
        return jnp.sum(weight * attention.attend(q, k, v, None).astype(jnp.float32))

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
    exact = gradient(*(x.astype(jnp.float32) for x in narrow))
    for found, expected in zip(gradient(*narrow), exact, strict=True):
        error = np.asarray(found, float) - np.asarray(expected, float)
        assert np.linalg.norm(error) < 0.01 * np.linalg.norm(expected)  # 0.005; 0.02 where it drowns


def dots(jaxpr) -> list[tuple[set, object]]:
    """(dtypes of the factors, precision) of every product in a trace, those of called functions included."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            found.append(({str(factor.aval.dtype) for factor in equation.invars}, equation.params["precision"]))
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            found += dots(inner)
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_only_products_of_float32_are_computed_in_full(rng, dtype):
    """As under `start_jax`: a gradient that meets bfloat16 is none of them."""
    q, k, v = (jnp.asarray(rng.normal(size=(2, 4, 2, 8)), dtype) for _ in range(3))
    mask = jnp.ones((2, 4), bool)

    def loss(q, k, v):
        shared = attention.attend_shared_prefix(q[:, None], k[:, None], v[:, None], k, v, mask)
        return jnp.sum(jnp.square(attention.attend(q, k, v, mask)) + jnp.square(shared[:, 0])).astype(jnp.float32)

    with jax.default_matmul_precision("float32"):
        found = dots(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2)))(q, k, v).jaxpr)
    full = (jax.lax.Precision.HIGHEST,) * 2
    # Logits and output, and the gradients of their four factors; of two blocks and of one.
    assert len(found) == 18
    assert all(factors == {dtype} and (precision == full) == (dtype == "float32") for factors, precision in found)


def test_cudnn_agrees_for_chunks_over_a_shared_prefix(rng):
    """As in an update of full size: wide heads, and gradients of queries, keys and values."""
    if jax.default_backend() != "gpu":
        pytest.skip("cuDNN needs a GPU: JAX_PLATFORMS=cuda XLA_FLAGS= pytest tests/test_models.py")
    q, k, v = (jnp.asarray(rng.normal(size=(2, 3, 10, n, 256)) / 8, jnp.bfloat16) for n in (8, 1, 1))
    prefix = [jnp.asarray(rng.normal(size=(2, 98, 1, 256)) / 8, jnp.bfloat16) for _ in range(2)]
    mask = jnp.asarray(rng.random((2, 98)) < 0.6)
    out = {}
    for name in ("einsum", "cudnn"):
        attend = lambda q, k, v, name=name: attention.attend_shared_prefix(q, k, v, *prefix, mask, name)  # noqa: E731
        value, pullback = jax.vjp(attend, q, k, v)
        out[name] = [value, *pullback(jnp.ones_like(value))]
    for got, expected in zip(out["cudnn"], out["einsum"], strict=True):
        assert relative_error(got.astype(jnp.float32), np.asarray(expected, np.float32)) < 3e-2


def test_cudnn_agrees_with_einsum(rng):
    if jax.default_backend() != "gpu":
        pytest.skip("cuDNN needs a GPU: JAX_PLATFORMS=cuda XLA_FLAGS= pytest tests/test_models.py")
    q, k, v = (jnp.asarray(rng.normal(size=(2, 96, heads, 64)) / 4, jnp.bfloat16) for heads in (4, 1, 1))
    mask = jnp.asarray(rng.random((2, 96)) < 0.6).at[:, 0].set(True)
    for given in (mask, None):
        out = {}
        for implementation in ("einsum", "cudnn"):
            attend = lambda q, k, v, name=implementation, given=given: attention.attend(q, k, v, given, name)  # noqa: E731
            value, pullback = jax.vjp(attend, q, k, v)
            out[implementation] = [value, *pullback(jnp.ones_like(value))]
        for got, expected in zip(out["cudnn"], out["einsum"], strict=True):
            assert relative_error(got.astype(jnp.float32), np.asarray(expected, np.float32)) < 3e-2


def test_full_size_arrays_are_openpis():
    shapes = openpi_names.openpi_shapes(get_preset("pi05"))
    assert shapes == {name: tuple(entry["shape"]) for name, entry in SHAPES.items()}
    assert round(pi05.count_parameters(pi05.abstract_model(get_preset("pi05"))) / 1e6, 1) == 3353.4


def test_openpi_arrays_survive_the_round_trip(case):
    params = reference.section(reference.load("tiny_pi05.npz"), "params/")
    back = openpi_names.to_openpi(case.state)
    assert back.keys() == params.keys()
    for name, value in params.items():
        np.testing.assert_array_equal(back[name], value)


def test_from_openpi_lists_every_problem():
    params = reference.section(reference.load("tiny_pi05.npz"), "params/")
    params["action_in_proj/bias"] = params["action_in_proj/bias"][:-1]
    params["surplus"] = np.zeros(3)
    del params["PaliGemma/img/head/kernel"]
    with pytest.raises(ValueError, match="3 problems") as error:
        openpi_names.from_openpi(params, get_preset("tiny"))
    for part in ("missing PaliGemma/img/head/kernel (32, 64)", "unexpected surplus (3,)", "is (31,), expected (32,)"):
        assert part in str(error.value)


def test_to_openpi_refuses_a_partial_state(case):
    _, trainable, _ = pi05.split_model(nnx.merge(case.graphdef, case.state), "expert")
    with pytest.raises(ValueError, match="merge trainable and frozen"):
        openpi_names.to_openpi(trainable)


def test_split_model_by_scope(case):
    model = nnx.merge(case.graphdef, case.state)
    graphdef, trainable, frozen = pi05.split_model(model, "expert", frozen_dtype="bfloat16")
    assert {path[0] for path, _ in nnx.to_flat_state(trainable)} == {"expert"}
    assert {path[0] for path, _ in nnx.to_flat_state(frozen)} == {"vision", "language"}
    dtypes = {"/".join(map(str, path)): leaf.get_value().dtype for path, leaf in nnx.to_flat_state(frozen)}
    assert dtypes["language/embedding"] == dtypes["vision/layers/q/kernel"] == jnp.bfloat16
    assert dtypes["vision/patch_kernel"] == dtypes["language/layers/norm_mlp/scale"] == jnp.float32
    assert jax.tree.structure(nnx.state(nnx.merge(graphdef, trainable, frozen))) == jax.tree.structure(case.state)
    _, everything, nothing = pi05.split_model(model, "everything")
    assert not jax.tree.leaves(nothing)
    assert pi05.count_parameters(everything) == pi05.count_parameters(model)
    with pytest.raises(ValueError, match="expert, joint, lora, everything"):
        pi05.split_model(model, "vlm")


def test_initial_model(rng):
    config = get_preset("kitchen")
    seed = int(rng.integers(2**31))
    model, again, other = (pi05.init_model(config, s) for s in (seed, seed, seed + 1))
    for a, b in zip(jax.tree.leaves(nnx.state(model)), jax.tree.leaves(nnx.state(again)), strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(model.language.embedding[...], other.language.embedding[...])
    assert not np.array_equal(model.language.layers.q.kernel[0], model.language.layers.q.kernel[1])
    assert 1e6 < pi05.count_parameters(model) < 3e6
    obs = Observation(
        images=jnp.asarray(rng.integers(0, 256, (2, 2, 64, 64, 3), dtype=np.uint8)),
        image_mask=jnp.ones((2, 2), bool),
        tokens=jnp.asarray(rng.integers(0, 512, (2, 44))),
        token_mask=jnp.ones((2, 44), bool),
    )
    tokens, mask = model.prefix_tokens(obs)
    assert tokens.shape == (2, config.prefix_length, config.language.width) and mask.shape == tokens.shape[:2]
    for kind in (tokens[:, :32], tokens[:, 32:]):  # images and prompt start on one scale
        assert 0.5 < float(jnp.std(kind)) < 2
    v = model.velocity(model.encode_prefix(obs), rng.normal(size=(2, 3, 8, 12)).astype("f"), jnp.ones((2, 3)) / 2)
    assert v.dtype == jnp.float32 and float(jnp.abs(v).max()) < 1


def test_smooth_number_embedding(rng):
    key = jax.random.key(int(rng.integers(2**31)))
    table = jnp.asarray(rng.normal(size=(512, 64)) * 0.1, jnp.float32)
    ids = jnp.asarray(rng.permutation(512)[:257])
    new = pi05.smooth_number_embedding(table, ids, key)
    rows = np.asarray(new[ids])
    assert np.sqrt(np.mean(rows**2)) == pytest.approx(float(jnp.sqrt(jnp.mean(table**2))), rel=1e-3)
    rest = np.setdiff1d(np.arange(512), ids)
    np.testing.assert_array_equal(new[rest], table[rest])
    distance = [np.linalg.norm(rows[step:] - rows[:-step], axis=1).mean() for step in (1, 8, 64)]
    assert distance[0] < 0.2 * distance[2] and distance[0] < distance[1] < distance[2]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SiglipConfig(width=30, depth=1, mlp=8, heads=4, patch=4, image_size=8), "multiple of heads"),
        (lambda: SiglipConfig(width=32, depth=1, mlp=8, heads=4, patch=3, image_size=8), "multiple of patch"),
        (lambda: GemmaConfig(width=8, depth=1, mlp=8, heads=4, kv_heads=1, head_dim=8), "depth must be at least 2"),
        (lambda: GemmaConfig(width=8, depth=2, mlp=8, heads=4, kv_heads=3, head_dim=8), "multiple of kv_heads"),
        (lambda: GemmaConfig(width=8, depth=2, mlp=8, heads=4, kv_heads=1, head_dim=7), "must be even"),
        (lambda: get_preset("tiny", dtype="float16"), "dtype must be one of float32, bfloat16; got 'float16'"),
        (lambda: get_preset("tiny", horizon=0), "horizon must be positive; got 0"),
        (lambda: get_preset("tiny", expert=PRESETS["kitchen"].expert), "must agree on depth; got 2 and 3"),
        (lambda: get_preset("small"), "unknown model preset 'small'; known: pi05, kitchen, mid, tiny"),
        (lambda: get_preset("tiny", widht=3), "unknown model setting widht"),
    ],
)
def test_wrong_sizes_are_refused_in_one_line(make, message):
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


def test_wrong_shapes_of_inputs_are_refused(case):
    model = nnx.merge(case.graphdef, case.state)
    with pytest.raises(ValueError, match=r"images must be \[batch, cameras, 28, 28, 3\]; got \(1, 2, 14, 14, 3\)"):
        model.image_tokens(jnp.zeros((1, 2, 14, 14, 3)))
    cache = PrefixCache(jnp.zeros((2, 3, 4, 1, 16)), jnp.zeros((2, 3, 4, 1, 16)), jnp.ones((3, 4), bool))
    for x, t in (((3, 6, 8), (3, 1)), ((3, 1, 6, 7), (3, 1)), ((2, 1, 6, 8), (2, 1)), ((3, 2, 6, 8), (3,))):
        with pytest.raises(ValueError, match="velocity needs"):
            model.velocity(cache, jnp.zeros(x), jnp.zeros(t))


def test_scan_layers_applies_layers_in_order(case):
    layers = nnx.merge(case.graphdef, case.state).expert.layers
    seen = scan_layers(
        layers, lambda layer, x, i: (2 * x + i, layer.q.kernel[...].sum()), jnp.float32(1), Compute(), jnp.arange(2)
    )
    assert seen[0] == 2 * (2 * 1 + 0) + 1
    np.testing.assert_allclose(seen[1], layers.q.kernel[...].sum((1, 2, 3)), rtol=1e-4)
