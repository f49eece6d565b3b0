"""The evaluation before RL, where the run that RL starts from has made it: the same policy on the same episodes."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Sequence
from typing import Any

from envs.base import Episode
from z1_jax import processes
from z1_jax.config.schema import RANDOM, Config
from z1_jax.errors import UserError
from z1_jax.evaluation import check_row
from z1_jax.files import read_json, write_whole
from z1_jax.metrics import read_records
from z1_jax.policy import Policy, find_policy
from z1_jax.run_dir import SUMMARY, TAKEN_FROM, known_identities, protocol, write_json

# Of a protocol: what differs between two runs that evaluate alike. Which episodes they are is looked at row by row; the
# last three are in a summary alone.
_OF_THE_RUN = ("task", "config", "evaluation_seeds", "confidence", "allowed_to_differ", "differences", "before_from")
# Keys of a config that a protocol does not tell, and that move last digits.
_DIGITS = (("model", "attention"), ("model", "acting"), ("rollout", "overlap"))


def take_over(config: Config, policy: Policy, run_dir: pathlib.Path, episodes: Sequence[Episode]) -> bool:
    """Copies the episodes of a finished evaluation of `config.init` to where the one before RL would put them.

    Only where `init` leads to the newest policy of a finished run, which evaluated it under this run's protocol, by the
    same simulator and version of this code, and has every one of `episodes`. `env.parallel` may be another: numbers may
    then differ in last digits from those of an evaluation made here.

    Args:
        policy: that RL starts from; without parameters will do.

    Returns:
        Whether it did. Nothing is done where an evaluation has begun here.
    """
    results = run_dir / "evaluation" / "before.jsonl"
    if results.exists() or config.init in ("", RANDOM) or not processes.leads():
        return False
    try:
        source = _run_of(config.init)
        known = _rows(config, policy, source, run_dir)
        rows = [known[episode] for episode in episodes]
    except (UserError, OSError, KeyError, TypeError, ValueError, AttributeError):
        return False  # what cannot be read, or is not there, is evaluated here
    if any(row.get("lost") for row in rows):  # here they may be too large a share
        return False
    results.parent.mkdir(parents=True, exist_ok=True)
    write_json(run_dir / TAKEN_FROM, {"run": str(source)})
    write_whole(results, "".join(json.dumps(row) + "\n" for row in rows))
    print(f"evaluation before RL: the {len(rows):,} episodes that {source} has of this policy", flush=True)
    return True


def _run_of(init: str) -> pathlib.Path:
    """The run directory that a policy lies in. Raises ValueError: in none."""
    directory, _ = find_policy(init)
    if directory.parent.name != "checkpoints":
        raise ValueError(f"{directory} is not in a run directory")
    return directory.parent.parent


def _rows(config: Config, policy: Policy, source: pathlib.Path, run_dir: pathlib.Path) -> dict[Episode, dict[str, Any]]:
    """Episode -> its row, of the newest policy of a run; empty where its evaluation is not what this run's would be."""
    mine = known_identities(run_dir / "policies.json").get("init")
    theirs = known_identities(source / "evaluation" / "policies.json").get("after")
    simulators = [read_json(folder / "environments.json", list, []) for folder in (source, run_dir)]
    if not mine or mine != theirs or simulators[0] != simulators[1] or len(simulators[0]) != 1:
        return {}
    told = read_json(source / "config.json", dict, {})
    here = json.loads(json.dumps(protocol(config, policy)))
    there = read_json(source / SUMMARY, dict, {})["protocol"]
    if any(_of_task(here, task) != _of_task(there, task) for task in config.every_task):
        return {}
    if any(told[section][key] != getattr(getattr(config, section), key) for section, key in _DIGITS):
        return {}
    path = source / "evaluation" / "after.jsonl"
    rows = read_records(path)
    for number, row in enumerate(rows, 1):
        check_row(path, number, row)
    return {Episode.from_json(row): row for row in rows}


def _of_task(told: dict[str, Any], task: str) -> dict[str, Any]:
    """What a protocol says of one of its tasks, whichever others it is of."""
    common = {key: value for key, value in told.items() if key not in (*_OF_THE_RUN, "by_task")}
    return {**common, **told.get("by_task", {}).get(task, {})}
