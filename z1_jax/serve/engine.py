"""Decides for several callers at once: requests are checked and prepared one by one, and decided in batches.

Knows a policy and arrays, but neither sockets nor messages.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Bool, Float, Int

from envs.base import EnvObservation
from z1_jax import distributed
from z1_jax.config.schema import FlowConfig
from z1_jax.models.pi05 import cast_state
from z1_jax.policy import Policy
from z1_jax.rl import flow, real_time
from z1_jax.rl.actor import Actor, counted_coordinates, pad_rows
from z1_jax.sharding import make_mesh
from z1_jax.types import Observation, PrefixCache

SPAN_FACTOR = 2.0
MOST_NOISE_NUMBERS = 4  # eval.noise_seed, the episode's seed, how many chunks were decided before, the member


@dataclasses.dataclass(frozen=True)
class Request:
    """One observation, prepared for the network."""

    looks: Observation  # NumPy, one row
    state: np.ndarray  # [state_dim], raw
    noise: tuple[int, ...]  # decides the noise: MOST_NOISE_NUMBERS of them
    previous: np.ndarray | None = None  # float32 [L, A], normalised: what is left of the chunk before
    delay: int = 0  # how many of them, from the first on, will have been executed when the answer arrives


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a policy decided; `fault` says why it must not be executed."""

    actions: np.ndarray  # float32 [H, action_dim], the environment's units
    fault: str = ""


class Engine:
    """A policy on one device that decides batches of requests. It acts as in evaluations, with the ODE sampler.

    Requests with `previous` actions are guided towards them (`real_time.guided`). They share batches with the others.

    Attributes:
        policy: without its parameters: the engine holds those in the form that it computes with.
        largest: the most requests of one batch.
    """

    def __init__(
        self,
        policy: Policy,
        largest: int = 16,
        *,
        span_factor: float = SPAN_FACTOR,
        max_guidance: float = real_time.MAX_GUIDANCE,
        overwrite: bool = False,
    ):
        """Args:
        policy: its parameters on one device.
        span_factor: an answer beyond the statistics' 1 % … 99 % by more than this many of their spans is a fault.
        max_guidance: β of real-time chunking.
        overwrite: the control: the steps of the delay are overwritten instead of guided.
        """
        mesh = make_mesh(devices=jax.tree.leaves(policy.params)[0].devices())
        graphdef, *params = policy.split("expert")
        self._params = (params[0], params[1])
        self._actor = _RealTimeActor(policy, graphdef, mesh, largest, max_guidance, overwrite)
        self.policy = policy.without_params()
        self.largest = largest
        stats = policy.processor.stats["actions"]
        low, high = stats.unnormalise(np.stack([-np.ones(stats.dim), np.ones(stats.dim)]))
        reach = span_factor * np.maximum(high - low, np.finfo(np.float64).tiny)  # the factor may be infinite
        self._factor, self._low, self._high = span_factor, low - reach, high + reach
        self._moving = ~stats.constant

    @property
    def horizon(self) -> int:
        """H, steps of a chunk."""
        return self.policy.config.horizon

    @property
    def traces(self) -> dict[str, int]:
        """How often each function was compiled. The numbers do not rise after `warm_up`."""
        return dict(self._actor.traces)

    def prepare(
        self,
        observation: EnvObservation,
        noise: Sequence[int],
        previous: Float[np.ndarray, "L D"] | None = None,
        delay: int = 0,
    ) -> Request:
        """Checks one observation and makes the network's inputs of it. May be called from several threads.

        Args:
            noise: up to four numbers that decide the noise, as in `ActingPolicy.act`: eval.noise_seed, the episode's
                seed, the number of chunks decided before, the member; those left out are 0.
            previous: raw actions that are left of the chunk before, from this observation's step on, L ≤ H.
            delay: how many of them will have been executed before the answer arrives, at most L.

        Raises:
            ValueError: a camera, state, number or shape that cannot be used.
        """
        processor = self.policy.processor
        given = tuple(noise)
        if not 1 <= len(given) <= MOST_NOISE_NUMBERS or not all(0 <= number < 2**63 for number in given):
            raise ValueError(f"noise_seed is {list(given)}; expected 1 to {MOST_NOISE_NUMBERS} numbers, each 0 or more")
        looks = processor.observation([observation])
        left = None
        if previous is not None:
            left = np.asarray(previous)
            if left.ndim != 2 or not 1 <= len(left) <= self.horizon or left.shape[1] != processor.env_action_dim:
                raise ValueError(
                    f"previous_actions have shape {list(left.shape)}; expected [1 … {self.horizon}, "
                    f"{processor.env_action_dim}]: what is left of the chunk before"
                )
            if not np.isfinite(left).all():
                raise ValueError("previous_actions hold NaN or infinity; expected finite numbers")
            left = processor.model_actions(left, observation.state)
        if not 0 <= delay <= (0 if left is None else len(left)):
            limit = "without previous_actions 0" if left is None else f"0 … {len(left)}, as many as previous_actions"
            raise ValueError(f"delay is {delay}; expected {limit}")
        key = given + (0,) * (MOST_NOISE_NUMBERS - len(given))
        return Request(looks, observation.state, key, left, delay)

    def decide(self, requests: Sequence[Request]) -> list[Answer]:
        """The answers to one to `largest` requests. From one thread at a time."""
        looks = jax.tree.map(lambda *rows: np.concatenate(rows), *[request.looks for request in requests])
        ids = np.array([request.noise for request in requests])[:, None]
        with jax.default_matmul_precision("float32"):  # as in all commands; by default accelerators round the factors
            cache, _ = self._actor.encode(self._params, looks)
            if any(request.previous is not None for request in requests):
                target, weights = self._overlap(requests)
                chunks = self._actor.sample_onwards(self._params, cache, ids, target, weights)
            else:
                chunks = np.asarray(self._actor.sample(self._params, cache, ids, (), stochastic=False).x[:, 0, -1])
        states = np.stack([request.state for request in requests])
        actions = self.policy.processor.env_actions(chunks, states)
        return [Answer(*one) for one in zip(actions, map(self._fault, chunks), strict=True)]

    def warm_up(self) -> None:
        """Compiles the functions for every size of batch."""
        processor, config = self.policy.processor, self.policy.config
        size = config.vision.image_size
        images = {camera: np.zeros((size, size, 3), np.uint8) for camera in processor.cameras if camera}
        look = EnvObservation(images, processor.stats["state"].mean.astype(np.float32), "")
        onwards = np.tile(processor.stats["actions"].mean, (self.horizon, 1))
        for count in self._actor.sizes:
            self.decide([self.prepare(look, (0,))] * count)
            self.decide([self.prepare(look, (0,), onwards, 1)] * count)

    def _overlap(self, requests: Sequence[Request]) -> tuple[np.ndarray, np.ndarray]:
        """Target and weights [n, 1, H, A] of what is left of the chunks before."""
        target = np.zeros((len(requests), 1, *self._actor.counted.shape), np.float32)
        for row, request in zip(target[:, 0], requests, strict=True):
            if request.previous is not None:
                row[: len(request.previous)] = request.previous
        delays = np.array([request.delay for request in requests])
        lengths = np.array([0 if request.previous is None else len(request.previous) for request in requests])
        mask = real_time.soft_mask(self.horizon, delays, lengths)[:, None, :, None]
        return target, mask * self.policy.processor.counted_dims

    def _fault(self, chunk: np.ndarray) -> str:
        """Why a chunk [H, A] must not reach a robot; empty where it may."""
        if not np.isfinite(chunk).all():
            return "the policy's actions are not finite"
        processor = self.policy.processor
        raw = processor.stats["actions"].unnormalise(chunk[:, : processor.env_action_dim], processor.norm_mode)
        beyond = ((raw < self._low) | (raw > self._high)) & self._moving
        if not beyond.any():
            return ""
        step, dim = np.argwhere(beyond)[0]
        stats = processor.stats["actions"]
        return (
            f"the policy's action {raw[step, dim]:.4g} (step {step}, dimension {dim}) is more than {self._factor:g} "
            f"spans beyond the statistics' {stats.q01[dim]:.4g} … {stats.q99[dim]:.4g}"
        )


