"""The evaluation before RL, where the run that RL starts from has made it: the same policy on the same episodes."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any

from envs.base import Episode
from z1_jax import processes
from z1_jax.config.schema import FREE_KEYS, Config
from z1_jax.errors import UserError
from z1_jax.files import read_json, writing
from z1_jax.metrics import read_records
from z1_jax.run_dir import known_identities

# Keys of the environments that decide nothing about an episode. `parallel` moves last digits alone, as the size of a
# batch does.
_OF_THE_POOL = {key.partition(".")[2] for key in FREE_KEYS if key.startswith("env.")} | {"parallel"}
# Of the protocol: which episodes, and the noise that denoising starts from.
_PROTOCOL = ("first_seed", "scenes", "objects", "noise_seed")


def take_over(config: Config, run_dir: pathlib.Path, episodes: Sequence[Episode]) -> bool:
    """Copies the episodes of a finished evaluation of `config.init` to where the one before RL would put them.

    Only where `init` is a run directory whose newest policy is the one that RL starts from, evaluated by the same
    simulator under the same protocol, and every one of `episodes` is there. Numbers may differ in last digits from
    those of an evaluation made here, where `env.parallel` is another.

    Returns:
        Whether it did. Nothing is done where an evaluation has begun here.
    """
    source, results = pathlib.Path(config.init), run_dir / "evaluation" / "before.jsonl"
    if results.exists() or not processes.leads():
        return False
    try:
        rows = _rows(config, source, run_dir)
    except (UserError, OSError, KeyError, TypeError, AttributeError):  # what cannot be read is evaluated anew
        return False
    if not all(episode in rows for episode in episodes):
        return False
    results.parent.mkdir(parents=True, exist_ok=True)
    with writing(results):
        results.write_text("".join(json.dumps(rows[episode]) + "\n" for episode in episodes))
    print(f"evaluation before RL: the {len(episodes):,} episodes that {source} has of this policy", flush=True)
    return True


def _rows(config: Config, source: pathlib.Path, run_dir: pathlib.Path) -> dict[Episode, dict[str, Any]]:
    """Episode -> its row, of the newest policy of a run; empty where its evaluation is not what this run's would be."""
    mine = known_identities(run_dir / "policies.json").get("init")
    theirs = known_identities(source / "evaluation" / "policies.json").get("after")
    simulators = [read_json(folder / "environments.json", list, []) for folder in (source, run_dir)]
    told = read_json(source / "config.json", dict, {})
    if not mine or mine != theirs or simulators[0] != simulators[1] or len(simulators[0]) != 1:
        return {}
    if not told or _protocol(told) != _protocol(json.loads(json.dumps(dataclasses.asdict(config)))):
        return {}
    return {Episode.from_json(row): row for row in read_records(source / "evaluation" / "after.jsonl")}


def _protocol(config: dict[str, Any]) -> dict[str, Any]:
    """What an evaluation of a given policy depends on, of a config as JSON."""
    return {
        "env": {key: value for key, value in config["env"].items() if key not in _OF_THE_POOL},
        "eval": {key: config["eval"][key] for key in _PROTOCOL},
        "flow": {key: config["flow"][key] for key in ("steps", "temperature")},
        **{key: config[key] for key in ("model", "inputs", "rollout")},
    }
