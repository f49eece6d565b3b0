"""Clips of held-out episodes: the evaluation's own, a frame each control step."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from envs.base import ChunkResult, Episode, Pool, SlotsLost
from envs.video import write_video
from z1_jax import processes
from z1_jax.config.schema import Config, EvalConfig
from z1_jax.files import writing
from z1_jax.policy import Policy
from z1_jax.rl.actor import Actor, act, stack_ids
from z1_jax.run_dir import OUTCOMES, clip_file, clip_paths, known_outcomes, missing_clips, write_json
from z1_jax.suites import resolve

Params = tuple[Any, Any]  # trained and frozen


@dataclasses.dataclass(frozen=True)
class Clip:
    """One episode."""

    frames: np.ndarray  # uint8 [N, size, size, 3], the start and one a control step
    success: bool


def record_clips(
    config: Config, policy: Policy, pool: Pool, actor: Actor, params: Params, run_dir: pathlib.Path, name: str
) -> dict[str, bool]:
    """Films the episodes of `eval.filmed` that are not there yet, as videos/NAME_seedN.webp.

    In a run of several tasks it is videos/NAME_TASK_seedN.webp, with those seeds of each.

    Of several processes the first one films, and the others decide with it.

    Returns:
        File name -> whether the episode that the video shows succeeded.
    """
    outcomes = _recorded(config, policy, pool, actor, params, run_dir, name) if processes.leads() else {}
    if processes.count() > 1:
        actor.finish(params)
    return processes.on_leader(lambda: outcomes)


def _recorded(
    config: Config, policy: Policy, pool: Pool, actor: Actor, params: Params, run_dir: pathlib.Path, name: str
) -> dict[str, bool]:
    paths = clip_paths(config, run_dir, name)
    missing = missing_clips(config, run_dir, name)
    if missing:
        print(f"filming {len(missing)} episode{'s' * (len(missing) > 1)} as {paths[missing[0]]}", flush=True)
        camera, size = config.env.cameras[0], config.eval.video_size
        episode = resolve(config).episode
        for start in range(0, len(missing), pool.num_envs):  # written wave by wave: what is filmed stays
            wave = missing[start : start + pool.num_envs]
            filmed = [episode(task, seed) for task, seed in wave]
            clips = film(policy, pool, actor, params, filmed, config.eval, camera, size)
            for key, clip in zip(wave, clips, strict=True):
                with writing(paths[key]):
                    write_video(paths[key], clip.frames, fps=20)
                write_json(run_dir / "videos" / OUTCOMES, {**known_outcomes(run_dir), paths[key].name: clip.success})
    known = known_outcomes(run_dir)
    return {path.name: known[path.name] for path in paths.values()}


def clips_of(config: Config, sides: Mapping[str, tuple[str, Mapping[str, bool]]]) -> dict[str, Any]:
    """What the summary says of the clips.

    Args:
        sides: "before" and "after" -> the name that the videos were recorded under and what `record_clips` returned.
    """
    if not config.eval.filmed:
        return {}
    several = len(config.every_task) > 1
    rows: list[dict[str, Any]] = []
    for task in config.every_task:
        for seed in config.eval.filmed:
            rows.append({**({"task": task} if several else {}), "seed": seed})
            for side, (name, outcomes) in sides.items():
                file = clip_file(config, name, task, seed)
                rows[-1] |= {side: f"videos/{file}", f"{side}_success": outcomes[file]}
    count = len(config.eval.filmed)
    first = f"The first {count} held-out seeds in their order" if count > 1 else "The first held-out seed"
    rule = "The seeds that eval.film_seeds names" if config.eval.film_seeds else first
    return {"videos": rows, "videos_rule": f"{rule}: chosen before anything ran on them, not by what came of them."}


def film(
    policy: Policy,
    pool: Pool,
    actor: Actor,
    params: Params,
    episodes: Sequence[Episode],
    config: EvalConfig,
    camera: str,
    size: int,
) -> list[Clip]:
    """Films episodes of the evaluation, one frame a control step.

    The chunks are those of `evaluate` (same key, same ids); each is stepped one control step at a time.
    """
    most = min(pool.num_envs, getattr(actor, "largest", pool.num_envs))
    if len(episodes) > most:  # one wave after the other
        waves = episodes[:most], episodes[most:]
        return [c for wave in waves for c in film(policy, pool, actor, params, wave, config, camera, size)]
    slots = list(range(len(episodes)))
    try:
        looks_at_start: Sequence[Any] = pool.reset(slots, episodes)
    except SlotsLost as error:  # what the evaluation counts as a failure is one black picture
        looks_at_start = error.answers
    success = [False] * len(episodes)
    alive = [slot for slot, look in zip(slots, looks_at_start, strict=True) if look is not None]
    observations: list[Any] = [looks_at_start[slot] for slot in alive]
    frames = [[np.zeros((size, size, 3), np.uint8)] for _ in episodes]
    for slot, frame in zip(alive, pool.render(alive, camera, size) if alive else (), strict=True):
        frames[slot] = [frame]
    chunk = 0
    while alive:
        ids = stack_ids(np.array([episodes[i].seed for i in alive])[:, None], chunk, np.zeros((len(alive), 1), int))
        key, executed = (config.noise_seed,), policy.executed
        actions = act(actor, params, policy.processor, observations, ids, key, executed=executed).actions[:, 0]
        current = list(range(len(alive)))
        looks: dict[int, Any] = {}
        for h in range(policy.executed):
            results, after = _stepped(pool, [alive[i] for i in current], actions[current, h : h + 1])
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


def _stepped(pool: Pool, slots: list[int], actions: np.ndarray) -> tuple[list[ChunkResult], list[Any]]:
    """As `pool.step`; an episode ends as a failure where its environment fails again and again."""
    try:
        return pool.step(slots, actions)
    except SlotsLost as error:
        ended = ChunkResult(steps=0, success=False, done=True), None
        answers = [answer or ended for answer in error.answers]
        return [result for result, _ in answers], [seen for _, seen in answers]