class _RealTimeActor(Actor):
    """An actor that can also continue the chunk before. Batches are padded to powers of two."""

    def __init__(
        self,
        policy: Policy,
        graphdef: nnx.GraphDef,
        mesh: jax.sharding.Mesh,
        largest: int,
        max_guidance: float,
        overwrite: bool,
    ):
        horizon = policy.config.horizon
        counted = counted_coordinates(horizon, horizon, policy.processor.counted_dims, "horizon")
        super().__init__(
            graphdef,
            FlowConfig(steps=policy.denoising_steps),
            counted,
            mesh,
            largest,
            policy.config.acting,
            policy.temperature,
        )
        self.sizes = self._sizes = sorted({*(1 << n for n in range((largest - 1).bit_length())), largest})
        self._max_guidance, self._overwrite = max_guidance, overwrite
        self.traces["onwards"] = 0
        self._onwards = jax.jit(functools.partial(self._onwards_impl, graphdef))

    def sample_onwards(
        self,
        params: tuple[Any, Any],
        cache: PrefixCache,
        ids: Int[np.ndarray, "B 1 I"],
        target: Float[np.ndarray, "B 1 H A"],
        weights: Float[np.ndarray, "B 1 H A"],
    ) -> np.ndarray:
        """Chunks [n, H, A] by the ODE sampler for the first n rows of `cache`, from the noise that `sample` draws."""
        noise = np.stack([self._draw(tuple(map(int, key)))[0] for key in ids[:, 0]])[:, None]
        inputs = [pad_rows(x, cache.mask.shape[0]) for x in (noise, target, weights)]
        return np.asarray(self._onwards(*params, cache, *distributed.put_batch(inputs, self._mesh)))[: len(ids), 0]

    def _onwards_impl(
        self,
        graphdef: nnx.GraphDef,
        trainable: Any,
        frozen: Any,
        cache: PrefixCache,
        noise: jax.Array,
        target: jax.Array,
        weights: jax.Array,
    ) -> jax.Array:
        self.traces["onwards"] += 1
        model = nnx.merge(graphdef, trainable, frozen)
        model = nnx.merge(graphdef, cast_state(nnx.state(model), model.config.dtype))

        def velocity(x: jax.Array, t: jax.Array) -> jax.Array:
            return model.velocity(cache, x, t)

        if self._overwrite:
            fixed: Bool[jax.Array, "B 1 H A"] = weights == 1.0  # the steps of the delay
            onwards = real_time.overwritten(velocity, noise[:, :, 0], target, fixed)
        else:
            onwards = real_time.guided(velocity, target, weights, self._max_guidance)
        drawn = jnp.zeros((*noise.shape[:2], self._config.steps), bool)
        return flow.sample(onwards, noise, drawn, self.counted, noise_level=self._config.noise_level).x[:, :, -1]
