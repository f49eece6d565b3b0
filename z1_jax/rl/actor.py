"""The jitted decision: observations → prefix cache → denoising chains. The update re-scores the very same chains."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Bool, Float, Int, Shaped

from z1_jax import distributed, processes
from z1_jax.config.schema import FlowConfig
from z1_jax.data.transforms import InputProcessor
from z1_jax.models import acting
from z1_jax.models.pi05 import cast_state
from z1_jax.policy import Policy
from z1_jax.rl import flow
from z1_jax.rl.prepared import PreparedParams
from z1_jax.sharding import batch_sharding
from z1_jax.types import Observation, PrefixCache

_IDLE = "idle"


def counted_coordinates(horizon: int, executed: int, dims: Bool[np.ndarray, " A"], coords: str) -> np.ndarray:
    """bool [H, A]: which coordinates of a chunk enter the log-probability.

    `executed`: steps h < E that the environment runs; `horizon`: all H. Either way only dimensions that are real and
    move in the demonstrations count: padding and constant dimensions have no effect.
    """
    rows = np.arange(horizon) < (executed if coords == "executed" else horizon)
    return rows[:, None] & np.asarray(dims)[None, :]


def make_actor(policy: Policy, graphdef: Any, flow: FlowConfig, mesh: jax.sharding.Mesh, largest: int) -> Actor:
    """The actor of a policy for up to `largest` observations at once, in each of the processes."""
    counted = counted_coordinates(
        policy.config.horizon, policy.executed, policy.processor.counted_dims, flow.logprob_coords
    )
    form, temperature = policy.config.acting, policy.temperature
    if processes.count() == 1:
        return Actor(graphdef, flow, counted, mesh, largest, form, temperature)
    everyone = largest * processes.count()
    row = blank(policy.processor)
    return LockstepActor(graphdef, flow, counted, mesh, everyone, form, temperature, blank=row)


class Actor:
    """Encodes and samples in padded batches of few sizes, so that a rollout compiles once per size.

    A draw depends on the key and on its sample's ids alone: not on the batch, its padding or the device count.

    Attributes:
        counted: bool [H, A], the coordinates that its log-probabilities sum over; the update scores the same.
        largest: rows of the largest padded batch.
        traces: how often each function was traced; it must stop growing.
    """

    def __init__(
        self,
        graphdef: nnx.GraphDef,
        config: FlowConfig,
        counted: np.ndarray,
        mesh: jax.sharding.Mesh,
        largest: int,
        form: str = "auto",
        temperature: float = 1.0,
    ):
        """Args: `counted` bool [H, A]; `largest`: the most observations that one call will bring; `form`: of
        the parameters that it reads, see `Compute.acting`; `temperature`: see `Policy`."""
        self._mesh = mesh
        self.counted = jnp.asarray(counted)
        self._config, self._temperature = config, np.float32(temperature)
        devices = mesh.shape["data"] * mesh.shape["fsdp"]
        sizes = {largest // 4, largest // 2, largest}
        self._sizes = sorted({-(-max(size, 1) // devices) * devices for size in sizes})
        self.largest = self._sizes[-1]
        self.traces = {"encode": 0, "sample": 0}
        self._prepared = PreparedParams(graphdef, config.steps, mesh, form)
        self._encode = jax.jit(functools.partial(self._encode_impl, graphdef))
        self._sample = jax.jit(functools.partial(self._sample_impl, graphdef))

    def encode(self, params: tuple[Any, Any], observation: Observation) -> tuple[PrefixCache, int]:
        """The prefix cache of a batch of NumPy observations, padded to a known size; and the batch's real size."""
        count = observation.tokens.shape[0]
        return self._encoded(params, observation, self._rows(count)), count

    def sample(
        self,
        params: tuple[Any, Any],
        cache: PrefixCache,
        ids: Int[np.ndarray, "B M I"],
        noise_key: tuple[int, ...],
        stochastic: bool,
        noise_level: float | None = None,
    ) -> flow.Chain:
        """Chains [n, M, …] (NumPy) for the first n rows of `cache`, M for each.

        Args:
            ids: int [n, M, I], what tells a sample from every other one that is drawn with this key.
            noise_key: non-negative numbers.
            stochastic: false: the ODE sampler; only the first noise is used.
            noise_level: default: the config's.
        """
        level = self._config.noise_level if noise_level is None else noise_level
        chain = self._sampled(params, cache, *self._drawn(ids, noise_key, stochastic), level)
        return jax.tree.map(lambda x: distributed.local_rows(x)[: ids.shape[0], : ids.shape[1]], chain)

    def finish(self, params: tuple[Any, Any]) -> None:
        """Ends a round of decisions: with several processes, waits until the others have ended theirs too."""

    def prepared(self, params: tuple[Any, Any]) -> tuple[acting.Prepared | None, acting.Prepared | None]:
        """What encoding and sampling read in place of these parameters, kept until others are given."""
        return self._prepared.prefix(params), self._prepared.expert(params)

    def trace_encode(self, params: tuple[Any, Any], observation: Observation) -> jax.stages.Traced:
        """`encode` traced for parameters and observations that may be abstract: nothing is computed."""
        return self._encode.trace(self._prepared.prefix(params), *params, observation)

    def trace_sample(
        self,
        params: tuple[Any, Any],
        cache: PrefixCache,
        noise: Float[jax.Array, "B M K+1 H A"],
        steps: Bool[jax.Array, "B M K"],
    ) -> jax.stages.Traced:
        """`sample` traced for noise [B, M, K + 1, H, A] and stochastic steps [B, M, K] that may be abstract."""
        prepared, level = self._prepared.expert(params), jax.ShapeDtypeStruct((), jnp.float32)
        return self._sample.trace(prepared, *params, cache, noise, steps, level)

    def _drawn(
        self, ids: Int[np.ndarray, "B M I"], noise_key: tuple[int, ...], stochastic: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """Noise [n, M, K + 1, H, A] and stochastic steps [n, M, K] of samples, see `sample`."""
        drawn = [self._draw((*noise_key, *map(int, sample))) for sample in ids.reshape(-1, ids.shape[-1])]
        noise = np.stack([z for z, _ in drawn]).reshape(*ids.shape[:2], *drawn[0][0].shape)
        steps = np.stack([s for _, s in drawn]).reshape(*ids.shape[:2], -1) & stochastic
        return noise, steps

    def _draw(self, key: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        """One sample's noise [K + 1, H, A] and stochastic steps [K]. Drawn on the host: XLA's CPU compiler takes
        seconds for each shape of a random generator."""
        rng = np.random.default_rng(key)
        config = self._config
        # The noise comes first: the ODE sampler starts from the same, whichever steps would draw noise.
        noise = rng.standard_normal((config.steps + 1, *self.counted.shape), np.float32)
        noise[0] *= self._temperature
        return noise, flow.stochastic_steps(rng, config.steps, config.sde_steps, config.last_step)

    def _rows(self, count: int) -> int:
        """Rows of the padded batch of `count` observations."""
        return self._size(count)

    def _encoded(self, params: tuple[Any, Any], observation: Observation, rows: int) -> PrefixCache:
        """The prefix cache of observations that are padded to so many rows."""
        padded = jax.tree.map(lambda x: pad_rows(x, rows), observation)
        return self._encode(self._prepared.prefix(params), *params, distributed.put_batch(padded, self._mesh))

    def _sampled(
        self, params: tuple[Any, Any], cache: PrefixCache, noise: np.ndarray, steps: np.ndarray, level: float
    ) -> flow.Chain:
        """Chains for the rows of `cache`, of which each process draws its own: noise [n, M, …], steps [n, M, K]."""
        rows = cache.mask.shape[0] // processes.count()
        inputs = [pad_rows(x, rows) for x in (noise, steps)]
        return self._sample(
            self._prepared.expert(params),
            *params,
            cache,
            *distributed.put_batch(inputs, self._mesh),
            distributed.put_scalar(np.float32(level), self._mesh),
        )

    def _size(self, count: int) -> int:
        for size in self._sizes:
            if count <= size:
                return size
        raise ValueError(f"{count} observations in one call, expected at most {self._sizes[-1]}")

    def _encode_impl(
        self,
        graphdef: nnx.GraphDef,
        prepared: acting.Prepared | None,
        trainable: Any,
        frozen: Any,
        observation: Observation,
    ) -> PrefixCache:
        self.traces["encode"] += 1
        model = nnx.merge(graphdef, trainable, frozen)
        if prepared is None:
            return model.encode_prefix(observation)
        return acting.encode_prefix(model.config, prepared, model.language.embedding[...], observation)

    def _sample_impl(
        self,
        graphdef: nnx.GraphDef,
        prepared: acting.Prepared | None,
        trainable: Any,
        frozen: Any,
        cache: PrefixCache,
        noise: jax.Array,
        drawn: jax.Array,
        noise_level: jax.Array,
    ) -> flow.Chain:
        self.traces["sample"] += 1
        model = nnx.merge(graphdef, trainable, frozen)
        options: Any = {"noise_level": noise_level, "reduce": self._config.logprob_reduce}
        if prepared is not None:
            step, held = acting.denoiser(model.config, prepared, cache, noise.shape[1])
            rows = prepared["modulation"]
            return flow.sample_in_steps(step, held, rows, noise, drawn, self.counted, **options)
        # Once, not in each of the K steps: a step on few chunks takes as long as reading the weights.
        model = nnx.merge(graphdef, cast_state(nnx.state(model), model.config.dtype))
        return flow.sample(lambda x, t: model.velocity(cache, x, t), noise, drawn, self.counted, **options)


def blank(processor: InputProcessor) -> Observation:
    """One row of model inputs that shows nothing."""
    cameras, length = len(processor.used_slots), processor.prompt_length
    return Observation(
        images=np.zeros((1, cameras, processor.image_size, processor.image_size, 3), np.uint8),
        image_mask=np.ones((1, cameras), bool),
        tokens=np.zeros((1, length), np.int32),
        token_mask=np.arange(length)[None] < 1,
    )


class LockstepActor(Actor):
    """An `Actor` whose calls are made by every process of a run; caches and chains hold a process's own rows.

    Every decision is a computation of all processes together, over which the parameters may be spread. They agree on
    its size before each one, and a process whose episodes are over goes on taking part, with rows that nobody looks at,
    until all are.

    Between two calls of `finish` each process may call it as often as it has decisions to make, with `encode` and
    `sample` in turn.
    """

    def __init__(self, *args: Any, blank: Observation, **options: Any):
        """Args: `blank`: one row of inputs; the others as for `Actor`, `largest` over all processes."""
        super().__init__(*args, **options)
        self._blank = blank
        self._encode = jax.jit(self._encode, out_shardings=distributed.cache_sharding(self._mesh))
        self._sample = jax.jit(self._sample, out_shardings=batch_sharding(self._mesh))

    def _rows(self, count: int) -> int:
        _, (most,) = self._agreed("encode", [count])
        return self._local_size(most)

    def _sampled(
        self, params: tuple[Any, Any], cache: PrefixCache, noise: np.ndarray, steps: np.ndarray, level: float
    ) -> flow.Chain:
        _, (most, _) = self._agreed("sample", [noise.shape[1], level])
        # Members part at other chunks in other processes: there may be more chains for an observation there.
        noise, steps = (np.pad(x, [(0, 0), (0, most - x.shape[1])] + [(0, 0)] * (x.ndim - 2)) for x in (noise, steps))
        return super()._sampled(params, cache, noise, steps, level)

    def finish(self, params: tuple[Any, Any]) -> None:
        """Takes part in the decisions of the others until none has any more to make."""
        while (agreed := self._agreed(_IDLE, []))[0] != _IDLE:
            kind, sizes = agreed
            if kind == "encode":
                cache = self._encoded(params, self._blank, self._local_size(sizes[0]))
            else:
                most, level = sizes
                noise, steps = (np.zeros((1, most, *x.shape), x.dtype) for x in self._draw((0,)))
                super()._sampled(params, cache, noise, steps, level)

    def _agreed(self, kind: str, sizes: list[Any]) -> tuple[str, list[Any]]:
        """What is computed next, and the largest of each size over the processes."""
        working = [(kind, sizes) for kind, sizes in processes.exchange([kind, sizes]) if kind != _IDLE]
        if len({kind for kind, _ in working}) > 1:
            raise RuntimeError(f"the processes are out of step: {working}")  # a bug
        if not working:
            return _IDLE, []
        return working[0][0], [max(column) for column in zip(*(sizes for _, sizes in working), strict=True)]

    def _local_size(self, rows: int) -> int:
        """Rows of each process's padded batch, where none has more than `rows`."""
        return self._size(rows * processes.count()) // processes.count()


@dataclasses.dataclass(frozen=True)
class Acted:
    """What a policy decided on n observations, M chunks for each."""

    chain: flow.Chain  # NumPy, [n, M, …]
    actions: np.ndarray  # [n, M, E, env action], for the environment
    looks: Observation  # NumPy, [n, …]
    cache: PrefixCache  # of the looks, padded


def act(
    actor: Actor,
    params: tuple[Any, Any],
    processor: InputProcessor,
    observations: Sequence[Any],
    ids: Int[np.ndarray, "B M I"],
    noise_key: tuple[int, ...],
    *,
    executed: int,
    stochastic: bool = False,
    noise_level: float | None = None,
) -> Acted:
    """From the environments' observations to their actions; the VLM runs once for each observation.

    Args:
        observations: [n], as environments give them.
        ids: int [n, M, I]; ids, noise_key, stochastic, noise_level: as for `Actor.sample`.
        executed: E, steps of each predicted chunk that the environment runs.
    """
    looks = processor.observation(observations)
    cache, _ = actor.encode(params, looks)
    chain = actor.sample(params, cache, ids, noise_key, stochastic, noise_level)
    states = np.stack([observation.state for observation in observations])[:, None]  # the same for all M chunks
    return Acted(chain, processor.env_actions(chain.x[:, :, -1, :executed], states), looks, cache)


def pad_rows(x: Shaped[np.ndarray, "n ..."], size: int) -> np.ndarray:
    """`x` with its last row repeated up to `size` rows."""
    missing = size - x.shape[0]
    return x if missing == 0 else np.concatenate([x, np.repeat(x[-1:], missing, axis=0)])


def stack_ids(*columns: Sequence[int] | np.ndarray) -> np.ndarray:
    """int [n, M, I] from I arrays that broadcast to [n, M]."""
    return np.stack(np.broadcast_arrays(*columns), axis=-1)
