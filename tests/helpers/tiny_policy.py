"""A policy of 75 thousand parameters and kitchens in which random actions often succeed: shared by several tests."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np

from envs import kitchen
from envs.base import ChunkResult, Episode
from envs.kitchen import KitchenEnv
from envs.pool import EnvPool
from z1_jax import sharding
from z1_jax.config.schema import FlowConfig
from z1_jax.data.normalize import NormStats
from z1_jax.data.tokenizer import PromptTokenizer, kitchen_instructions, train_small_tokenizer
from z1_jax.models.gemma import GemmaConfig
from z1_jax.models.pi05 import Pi05Config
from z1_jax.models.siglip import SiglipConfig
from z1_jax.policy import Policy, fresh_policy, make_processor
from z1_jax.rl.actor import Actor, make_actor

TASK = "TurnOnSinkFaucet"
CAMERA = "robot0_agentview_left"
HORIZON = 24  # control steps: three chunks
PIXELS = 28

CONFIG = Pi05Config(
    vision=SiglipConfig(width=16, depth=2, mlp=32, heads=2, patch=14, image_size=PIXELS),
    language=GemmaConfig(width=32, depth=2, mlp=32, heads=2, kv_heads=1, head_dim=16),
    expert=GemmaConfig(width=32, depth=2, mlp=32, heads=2, kv_heads=1, head_dim=16),
    vocab_size=512,
    cameras=1,
    prompt_length=48,
    action_dim=16,  # four of padding
    horizon=8,
    dtype="float32",
)


class _Reach:
    """The faucet's task, but success is a hand that has moved up or down by 15 cm: some random members get there."""

    def __init__(self, task: Any):
        self._task = task

    def __getattr__(self, name: str) -> Any:
        return getattr(self._task, name)

    def success(self, world: Any) -> bool:
        height = float(world.controller.state()[9])
        start = world.memory.setdefault("start_height", height)
        return abs(height - start) > 0.15


def make_env() -> KitchenEnv:
    """The real kitchen with an easier check, for a few chunks."""
    env = kitchen.make(TASK, cameras=(CAMERA,), image_size=PIXELS, horizon=HORIZON)
    env.task = _Reach(env.task)
    return env


class BreakingKitchen(KitchenEnv):
    """Its physics breaks down in the second chunk of odd seeds' episodes."""

    def reset(self, episode: Episode) -> None:
        super().reset(episode)
        self.world.memory["breaks"] = bool(episode.seed % 2)  # travels with snapshots

    def step_chunk(self, actions: np.ndarray) -> ChunkResult:
        if self.world.memory["breaks"] and self.steps == 8:
            self.world.data.qvel[:] = 1e12
        return super().step_chunk(actions)


def make_breaking() -> KitchenEnv:
    """As `make_env`, and breaking."""
    env = BreakingKitchen(TASK, cameras=(CAMERA,), image_size=PIXELS, horizon=HORIZON)
    env.task = _Reach(env.task)
    return env


@functools.cache
def breaking_pool(slots: int) -> EnvPool:
    """As `pool`, of breaking kitchens."""
    return EnvPool(make_breaking, slots, 0)


class FailingKitchen(KitchenEnv):
    """Some seeds' second chunk raises an error that no other try would mend."""

    failing: frozenset[int] = frozenset()

    def step_chunk(self, actions: np.ndarray) -> ChunkResult:
        if self.steps == 8 and self.world.memory["seed"] in self.failing:
            raise ValueError("no such contact")
        return super().step_chunk(actions)

    def reset(self, episode: Episode) -> None:
        super().reset(episode)
        self.world.memory["seed"] = episode.seed  # travels with snapshots


def failing_pool(slots: int, seeds: frozenset[int]) -> EnvPool:
    """As `pool`, but these seeds' episodes that come to a second chunk fail there."""

    def make() -> KitchenEnv:
        env = FailingKitchen(TASK, cameras=(CAMERA,), image_size=PIXELS, horizon=HORIZON)
        env.task, env.failing = _Reach(env.task), seeds
        return env

    return EnvPool(make, slots, 0)


@functools.cache
def pool(slots: int) -> EnvPool:
    """Environments in this process; shared, for every user resets what it uses."""
    return EnvPool(make_env, slots, 0)


@functools.cache
def one_device() -> jax.sharding.Mesh:
    return sharding.make_mesh(devices=jax.devices()[:1])


@functools.cache
def processor() -> Any:
    moving = np.arange(12) < 7  # base and its mode are held, as in the demonstrations
    stats = {
        "state": NormStats(np.zeros(16), np.ones(16), -2 * np.ones(16), 2 * np.ones(16)),
        "actions": NormStats(np.zeros(12), 0.5 * moving, -1.0 * moving, 1.0 * moving),
    }
    tokenizer = PromptTokenizer.from_bytes(
        train_small_tokenizer(kitchen_instructions(), vocab_size=CONFIG.vocab_size), CONFIG.prompt_length
    )
    return make_processor(CONFIG, tokenizer, stats, (CAMERA,))


@functools.cache
def policy(seed: int = 0) -> Policy:
    """Random parameters, on one device; nobody may consume them.

    None is zero: a fresh expert's closed gates would hide the whole prefix from every test.
    """
    fresh = fresh_policy(CONFIG, processor(), seed, one_device(), executed=8, denoising_steps=4)
    rng = np.random.default_rng(seed)
    return fresh.with_params(jax.tree.map(lambda x: x + 0.1 * rng.standard_normal(x.shape, "f"), fresh.params))


def consumable() -> Policy:
    """The same with parameters of its own, which a trainer may use up."""
    return policy().with_params(jax.tree.map(lambda x: x.copy(), policy().params))


EVERY_STEP = FlowConfig(sde_steps="all", noise_level=0.5, noise_schedule="constant")  # noise in each denoising step


@functools.cache
def acting(flow: FlowConfig | None = None) -> tuple[Actor, tuple[Any, Any]]:
    """The compiled actor of `policy()` for 16 environments, and its parameters."""
    graphdef, trainable, frozen = policy().split("expert")
    return make_actor(policy(), graphdef, flow or EVERY_STEP, one_device(), 16), (trainable, frozen)
