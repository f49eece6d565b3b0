"""Muon against singular value decompositions and optax, over every parameter of the real architecture."""

import jax
import numpy as np
import optax
import pytest
import tiny_policy as tiny
from flax import nnx

from z1_jax.config.schema import LoraConfig, SftOptimConfig
from z1_jax.models.params import Pattern
from z1_jax.optim import init_optimizer, make_muon, make_optimizer
from z1_jax.policy import named


def drawn(params, rng):
    return jax.tree.map(lambda x: np.asarray(rng.normal(size=x.shape), "f"), params)


def test_an_einsum_is_the_product_with_its_matrix(rng):
    for pattern, x_shape, shape in (
        ("...d,df->...f", (5, 3), (3, 4)),
        ("...d,ndh->...nh", (5, 3), (2, 3, 4)),
        ("...nh,nhd->...d", (5, 2, 4), (2, 4, 3)),
        ("...xyc,xycd->...d", (5, 2, 2, 3), (2, 2, 3, 6)),
    ):
        x, kernel = rng.normal(size=x_shape), rng.normal(size=shape)
        inputs, outputs = Pattern.parse(pattern).matrix(stacked=0)
        size = np.prod([shape[axis] for axis in inputs])
        matrix = kernel.transpose(*inputs, *outputs).reshape(size, -1)
        expected = np.einsum(pattern, x, kernel).reshape(5, -1)
        np.testing.assert_allclose(x.reshape(5, -1) @ matrix, expected, rtol=1e-12)
    several = Pattern.parse("...d,ckdh->c...kh")
    assert several.matrix(stacked=1) == ((3,), (2, 4)) and several.several == "c"


@pytest.mark.parametrize("adapters", [False, True])
def test_a_kernels_step_keeps_its_gradients_singular_vectors_and_evens_their_lengths(rng, adapters):
    """Newton-Schulz leaves singular values between 0.68 and 1.13; each layer and each head's sibling stands alone."""
    config = SftOptimConfig(name="muon", lr=1e-2, weight_decay=0.0, muon_rms=0.3, clip_norm=1e9)
    scope = "lora" if adapters else "everything"
    _, params, _ = tiny.policy().split(scope, LoraConfig(vlm_rank=2, expert_rank=2), 0)
    optimizer, grads = make_optimizer(config, config.lr), drawn(params, rng)
    updates, _ = jax.jit(optimizer.update)(grads, optimizer.init(params), params)
    flat, steps = dict(nnx.to_flat_state(grads)), dict(nnx.to_flat_state(updates))
    kernels = {path for path, variable in flat.items() if variable.get_metadata("matrix")}
    names = {".".join(map(str, path)) for path in kernels}
    if adapters:
        assert len(kernels) == len(flat)  # nothing else is trained
    else:
        assert {name.rpartition(".")[2] for name in names} == {"kernel", "gate_up", "down", "patch_kernel"}
    for path in kernels:
        inputs, outputs = flat[path].get_metadata("matrix")
        grad, step = np.asarray(flat[path].get_value(), "d"), -np.asarray(steps[path].get_value(), "d")
        batch = [axis for axis in range(grad.ndim) if axis not in inputs + outputs]
        fan_in, fan_out = (int(np.prod([grad.shape[axis] for axis in axes])) for axes in (inputs, outputs))
        order = (*batch, *inputs, *outputs)
        matrices = zip(*(a.transpose(order).reshape(-1, fan_in, fan_out) for a in (grad, step)), strict=True)
        for g, s in matrices:
            u, size, vt = np.linalg.svd(g, full_matrices=False)
            along = u.T @ (s / (0.3e-2 * np.sqrt(max(fan_in, fan_out)))) @ vt.T
            lengths = np.diag(along)[size > 0.02 * size[0]]
            assert 0.6 < lengths.min() and lengths.max() < 1.25, path
            np.testing.assert_allclose(along - np.diag(np.diag(along)), 0.0, atol=2e-3)


def test_embeddings_norms_and_biases_follow_adamw(rng):
    config = SftOptimConfig(name="muon", lr=1e-2, weight_decay=0.1)
    params = drawn(tiny.policy().params, rng)
    muon = make_muon(config, config.lr)
    adamw = optax.adamw(config.lr, b1=config.b1, b2=config.b2, eps=config.eps, weight_decay=0.1, nesterov=True)
    state, plain = muon.init(params), adamw.init(params)
    kernels = {".".join(map(str, path)) for path, v in nnx.to_flat_state(params) if v.get_metadata("matrix")}
    for _ in range(2):
        grads = drawn(params, rng)
        got, state = muon.update(grads, state, params)
        expected, plain = adamw.update(grads, plain, params)
        same = {name for name, step in named(got).items() if np.allclose(step, named(expected)[name], rtol=1e-5)}
        assert same == set(named(params)) - kernels
        params = optax.apply_updates(params, got)


def test_muon_keeps_one_moment_for_kernels_and_two_for_the_rest():
    mesh, params = tiny.one_device(), tiny.policy().params
    state = init_optimizer(make_muon(SftOptimConfig(name="muon"), 1e-3), params, mesh)
    count = {True: 0, False: 0}
    for _, variable in nnx.to_flat_state(params):
        count[variable.get_metadata("matrix") is not None] += variable.get_value().size
    held = sum(leaf.size for leaf in jax.tree.leaves(state) if leaf.size > 3)  # but counters and three coefficients
    assert held == count[True] + 2 * count[False]


def test_muon_rms_scales_the_steps_of_kernels_under_muon_alone(rng):
    params = drawn(tiny.policy().params, rng)
    grads = drawn(params, rng)

    def steps(name, muon_rms):
        optimizer = make_optimizer(SftOptimConfig(name=name, muon_rms=muon_rms, weight_decay=0.0), 1e-3)
        return named(optimizer.update(grads, optimizer.init(params), params)[0])

    for name in ("adamw", "muon"):
        single, double = steps(name, 0.2), steps(name, 0.4)
        for path, variable in nnx.to_flat_state(params):
            key = ".".join(map(str, path))
            factor = 2 if name == "muon" and variable.get_metadata("matrix") else 1
            np.testing.assert_allclose(double[key], factor * single[key], rtol=1e-5)
