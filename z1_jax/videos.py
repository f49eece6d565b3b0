"""Clips of held-out episodes: the evaluation's own, a frame each control step."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from envs.base import Episode, Pool
from envs.video import write_video
from z1_jax.config.schema import Config, EvalConfig
from z1_jax.policy import Policy
from z1_jax.rl.actor import Actor, act, stack_ids
from z1_jax.run_dir import write_json
from z1_jax.suites import episode_of

Params = tuple[Any, Any]  # trained and frozen


OUTCOMES = "outcomes.json"  # in the folder of videos: of each file, whether its episode succeeded


@dataclasses.dataclass(frozen=True)
class Clip:
    """One episode."""

    frames: np.ndarray  # uint8 [N, size, size, 3], the start and one a control step
    success: bool


def record_clips(
    config: Config, policy: Policy, pool: Pool, actor: Actor, params: Params, run_dir: pathlib.Path, name: str
) -> dict[int, bool]:
    """Films the episodes of `eval.filmed` that are not there yet, as videos/NAME_seedN.webp.

    Returns:
        Seed -> whether the episode that the video shows succeeded.
    """
    paths = clip_paths(config, run_dir, name)
    missing = missing_clips(config, run_dir, name)
    if missing:
        print(f"filming {len(missing)} episode{'s' * (len(missing) > 1)} as {paths[missing[0]]}", flush=True)
        camera, size = config.env.cameras[0], config.eval.video_size
        clips = film(policy, pool, actor, params, missing, config.eval, camera, size, episode_of(config))
        for seed, clip in zip(missing, clips, strict=True):
            write_video(paths[seed], clip.frames, fps=20)
            write_json(run_dir / "videos" / OUTCOMES, {**_outcomes(run_dir), paths[seed].name: clip.success})
    known = _outcomes(run_dir)
    return {seed: known[path.name] for seed, path in paths.items()}


def clip_paths(config: Config, run_dir: pathlib.Path, name: str) -> dict[int, pathlib.Path]:
    """Where the videos of a policy lie, by seed."""
    return {seed: run_dir / "videos" / f"{name}_seed{seed}.webp" for seed in config.eval.filmed}


def missing_clips(config: Config, run_dir: pathlib.Path, name: str) -> list[int]:
    """Seeds that have yet to be filmed, or whose outcome is not known."""
    known = _outcomes(run_dir)
    return [
        seed
        for seed, path in clip_paths(config, run_dir, name).items()
        if not (path.exists() and isinstance(known.get(path.name), bool))
    ]


def _outcomes(run_dir: pathlib.Path) -> dict[str, bool]:
    with contextlib.suppress(FileNotFoundError, ValueError):  # damaged: the episodes are filmed again
        return dict(json.loads((run_dir / "videos" / OUTCOMES).read_text()))
    return {}


def clips_of(config: Config, sides: Mapping[str, tuple[str, Mapping[int, bool]]]) -> dict[str, Any]:
    """What the summary says of the clips.

    Args:
        sides: "before" and "after" -> the name that the videos were recorded under and what `record_clips` returned.
    """
    if not config.eval.filmed:
        return {}
    rows: list[dict[str, Any]] = [{"seed": seed} for seed in config.eval.filmed]
    for side, (name, outcomes) in sides.items():
        for row in rows:
            row[side] = f"videos/{name}_seed{row['seed']}.webp"
            row[f"{side}_success"] = outcomes[row["seed"]]
    count = len(rows)
    first = f"The first {count} held-out seeds in their order" if count > 1 else "The first held-out seed"
    rule = "The seeds that eval.film_seeds names" if config.eval.film_seeds else first
    return {"videos": rows, "videos_rule": f"{rule}: chosen before anything ran on them, not by what came of them."}


def film(
    policy: Policy,
    pool: Pool,
    actor: Actor,
    params: Params,
    seeds: Sequence[int],
    config: EvalConfig,
    camera: str,
    size: int,
    episode_of: Callable[[int], Episode] = Episode,
) -> list[Clip]:
    """Films the evaluation's own episodes of `seeds`, one frame a control step.

    The chunks are those of `evaluate` (same key, same ids); each is stepped one control step at a time.
    """
    if len(seeds) > pool.num_envs:  # one wave after the other
        waves = seeds[: pool.num_envs], seeds[pool.num_envs :]
        return [c for wave in waves for c in film(policy, pool, actor, params, wave, config, camera, size, episode_of)]
    slots = list(range(len(seeds)))
    observations: list[Any] = pool.reset(slots, [episode_of(seed) for seed in seeds])
    success = [False] * len(seeds)
    frames = [[frame] for frame in pool.render(slots, camera, size)]
    alive, chunk = slots, 0
    while alive:
        ids = stack_ids(np.array([seeds[i] for i in alive])[:, None], chunk, np.zeros((len(alive), 1), int))
        key, executed = (config.noise_seed,), policy.executed
        actions = act(actor, params, policy.processor, observations, ids, key, executed=executed).actions[:, 0]
        current = list(range(len(alive)))
        looks: dict[int, Any] = {}
        for h in range(policy.executed):
            results, after = pool.step([alive[i] for i in current], actions[current, h : h + 1])
            for i, frame in zip(current, pool.render([alive[i] for i in current], camera, size), strict=True):
                frames[alive[i]].append(frame)
            for i, result in zip(current, results, strict=True):
                success[alive[i]] |= bool(result.success)
            looks = {i: look for i, result, look in zip(current, results, after, strict=True) if not result.done}
            current = sorted(looks)
            if not current:
                break
        observations = [looks[i] for i in current]
        alive, chunk = [alive[i] for i in current], chunk + 1
    return [Clip(np.stack(shown), won) for shown, won in zip(frames, success, strict=True)]
