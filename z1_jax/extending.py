"""A run whose config is changed: its length, or by force what else its checkpoints allow.

Schedules follow a new length from the newest checkpoint on. What was concluded at the old one is kept aside and made
anew. What is forced is recorded, and said wherever the run's result is.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import pathlib
from typing import Any

from z1_jax.config.schema import FORCIBLE, Config, ConfigError, among, build, flat, lengths
from z1_jax.files import read_json
from z1_jax.policy import policy_steps
from z1_jax.run_dir import FORCED, SUMMARY, differing, write_json

LENGTHS = "lengths.json"  # in a run directory: every change of its length
_CONCLUSIONS = (SUMMARY, "report.html", "evaluation/after.jsonl", "videos/after_*")
_FOLLOWS = {"sft.steps": "the learning rate follows", "train.iterations": "learning rate, noise and prefixes follow"}
_STAGES = {"sft.steps": "sft", "train.iterations": "grpo"}


@dataclasses.dataclass(frozen=True)
class Change:
    """One key of a run that is given another length."""

    key: str
    was: int
    wanted: int
    done: int  # by the newest checkpoint


def changed_lengths(config: Config, run_dir: pathlib.Path) -> list[Change]:
    """The lengths in which a config differs from that of the run directory that it has claimed.

    Raises:
        ConfigError: less is asked for than is done, or more of a stage that a later one stands on.
    """
    theirs = flat(build(Config, json.loads((run_dir / "config.json").read_text())))
    wanted, changes = flat(config), []
    for key in lengths(config):
        if wanted[key] == theirs[key]:
            continue
        steps = policy_steps(run_dir / "checkpoints" / _STAGES[key])
        change = Change(key, theirs[key], wanted[key], steps[-1] if steps else 0)
        if change.wanted < change.done:
            raise ConfigError(
                f"config key {key}: got {change.wanted}, but {run_dir} has done {change.done}; expected at least that, "
                "or choose another --config.run_dir"
            )
        begun = policy_steps(run_dir / "checkpoints" / "grpo") or (run_dir / "evaluation" / "before.jsonl").exists()
        if key == "sft.steps" and config.algorithm == "grpo" and begun:
            raise ConfigError(
                f"config key sft.steps: got {change.wanted}, but RL in {run_dir} started from the policy after "
                f"{change.was}; choose another --config.run_dir"
            )
        changes.append(change)
    return changes


def take_lengths(config: Config, run_dir: pathlib.Path, changes: list[Change]) -> None:
    """Makes the config's lengths those of the run directory, and moves what was concluded aside.

    A kill in between leaves a run that either command can go on with.
    """
    if not changes:
        return
    for change in changes:
        print(
            f"{change.key}: {change.was} → {change.wanted}; the run continues from {change.done}, where "
            f"{_FOLLOWS[change.key]} the new length: it will differ from a run of {change.wanted} from the start"
        )
    aside = _move_conclusions(run_dir, max(change.done for change in changes))
    if aside:
        print(f"the earlier results are kept in {aside}", flush=True)
    write_json(run_dir / LENGTHS, [*known_changes(run_dir), *map(dataclasses.asdict, changes)])
    write_json(run_dir / "config.json", dataclasses.asdict(config))


def take_forced(config: Config, run_dir: pathlib.Path) -> None:
    """Makes a config that was claimed by force that of the run directory, and records what has changed."""
    theirs = build(Config, json.loads((run_dir / "config.json").read_text()))
    changes = {key: both for key, both in differing(theirs, config).items() if among(key, FORCIBLE)}
    if not changes:
        return
    done = {stage: steps[-1] for stage in ("sft", "grpo") if (steps := policy_steps(run_dir / "checkpoints" / stage))}
    shown = ", ".join(f"{key} {was} → {now}" for key, (was, now) in changes.items())
    print(f"changed by force, recorded in {run_dir / FORCED}: {shown}", flush=True)
    rows = [{"key": key, "was": was, "now": now, "done": done} for key, (was, now) in changes.items()]
    write_json(run_dir / FORCED, [*read_json(run_dir / FORCED, list, []), *rows])
    write_json(run_dir / "config.json", dataclasses.asdict(config))


def known_changes(run_dir: pathlib.Path) -> list[dict[str, Any]]:
    """Every change of a run's length so far: "key", "was", "wanted", "done"."""
    return read_json(run_dir / LENGTHS, list, [])


def _move_conclusions(run_dir: pathlib.Path, done: int) -> pathlib.Path | None:
    found = [path for pattern in _CONCLUSIONS for path in sorted(run_dir.glob(pattern))]
    if not found:
        return None
    names = (f"until-{done}{'' if n == 1 else f'-{n}'}" for n in itertools.count(1))
    aside = next(folder for folder in map(run_dir.joinpath, names) if not (folder / SUMMARY).exists())
    for path in found:
        place = aside / path.relative_to(run_dir)
        place.parent.mkdir(parents=True, exist_ok=True)
        path.rename(place)
    return aside
