"""Building blocks of the model: parameters, projections, norms, MLPs, rotary and time embeddings.

Parameters of a stack of layers carry a leading "layers" axis and are applied one layer at a time by `scan_layers`.
Norms, rotary and time embeddings compute in float32 whatever the compute dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from z1_jax.models import accumulate
from z1_jax.models.compute import Compute
from z1_jax.models.lora import Adapter
from z1_jax.models.params import ONES, ZEROS, Init, param
from z1_jax.sharding import constrain, on_one_device

NORM_EPS = 1e-6
ROPE_BASE = 10_000.0
TIME_MIN_PERIOD, TIME_MAX_PERIOD = 4e-3, 4.0

REMAT_POLICIES: dict[str, Any] = {
    "none": None,  # keep every activation
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # keep the products with weights
    "full": jax.checkpoint_policies.nothing_saveable,  # keep each layer's input only
}


def _flatten_tokens(x: Array, kept: int) -> Array:
    """On a single device, `x` with all but its last `kept` dimensions merged; on several devices, `x` unchanged.

    XLA's CPU backend computes a weight gradient that sums over two dimensions several times slower than one that
    sums over a merged one. Across devices the batch is sharded, so its dimension must stay apart.
    """
    return x.reshape(-1, *x.shape[x.ndim - kept :]) if on_one_device() else x


class Einsum(nnx.Module):
    """A linear map written as an einsum of the input and one kernel, with an optional bias on the last dimensions."""

    def __init__(
        self,
        pattern: str,
        shape: tuple[int, ...],
        axes: tuple[str | None, ...],
        init: Init,
        *,
        bias: tuple[tuple[int, ...], tuple[str | None, ...]] | None = None,  # its shape and logical axes
        layers: int | None = None,
        keep_float32: bool = False,
    ):
        self.pattern = pattern
        self.kernel = param(shape, axes, init, layers=layers, keep_float32=keep_float32, pattern=pattern)
        if bias is None:
            self.bias = None
        else:
            self.bias = param(*bias, ZEROS, layers=layers, keep_float32=keep_float32)
        self.kernel_lora: Adapter | None = nnx.data(None)

    def adapt(self, rank: int, alpha: float) -> None:
        """Adds a low-rank adapter to the kernel, declared but not filled."""
        self.kernel_lora = Adapter(self.pattern, self.kernel, rank, alpha)

    def __call__(self, x: Float[Array, "..."]) -> Array:
        """Applies the map in the dtype of `x`."""
        kept = self.pattern.index(",") - len("...")  # dimensions of the input that are not tokens
        at = self.pattern.split("->")[1].index("...")  # where the tokens stand in the output
        flat = _flatten_tokens(x, kept)
        y = jnp.einsum(self.pattern, flat, self.kernel[...].astype(x.dtype))
        if self.kernel_lora is not None:
            y = y + self.kernel_lora(flat)
        if self.bias is not None:
            y = y + self.bias[...].astype(x.dtype)
        return y.reshape(*y.shape[:at], *x.shape[: x.ndim - kept], *y.shape[at + flat.ndim - kept :])


def dense(
    inputs: int,
    outputs: int,
    axes: tuple[str | None, str | None],
    *,
    init: Init | None = None,
    layers: int | None = None,
    keep_float32: bool = False,
) -> Einsum:
    """A plain linear layer with bias, initialised by 1/sqrt(inputs) unless `init` says otherwise."""
    init = init or Init(inputs**-0.5)
    bias = ((outputs,), (axes[1] if axes[1] != "embed" else None,))
    return Einsum("...d,df->...f", (inputs, outputs), axes, init, bias=bias, layers=layers, keep_float32=keep_float32)


def rms_normalise(x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    """`x` divided by its root mean square, in float32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + NORM_EPS)


