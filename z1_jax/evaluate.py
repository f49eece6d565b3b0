"""python -m z1_jax.evaluate --config=configs/eval.py --config.checkpoint=PATH: one policy, or two, on held-out seeds.

The protocol is that of training's own evaluation. Finished waves are kept: the same command continues.
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

import jax

from envs.pool import EnvPool
from z1_jax.agreement import check_worlds
from z1_jax.config.command_line import parse_command_line
from z1_jax.config.schema import Config, ConfigError
from z1_jax.evaluation import Evaluation, compare, evaluate, rate_sentence, versus_sentence
from z1_jax.files import hold
from z1_jax.initial_policy import given_policy, newest_policy
from z1_jax.policy import Policy, find_policy
from z1_jax.process import require_algorithm, run_main, start_jax
from z1_jax.run_dir import StageClock, claim_directory, claim_policy, conclude, finished_sentence, policy_identity
from z1_jax.stages import check_inputs, make_mesh, make_pool
from z1_jax.suites import pin_version


def main(argv: Sequence[str]) -> None:
    """Evaluates `checkpoint`, and `compare` beside it on the same seeds where it is given."""
    config = parse_command_line(argv)
    require_algorithm(config, ("eval",), "evaluate")
    config = pin_version(config)
    start_jax()  # before a checkpoint is opened: that takes the device
    config = check_inputs(config)
    differing = check_worlds(config)
    given = {"checkpoint": config.checkpoint, "compare": config.compare}
    paths = {name: newest_policy(path) for name, path in given.items() if path}  # once: the run behind it may go on
    identities = {name: policy_identity(path) for name, path in paths.items()}
    if len(set(identities.values())) < len(identities):
        raise ConfigError("config key compare: got the same policy as checkpoint, expected another one")
    mesh = make_mesh(config)
    run_dir = claim_directory(config)
    claim_policy(run_dir, identities)
    print(f"run directory {run_dir}", flush=True)
    if finished := finished_sentence(run_dir):
        print(f"already finished: {finished}")
        return
    hold(run_dir)
    clock = StageClock(run_dir / "wall_seconds.json")
    with jax.set_mesh(mesh):
        policies = {name: given_policy(config, paths[name], mesh) for name in identities}
        with make_pool(config) as pool, clock.stage("evaluation"):
            outcomes = {name: measure(config, policy, pool, mesh, run_dir, name) for name, policy in policies.items()}
    result, line = judge(config, outcomes)
    conclude(config, policies["checkpoint"], run_dir, clock, {**result, "policies": identities}, line, differing)


def measure(
    config: Config, policy: Policy, pool: EnvPool, mesh: jax.sharding.Mesh, run_dir: pathlib.Path, name: str
) -> Evaluation:
    """Runs the held-out seeds with one of the policies."""
    results = run_dir / "evaluation" / f"{name}.jsonl"
    return evaluate(policy, pool, mesh, config.eval, config.flow, results, title=f"evaluation of {name}")


def judge(config: Config, outcomes: dict[str, Evaluation]) -> tuple[dict[str, Any], str]:
    """What the summary says, and the sentence; `compare` stands before `checkpoint`."""
    confidence = config.eval.confidence
    after = outcomes["checkpoint"]
    name = policy_name(config.checkpoint)
    if "compare" not in outcomes:
        result: dict[str, Any] = {"after": after.summary(confidence), "labels": ["", name]}
        return result, rate_sentence(name, config.task, result["after"], confidence)
    other = policy_name(config.compare)
    result = {**compare(outcomes["compare"], after, confidence), "labels": [other, name]}
    return result, versus_sentence(name, other, config.task, result, confidence)


def policy_name(path: str) -> str:
    """A policy in words: the run (or directory), the stage and the step."""
    directory, step = find_policy(path)
    run = directory.parents[1] if directory.parent.name == "checkpoints" else directory.parent
    return f"{run.name}/{directory.name}/{step}"


if __name__ == "__main__":
    run_main(main)
