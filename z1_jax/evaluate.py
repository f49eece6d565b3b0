"""python -m z1_jax.evaluate --config=configs/eval.py --config.checkpoint=PATH: one policy, or two, on held-out seeds.

The protocol is that of training's own evaluation. Finished waves are kept: the same command continues. `--policy=PATH`
is short for the latter, and PATH may be the address of a server: ws://HOST:PORT (docs/serving.md).
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, cast

import jax

from envs.base import Pool
from z1_jax.config.schema import Config
from z1_jax.evaluation import (
    Evaluation,
    compare,
    evaluate,
    instructions,
    rate_sentence,
    versus_sentence,
)
from z1_jax.initial_policy import given_policy
from z1_jax.opening import Run, open_run
from z1_jax.policy import Policy, find_policy
from z1_jax.process import run_main
from z1_jax.rewording import RewordedPool
from z1_jax.rl.actor import make_actor
from z1_jax.rl.rollout import largest_batch
from z1_jax.run_dir import conclude
from z1_jax.serve import remote
from z1_jax.serve.remote import ServedPolicy
from z1_jax.stages import make_pool
from z1_jax.suites import held_out, widths
from z1_jax.videos import clips_of, record_clips

POLICY = "--policy="


def main(argv: Sequence[str]) -> None:
    """Evaluates `checkpoint`, and `compare` beside it on the same seeds where it is given."""
    argv = [f"--config.checkpoint={one[len(POLICY) :]}" if one.startswith(POLICY) else one for one in argv]
    run = open_run(argv, "evaluate", ("eval",), "configs/eval.py")
    if run is None:
        return
    config = run.config
    with jax.set_mesh(run.mesh), contextlib.ExitStack() as served:
        policies = {name: opened(run, path, served) for name, path in run.policies.items()}
        with make_pool(config) as own:
            pool = cast(Pool, RewordedPool(own, config.eval.told)) if config.eval.words else own
            seen = {name: look_at(run, policy, pool, name) for name, policy in policies.items()}
            told = instructions(pool, held_out(config, 4))
    result, line = judge(config, {name: outcome for name, (outcome, _) in seen.items()})
    clips = {"before": "compare", "after": "checkpoint"}
    result |= clips_of(config, {side: (name, seen[name][1]) for side, name in clips.items() if name in seen})
    result |= {"instructions": told, "policies": dict(run.identities)}
    conclude(config, policies["checkpoint"], run.directory, run.clock, result, line, run.differing)


def opened(run: Run, path: str, served: contextlib.ExitStack) -> Policy | ServedPolicy:
    """The policy at a path or address; `served` ends its connections."""
    config = run.config
    if not remote.is_address(path):
        return given_policy(config, path, run.mesh)
    named = config.inputs.slots or config.env.cameras
    slots = [None if camera == "none" else camera for camera in named]
    policy = ServedPolicy(path, slots, widths(config), config.env.executed)
    served.callback(policy.close)
    return policy


def acting(run: Run, policy: Policy | ServedPolicy, pool: Pool) -> tuple[Any, tuple[Any, Any]]:
    """What acts for a policy, and the parameters that it acts with."""
    if isinstance(policy, ServedPolicy):
        return policy, (None, None)
    graphdef, *params = policy.split("expert")
    largest = largest_batch(pool.num_envs, 1, run.config.rollout.overlap)
    return make_actor(policy, graphdef, run.config.flow, run.mesh, largest), (params[0], params[1])


def look_at(run: Run, policy: Any, pool: Pool, name: str) -> tuple[Evaluation, dict[str, bool]]:
    """Evaluates and films one of the policies on the held-out seeds; existing results and films are kept."""
    config, mesh = run.config, run.mesh
    results = run.directory / "evaluation" / f"{name}.jsonl"
    actor, params = acting(run, policy, pool)
    title = f"evaluation of {name}"
    with run.clock.stage("evaluation"):
        outcome = evaluate(
            policy,
            pool,
            mesh,
            config.eval,
            config.flow,
            results,
            title=title,
            actor=actor,
            params=params,
            held_out=held_out(config),
            overlap=config.rollout.overlap,
        )
    with run.clock.stage("videos"):
        return outcome, record_clips(config, policy, pool, actor, params, run.directory, name)


def judge(config: Config, outcomes: dict[str, Evaluation]) -> tuple[dict[str, Any], str]:
    """What the summary says, and the sentence; `compare` is the base A, `checkpoint` is B."""
    confidence = config.eval.confidence
    after = outcomes["checkpoint"]
    name = policy_name(config.checkpoint)
    if "compare" not in outcomes:
        result: dict[str, Any] = {"after": after.summary(confidence), "labels": ["", name]}
        return result, rate_sentence(name, config.task_words, result["after"], confidence)
    other = policy_name(config.compare)
    result = {**compare(outcomes["compare"], after, confidence), "labels": [f"A: {other}", f"B: {name}"]}
    return result, versus_sentence(name, other, config.task_words, result, confidence)


def policy_name(path: str) -> str:
    """A policy in words: the run (or directory), the stage and the step."""
    if remote.is_address(path):
        return remote.label(path)
    directory, step = find_policy(path)
    run = directory.parents[1] if directory.parent.name == "checkpoints" else directory.parent
    return f"{run.name}/{directory.name}/{step}"


if __name__ == "__main__":
    run_main(main)
