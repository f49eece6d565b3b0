"""Clips of held-out episodes: the evaluation's own, a frame each control step."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from envs.pool import EnvPool
from envs.video import write_video
from z1_jax.config.schema import Config, EvalConfig
from z1_jax.evaluation import Evaluation
from z1_jax.policy import Policy
from z1_jax.rl import rollout
from z1_jax.rl.actor import Actor
from z1_jax.run_dir import StageClock


def record_clips(
    config: Config,
    policy: Policy,
    pool: EnvPool,
    actor: Actor,
    params: tuple[Any, Any],
    before: Evaluation,
    run_dir: pathlib.Path,
    name: str,
    clock: StageClock,
) -> list[int]:
    """Films the first held-out seeds, those that failed before RL first; returns them."""
    order = [*before.seeds[~before.success], *before.seeds[before.success]]
    seeds = [int(seed) for seed in order[: config.eval.videos]]
    paths = [run_dir / "videos" / f"{name}_seed{seed}.webp" for seed in seeds]
    if not seeds or all(path.exists() for path in paths):
        return seeds
    with clock.stage("videos"):
        print(f"filming {len(seeds)} episodes", flush=True)
        clips = film(policy, pool, actor, params, seeds, config.eval, config.env.cameras[0], config.eval.video_size)
        for path, clip in zip(paths, clips, strict=True):
            write_video(path, clip, fps=20)
    return seeds


def compared_clips(seeds: Sequence[int], before: Evaluation, after: Evaluation) -> list[dict[str, Any]]:
    """What the summary says of the clips of `seeds`."""
    return [
        {
            "seed": seed,
            "before": f"videos/before_seed{seed}.webp",
            "after": f"videos/after_seed{seed}.webp",
            "before_success": bool(before.success[before.seeds == seed][0]),
            "after_success": bool(after.success[after.seeds == seed][0]),
        }
        for seed in seeds
    ]


def film(
    policy: Policy,
    pool: EnvPool,
    actor: Actor,
    params: tuple[Any, Any],
    seeds: Sequence[int],
    config: EvalConfig,
    camera: str,
    size: int,
) -> list[np.ndarray]:
    """Films the evaluation's own episodes of `seeds`: uint8 [N, size, size, 3] each, one frame a control step.

    The chunks are those of `evaluate` (same key, same ids); each is stepped one control step at a time.
    """
    if len(seeds) > pool.num_envs:  # one wave after the other
        waves = seeds[: pool.num_envs], seeds[pool.num_envs :]
        return [c for wave in waves for c in film(policy, pool, actor, params, wave, config, camera, size)]
    slots = list(range(len(seeds)))
    observations: list[Any] = pool.reset(slots, list(seeds))
    frames = [[frame] for frame in pool.render(slots, camera, size)]
    alive, chunk = slots, 0
    while alive:
        cache, _ = actor.encode(params, policy.processor.observation(observations))
        ids = rollout.stack_ids(np.array([seeds[i] for i in alive])[:, None], chunk, np.zeros((len(alive), 1), int))
        chain = actor.sample(params, cache, ids, (config.noise_seed,), stochastic=False)
        actions = policy.processor.env_actions(chain.x[:, 0, -1, : policy.executed])
        current = list(range(len(alive)))
        looks: dict[int, Any] = {}
        for h in range(policy.executed):
            results, after = pool.step([alive[i] for i in current], actions[current, h : h + 1])
            for i, frame in zip(current, pool.render([alive[i] for i in current], camera, size), strict=True):
                frames[alive[i]].append(frame)
            looks = {i: look for i, result, look in zip(current, results, after, strict=True) if not result.done}
            current = sorted(looks)
            if not current:
                break
        observations = [looks[i] for i in current]
        alive, chunk = [alive[i] for i in current], chunk + 1
    return [np.stack(clip) for clip in frames]
