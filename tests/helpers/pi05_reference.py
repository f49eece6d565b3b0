"""Runs the model on openpi's reference numbers and measures the largest error of every array.

Shared by tests/test_models.py and benchmarks/reference.py. The numbers come from openpi's JAX π0.5 with a tiny
configuration and random parameters, in float32 on a CPU.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from z1_jax.convert import openpi_names
from z1_jax.models import pi05
from z1_jax.models.gemma import prefix_positions
from z1_jax.models.layers import rope_tables, rotate, time_embedding
from z1_jax.models.presets import get_preset
from z1_jax.types import Observation

FOLDER = Path(__file__).parents[1] / "reference"
CAMERAS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
TOLERANCE = 1e-5
LEARNING_RATE = 1e-3  # of the reference's one AdamW step


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One array against the reference; `scale` is what the error is measured by."""

    name: str
    error: float  # max |difference| / scale
    scale: float

    @property
    def ok(self) -> bool:
        return self.error <= TOLERANCE


def load(name: str) -> dict[str, np.ndarray]:
    with np.load(FOLDER / name) as file:
        return {key: file[key] for key in file.files}


def section(arrays: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {key[len(prefix) :]: value for key, value in arrays.items() if key.startswith(prefix)}


@dataclasses.dataclass
class Case:
    """The reference's model, inputs and expected outputs."""

    config: pi05.Pi05Config
    graphdef: nnx.GraphDef
    state: nnx.State
    obs: Observation
    inputs: dict[str, np.ndarray]
    expected: dict[str, np.ndarray]
    grads: dict[str, np.ndarray]
    after_step: dict[str, np.ndarray]


def load_case(**overrides: object) -> Case:
    """The reference case; overrides change the model's configuration (dtype, attention, remat)."""
    forward, backward = load("tiny_pi05.npz"), load("tiny_pi05_grads.npz")
    config = get_preset("tiny", **overrides)
    inputs = section(forward, "inputs/")
    obs = Observation(
        images=jnp.stack([inputs[f"images/{camera}"] for camera in CAMERAS], axis=1),
        image_mask=jnp.stack([inputs[f"image_masks/{camera}"] for camera in CAMERAS], axis=1),
        tokens=jnp.asarray(inputs["tokenized_prompt"]),
        token_mask=jnp.asarray(inputs["tokenized_prompt_mask"]),
    )
    return Case(
        config=config,
        graphdef=nnx.split(pi05.abstract_model(config))[0],
        state=jax.tree.map(jnp.asarray, openpi_names.from_openpi(section(forward, "params/"), config)),
        obs=obs,
        inputs=inputs,
        expected=section(forward, "outputs/"),
        grads=section(backward, "grads/"),
        after_step=section(backward, "params_after_adamw_step/"),
    )


def intermediates(case: Case, state: nnx.State, obs: Observation) -> dict[str, jax.Array]:
    """What the model computes before the first velocity, under the reference's names. Call inside jit."""
    model = nnx.merge(case.graphdef, state)
    tokens, mask = model.prefix_tokens(obs)
    out = {"prefix_tokens": tokens, "prefix_mask": mask}
    out["adarms_cond"] = model.expert.condition(jnp.asarray(case.inputs["time"])[:, None])[:, 0]
    out["suffix_tokens"] = model.expert.action_in(jnp.asarray(case.expected["x_t"]))
    for i, camera in enumerate(CAMERAS):
        out[f"siglip_with_posemb/{camera}"] = model.vision.embed_patches(obs.images[:, i])
        out[f"siglip_encoded/{camera}"] = model.vision.encode(obs.images[:, i])
        out[f"siglip_tokens/{camera}"] = model.image_tokens(obs.images)[:, i]
    return out


def loss(case: Case, state: nnx.State, obs: Observation) -> tuple[jax.Array, dict[str, jax.Array]]:
    """openpi's flow-matching loss at the reference's noise and time, and what it passed through. Call inside jit."""
    model = nnx.merge(case.graphdef, state)
    actions, noise, t = (jnp.asarray(case.inputs[name]) for name in ("actions", "noise", "time"))
    x_t = t[:, None, None] * noise + (1 - t[:, None, None]) * actions
    cache = model.encode_prefix(obs)
    v_t = model.velocity(cache, x_t[:, None], t[:, None])[:, 0]
    per_step = jnp.mean(jnp.square(noise - actions - v_t), axis=-1)
    mean = jnp.mean(per_step)
    aux = {"x_t": x_t, "u_t": noise - actions, "v_t_joint": v_t, "v_t_cached": v_t, "loss": per_step, "mean_loss": mean}
    return mean, aux | {"kv_cache_k": cache.k, "kv_cache_v": cache.v, "cache_mask": cache.mask}


def euler(case: Case, state: nnx.State, obs: Observation, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """The ODE trajectory from the reference's sampling noise: x [steps + 1, B, H, A] and v [steps, B, H, A]."""
    encode = jax.jit(lambda state, obs: nnx.merge(case.graphdef, state).encode_prefix(obs))
    velocity = jax.jit(lambda state, cache, x, t: nnx.merge(case.graphdef, state).velocity(cache, x[:, None], t)[:, 0])
    cache, x, t = encode(state, obs), jnp.asarray(case.inputs["sample_noise"]), jnp.float32(1.0)
    xs, vs = [x], []
    for _ in range(steps):
        v = velocity(state, cache, x, jnp.full((x.shape[0], 1), t))
        x, t = x - v / steps, t - jnp.float32(1 / steps)
        xs.append(x)
        vs.append(v)
    return np.stack(xs), np.stack(vs)


def compare(name: str, got: np.ndarray, expected: np.ndarray, scale: float | None = None) -> Comparison:
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    if got.shape != expected.shape:
        raise ValueError(f"{name}: shape {got.shape}, expected {expected.shape}")
    scale = float(np.abs(expected).max()) if scale is None else scale
    return Comparison(name, float(np.abs(got - expected).max()) / (scale or 1.0), scale)


def forward_comparisons(case: Case, aux: dict[str, jax.Array]) -> Iterator[Comparison]:
    outputs = jax.jit(lambda state, obs: intermediates(case, state, obs))(case.state, case.obs)
    valid = case.expected["prefix_mask"]
    for name, value in {**outputs, **aux}.items():
        if name.startswith("kv_cache"):  # what masked tokens leave in the cache is never read
            yield compare(name, np.asarray(value)[:, valid], case.expected[name][:, valid])
        elif name != "cache_mask":
            yield compare(name, value, case.expected[name])
    positions = prefix_positions(jnp.asarray(valid))
    yield compare("positions (prefix)", positions, case.expected["positions"][:, : valid.shape[1]])
    for steps in (10, 4):
        xs, vs = euler(case, case.state, case.obs, steps)
        yield compare(f"traj_{steps}_x", xs, case.expected[f"traj_{steps}_x"])
        yield compare(f"traj_{steps}_v", vs, case.expected[f"traj_{steps}_v"])
        yield compare(f"sampled_actions_{steps}", xs[-1], case.expected[f"sampled_actions_{steps}"])


def piece_comparisons() -> Iterator[Comparison]:
    misc = load("misc.npz")
    x, at = misc["rope/x"], misc["rope/positions"]
    yield compare("time_embedding", time_embedding(misc["posemb_sincos/t"], 1024), misc["posemb_sincos/out_1024"])
    yield compare("rope", rotate(x, rope_tables(at, x.shape[-1], int(at.max()) + 1)), misc["rope/out"])


def gradient_comparisons(case: Case, grads: nnx.State) -> Iterator[Comparison]:
    """The L2 error of each gradient by the global norm."""
    norm = float(case.expected["grad_global_norm"])
    ours = openpi_names.to_openpi(grads)
    for name, expected in case.grads.items():
        yield Comparison(f"grads/{name}", float(np.linalg.norm(ours[name] - expected)) / norm, norm)
    total = np.sqrt(sum(np.sum(np.square(g, dtype=np.float64)) for g in ours.values()))
    yield compare("grad_global_norm", total, case.expected["grad_global_norm"])


def adamw_comparisons(case: Case, grads: nnx.State) -> Iterator[Comparison]:
    """Parameters after one step of clip(1.0) and AdamW from our own gradients.

    Adam's first step is lr·g/(|g| + 1e-8): where the gradient is rounding noise so is the step, and those entries
    (below 1e-5 of the array's largest gradient, or 1e-7 in all) are left out.
    """
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(LEARNING_RATE, b1=0.9, b2=0.95, eps=1e-8, weight_decay=1e-10)
    )

    @jax.jit
    def step(state: nnx.State, grads: nnx.State) -> nnx.State:
        updates, _ = optimizer.update(grads, optimizer.init(state), state)
        return optax.apply_updates(state, updates)

    after = openpi_names.to_openpi(step(case.state, grads))
    for name, expected in case.after_step.items():
        gradient = np.abs(case.grads[name])
        clear = gradient >= max(1e-7, 1e-5 * gradient.max())
        if gradient.max() == 0:
            clear = np.ones_like(clear)  # a zero gradient is exact: only weight decay acts
        if clear.any():
            scale = float(np.abs(expected).max())
            yield compare(f"adamw/{name}", after[name][clear], expected[clear], scale)


def all_comparisons(case: Case) -> list[Comparison]:
    """Every comparison, from one forward and backward pass."""
    value_and_grad = jax.jit(jax.value_and_grad(lambda state, obs: loss(case, state, obs), has_aux=True))
    (_, aux), grads = value_and_grad(case.state, case.obs)
    return [
        *piece_comparisons(),
        *forward_comparisons(case, aux),
        *gradient_comparisons(case, grads),
        *adamw_comparisons(case, grads),
    ]