class RMSNorm(nnx.Module):
    """Root-mean-square norm; the stored weight is an offset from 1."""

    def __init__(self, width: int, *, layers: int | None = None):
        self.scale = param((width,), (None,), ZEROS, layers=layers, keep_float32=True)

    def __call__(self, x: Float[Array, "... D"], condition: None = None) -> tuple[Float[Array, "... D"], None]:
        """Normalised `x` in its dtype, and no gate."""
        y = rms_normalise(x) * (1 + self.scale[...].astype(jnp.float32))
        return y.astype(x.dtype), None


class AdaRMSNorm(nnx.Module):
    """RMS norm whose scale, shift and residual gate come from a condition (the flow time).

    Initialised to zero: a fresh network starts with every residual branch closed.
    """

    def __init__(self, width: int, *, layers: int | None = None):
        self.modulation = dense(width, 3 * width, ("embed", None), init=ZEROS, layers=layers)

    def __call__(
        self, x: Float[Array, "B M H D"], condition: Float[Array, "B M D"]
    ) -> tuple[Float[Array, "B M H D"], Float[Array, "B M 1 D"]]:
        """Modulated `x` in its dtype, and the gate of the residual branch that follows."""
        modulation = constrain(self.modulation(condition.astype(x.dtype)), "batch")
        scale, shift, gate = jnp.split(modulation[:, :, None, :], 3, axis=-1)
        y = rms_normalise(x) * (1 + scale.astype(jnp.float32)) + shift.astype(jnp.float32)
        return y.astype(x.dtype), gate


def layer_normalise(x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    """`x` minus its mean, divided by its standard deviation, in float32."""
    y = x.astype(jnp.float32)
    y = y - jnp.mean(y, axis=-1, keepdims=True)
    return y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + NORM_EPS)


class LayerNorm(nnx.Module):
    """Layer norm with scale and bias."""

    def __init__(self, width: int, *, layers: int | None = None):
        self.scale = param((width,), (None,), ONES, layers=layers, keep_float32=True)
        self.bias = param((width,), (None,), ZEROS, layers=layers, keep_float32=True)

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        y = layer_normalise(x)
        return (y * self.scale[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)).astype(x.dtype)


class Mlp(nnx.Module):
    """The vision tower's two-layer MLP with a tanh-approximated GELU."""

    def __init__(self, width: int, hidden: int, *, layers: int | None = None):
        self.up = dense(width, hidden, ("embed", "mlp"), layers=layers)
        self.down = dense(hidden, width, ("mlp", "embed"), layers=layers)

    def adapt(self, rank: int, alpha: float) -> None:
        """Adds low-rank adapters to both kernels."""
        self.up.adapt(rank, alpha)
        self.down.adapt(rank, alpha)

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        return self.down(jax.nn.gelu(self.up(x), approximate=True))


class GatedMlp(nnx.Module):
    """Gemma's MLP: down(gelu(gate(x)) * up(x)); gate and up are stored in one array."""

    _GATE_UP, _DOWN = "...d,cdf->c...f", "...f,fd->...d"

    def __init__(self, width: int, hidden: int, *, layers: int | None = None):
        by_width, by_hidden = Init(width**-0.5), Init(hidden**-0.5)
        self.gate_up = param((2, width, hidden), (None, "embed", "mlp"), by_width, layers=layers, pattern=self._GATE_UP)
        self.down = param((hidden, width), ("mlp", "embed"), by_hidden, layers=layers, pattern=self._DOWN)
        self.gate_up_lora: Adapter | None = nnx.data(None)
        self.down_lora: Adapter | None = nnx.data(None)

    def adapt(self, rank: int, alpha: float) -> None:
        """Adds low-rank adapters to gate, up and down."""
        self.gate_up_lora = Adapter(self._GATE_UP, self.gate_up, rank, alpha)
        self.down_lora = Adapter(self._DOWN, self.down, rank, alpha)

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        gate_up, flat = self.gate_up[...].astype(x.dtype), _flatten_tokens(x, 1)
        gate, up = flat @ gate_up[0], flat @ gate_up[1]
        if self.gate_up_lora is not None:
            gate_change, up_change = self.gate_up_lora(flat)
            gate, up = gate + gate_change, up + up_change
        hidden = jax.nn.gelu(gate, approximate=True) * up
        y = hidden @ self.down[...].astype(x.dtype)
        if self.down_lora is not None:
            y = y + self.down_lora(hidden)
        return y.reshape(x.shape)


