"""A scripted policy for `TinyEnv`: noise that depends on nothing but a draw's ids, so that chunks cost no network."""

from __future__ import annotations

from typing import Any

import numpy as np

from z1_jax.data.normalize import NormStats
from z1_jax.data.tokenizer import PromptTokenizer, train_small_tokenizer
from z1_jax.data.transforms import InputProcessor
from z1_jax.rl.flow import Chain

H, A, K = 4, 3, 2
KEY = (7,)
PROCESSOR = InputProcessor(
    tokenizer=PromptTokenizer.from_bytes(train_small_tokenizer(["hold still"]), 16),
    stats={
        "state": NormStats(np.zeros(2), np.ones(2), np.zeros(2), np.ones(2)),
        "actions": NormStats(np.zeros(A), np.ones(A), -np.ones(A), np.ones(A)),
    },
    cameras=("eye",),
    image_size=4,
    action_dim=A,
)


def scripted_chain(seed: int, chunk: int, leader: int) -> tuple[np.ndarray, np.ndarray, float]:
    rng = np.random.default_rng((*KEY, seed, chunk, leader))
    return rng.normal(size=(K + 1, H, A)).astype("f"), rng.random(K) < 0.5, float(rng.normal())


class ScriptedActor:
    """What `collect` wants of an actor; draws are those of `scripted_chain`."""

    def encode(self, params: Any, observation: Any) -> tuple[None, int]:
        return None, len(observation.tokens)

    def sample(self, params: Any, cache: None, ids: np.ndarray, noise_key: tuple[int, ...], *how: Any) -> Chain:
        assert noise_key == KEY
        drawn = [scripted_chain(*map(int, sample)) for sample in ids.reshape(-1, ids.shape[-1])]
        parts = [np.stack([np.asarray(d[i]) for d in drawn]) for i in range(3)]
        return Chain(*(p.reshape(*ids.shape[:2], *p.shape[1:]) for p in parts))
