"""How a command with a run directory begins: it checks everything before it writes anything."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from z1_jax import processes
from z1_jax.agreement import check_worlds
from z1_jax.config.command_line import parse_command_line
from z1_jax.config.schema import RANDOM, Config, ConfigError, flat
from z1_jax.extending import changed_lengths, take_forced, take_lengths
from z1_jax.files import hold
from z1_jax.initial_policy import newest_policy, trained_model
from z1_jax.metrics import MetricsWriter, SilentWriter
from z1_jax.plan.fitting import check_memory
from z1_jax.process import require_algorithm, start_jax
from z1_jax.run_dir import (
    StageClock,
    claim_directory,
    claim_policy,
    dataset_identity,
    finished_sentence,
    missing_clips,
    note_command,
    note_environments,
    policy_identity,
    revision,
)
from z1_jax.serve import remote
from z1_jax.stages import check_inputs, make_mesh
from z1_jax.suites import episode_steps, label, mujoco_version, settled

FORCE = "--force"  # a run that has begun goes on under other settings, where its checkpoints allow it


@dataclasses.dataclass(frozen=True)
class Run:
    """A run directory that is this process's own, and what its stages work with."""

    config: Config
    mesh: jax.sharding.Mesh
    directory: pathlib.Path
    clock: StageClock
    differing: Sequence[str]  # between dataset or policy and the environments, as `allow` permits
    policies: Mapping[str, str]  # the given policies by config key: one checkpoint each
    identities: Mapping[str, str]  # the same: what `policy_identity` says of each

    def writer(self) -> MetricsWriter:
        """Where the numbers of this run go."""
        if not processes.leads():
            return SilentWriter(self.directory)
        log, note = self.config.log, label(self.config)
        return MetricsWriter(
            self.directory,
            tensorboard=log.tensorboard,
            wandb_project="z1-jax" if log.wandb else None,
            config=dataclasses.asdict(self.config),
            constant={"assets": note} if note else None,
        )


def open_run(argv: Sequence[str], command: str, algorithms: Sequence[str], default: str) -> Run | None:
    """Reads the command line and takes the run directory, or prints what a finished run found.

    Args:
        command: its name, and the `algorithms` that it knows; default: its config file where none is given.

    Raises:
        UserError: a setting, or something that it names, cannot be used; nothing was written. Or the directory belongs
            to another config, to other policies, or to a process that is running.
    """
    argv = processes.join(argv)
    force = FORCE in argv[1:]
    argv = [argument for argument in argv if argument != FORCE]
    config = parse_command_line(argv, default)
    require_algorithm(config, algorithms, command)
    config = settled(config)
    if processes.count() > 1:  # else all sources would be read for nobody
        processes.require_agreement(_facts(config, force))
    start_jax()  # before a checkpoint is opened: that takes the device
    config = check_inputs(config)
    differing = processes.on_leader(lambda: check_worlds(config))
    policies = _given_policies(config)
    identities = {key: policy_identity(path) for key, path in policies.items()}
    if len(set(identities.values())) < len(identities):
        unknown = any(remote.is_address(path) and remote.is_unknown(path) for path in policies.values())
        raise ConfigError(
            "config key compare: got the same policy as checkpoint, expected another one"
            + "; servers that do not say which policy they serve count as one: name each, ws://HOST:PORT?policy=NAME"
            * unknown
        )
    claimed = {**identities, **dataset_identity(config)}
    processes.require_agreement({f"what config key {key} leads to": value for key, value in claimed.items()})
    mesh = make_mesh(config)
    if config.algorithm != "eval":
        check_memory(config, trained_model(config), mesh, episode_steps(config))
    if not processes.on_leader(lambda: _take(config, force, argv, claimed, policies)):
        return None
    directory = config.directory
    processes.require_shared(directory)
    clock = StageClock(directory / "wall_seconds.json")
    return Run(config, mesh, directory, clock, differing, policies, identities)


def _facts(config: Config, force: bool) -> dict[str, Any]:
    """What all processes of a run must have alike."""
    package = pathlib.Path(__file__).parent
    sources = sorted(path for top in (package, package.parent / "envs") for path in top.rglob("*.py"))
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:12]
    return {
        **{f"config key {key}": value for key, value in flat(config).items()},
        "the run directory": str(config.directory),
        "--force": force,
        "the code": f"{revision()}, sources {digest}",
        **{name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "numpy", "mujoco")},
    }


def _take(
    config: Config, force: bool, argv: Sequence[str], claimed: Mapping[str, str], policies: Mapping[str, str]
) -> bool:
    """Takes the run directory for this run; false where it is finished, which is then said."""
    directory = claim_directory(config, force)
    if claimed:
        claim_policy(directory, claimed)
    print(f"run directory {directory}", flush=True)
    unfilmed = config.algorithm == "eval" and any(missing_clips(config, directory, name) for name in policies)
    changes = changed_lengths(config, directory)
    if (finished := finished_sentence(directory)) and not unfilmed and not changes:
        print(f"already finished: {finished}")
        return False
    hold(directory)
    take_forced(config, directory)
    take_lengths(config, directory, changes)
    note_command(directory, [*argv, *[FORCE] * force])
    note_environments(directory, mujoco_version(config))
    return True


def _given_policies(config: Config) -> dict[str, str]:
    """The checkpoints that paths lead to now: looked up once, because a run behind one may go on."""
    if config.algorithm != "eval":  # check_inputs has looked up that of `init`
        return {"init": config.init} if config.init not in ("", RANDOM) else {}
    given = {"checkpoint": config.checkpoint, "compare": config.compare}
    return {key: newest_policy(path) for key, path in given.items() if path}