def rope_tables(
    positions: Int[Array, "... T"], width: int, longest: int
) -> tuple[Float[Array, "... T 1 D/2"], Float[Array, "... T 1 D/2"]]:
    """Sines and cosines of the positions, for `rotate`.

    They are looked up in a table of all positions below `longest`; others are taken to be the nearest of these.
    Computed from the positions, they would be fused into what reads them, and XLA's CPU compiler would compute them
    for every head, layer and reader anew.
    """
    half = width // 2
    timescale = ROPE_BASE ** ((2.0 / width) * jnp.arange(half, dtype=jnp.float32))
    radians = jnp.arange(longest, dtype=jnp.float32)[:, None] / timescale
    sin, cos = (jnp.take(table, positions, axis=0, mode="clip") for table in (jnp.sin(radians), jnp.cos(radians)))
    return sin[..., None, :], cos[..., None, :]


def rotate(x: Float[Array, "... T N D"], tables: tuple[Float[Array, "..."], ...]) -> Float[Array, "... T N D"]:
    """Rotary position embedding over split halves, computed in float32, returned in the dtype of `x`.

    `tables` are those of `rope_tables`.
    """
    sin, cos = tables
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def time_embedding(t: Float[Array, "..."], width: int) -> Float[Array, "... W"]:
    """Sines, then cosines of the flow time at `width / 2` geometric periods from 4e-3 to 4."""
    fraction = jnp.linspace(0.0, 1.0, width // 2, dtype=jnp.float32)
    period = TIME_MIN_PERIOD * (TIME_MAX_PERIOD / TIME_MIN_PERIOD) ** fraction
    phase = t.astype(jnp.float32)[..., None] * (1.0 / period * 2 * math.pi)
    return jnp.concatenate([jnp.sin(phase), jnp.cos(phase)], axis=-1)


def scan_layers(
    stack: nnx.Module,
    step: Callable[[Any, Float[Array, "B ..."], Any], tuple[Float[Array, "B ..."], Any]],
    x: Float[Array, "B ..."],
    compute: Compute,
    inputs: Any = None,
) -> tuple[Array, Any]:
    """Applies `step(layer, x, input) -> (x, output)` for each layer of a stack, by one `jax.lax.scan`.

    `stack` is a module whose parameters have a leading "layers" axis; `layer` is the same module without it.
    `inputs` and the returned outputs are stacked over layers. `compute.remat` names a policy of
    REMAT_POLICIES; `compute.unroll` writes the layers out instead of looping. Parameters whose gradient is added to a
    sum pass through the loop (see accumulate).
    """
    graphdef, summed, state = nnx.split(stack, accumulate.is_summed, ...)  # type: ignore[misc]

    def apply(x: Array, parameters: tuple[nnx.State, nnx.State], layer_input: Any) -> tuple[Array, Any]:
        return step(nnx.merge(graphdef, *parameters), x, layer_input)

    if compute.remat != "none":
        apply = jax.checkpoint(apply, policy=REMAT_POLICIES[compute.remat], prevent_cse=False)

    def body(carry: tuple[Array, nnx.State], slices: tuple[Any, ...]) -> tuple[tuple[Array, nnx.State], Any]:
        (x, passing), (layer, index, layer_state, layer_input) = carry, slices
        if index is not None:
            layer, passing = accumulate.tie(layer, passing, index)
        x, output = apply(x, (layer, layer_state), layer_input)
        return (x, passing), output

    leaves = jax.tree.leaves(summed)
    index = jnp.arange(len(leaves[0])) if leaves else None
    slices = jax.lax.stop_gradient(summed), index, state, inputs
    (x, passed), outputs = jax.lax.scan(body, (x, summed), slices, unroll=compute.unroll)
    if leaves:
        nnx.update(stack, passed)
    return x, outputs
