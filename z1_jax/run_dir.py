"""A run directory: the config that it belongs to, its times, and its summary.

Mains compose this with the stages.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
import json
import os
import pathlib
import shlex
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax

import envs
from z1_jax import __version__, processes, suites
from z1_jax.checkpoint import Checkpoints
from z1_jax.config.schema import (
    FORCIBLE,
    RANDOM,
    Config,
    ConfigError,
    among,
    build,
    fingerprint,
    flat,
    lengths,
)
from z1_jax.config.schema import identity as config_identity
from z1_jax.data.dataset import open_dataset
from z1_jax.errors import UserError
from z1_jax.evaluation import task_lines
from z1_jax.files import absolute, partial_path, read_json, require_plain, write_whole, writing
from z1_jax.metrics import drop_half_line
from z1_jax.policy import BEST, TOKENIZER, Policy, find_policy, split_best
from z1_jax.report.write import COMMANDS, REPORT, best_sentence, write_report
from z1_jax.serve import remote

SUMMARY = "summary.json"
DATASET = "demos.dataset"
TAKEN_FROM = "evaluation/before_from.json"  # in a run directory: whose evaluation the one before RL is
FORCED = "forced.json"  # in a run directory: every key that was changed by force
OUTCOMES = "outcomes.json"  # in the folder of videos: of each file, whether its episode succeeded
# What repetitions of the default run gave on one core, on two and on other machines; see docs/runs.md.
REPEATS = (
    "the same seed gives the same digits on the same machine with the same number of cores; elsewhere numbers are "
    "added in another order, and training takes another course: the default run's seed 0 ended between 33.6 and 45.3 % "
    "after SFT and between 94.5 and 99.2 % after GRPO"
)


def claim_directory(config: Config, force: bool = False) -> pathlib.Path:
    """Creates the run directory with its config.json, or checks that it belongs to this config, its length aside.

    Args:
        force: keys of `FORCIBLE` may differ too.

    Raises:
        UserError: the directory belongs to another config, or is something else.
    """
    directory = config.directory
    path = directory / "config.json"
    require_plain(directory)
    if os.path.exists(path):  # false too where the path cannot be one
        try:
            theirs = build(Config, json.loads(path.read_text()))
        except (ValueError, TypeError, AttributeError, RecursionError, OSError) as error:
            raise ConfigError(
                f"{path} cannot be read ({error}); restore it or choose another --config.run_dir"
            ) from error
        different = differing(theirs, config)
        frees = [key for key in different if key not in config_identity(config) and key != "run_dir"]
        if frees:
            shown = ", ".join(f"{key} {was} → {now}" for key, (was, now) in different.items() if key in frees)
            print(f"changed, moves no number: {shown}", flush=True)
        fixed = [key for key in different if key in config_identity(config) and key not in lengths(config)]
        refused = [key for key in fixed if not (force and among(key, FORCIBLE))]
        if refused:
            shown = ", ".join(f"{k} is {different[k][0]!r}, asked for {different[k][1]!r}" for k in refused[:3])
            more = f" and {len(refused) - 3} more" if len(refused) > 3 else ""
            forced = ", or --force to go on with what is new, which the run records" if not force else ""
            forced *= all(among(key, FORCIBLE) for key in refused)
            raise ConfigError(
                f"{directory} belongs to another config ({shown}{more}); choose another --config.run_dir{forced}"
            )
        return directory
    if os.path.isdir(directory) and any(entry != partial_path(path) for entry in directory.iterdir()):
        raise ConfigError(
            f"{directory} is not empty and holds no run (no config.json); choose another --config.run_dir"
        )
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_json(path, dataclasses.asdict(config))
    except OSError as error:
        raise ConfigError(
            f"config key run_dir: {directory} cannot be written ({error.strerror}); choose another --config.run_dir"
        ) from error
    return directory


_PATHS = ("init", "checkpoint", "compare", "demos.dataset", "inputs.tokenizer")


def differing(theirs: Config, mine: Config) -> dict[str, tuple[Any, Any]]:
    """Keys in which two configs differ, with both values; one place may be spelled in several ways."""
    one, other = flat(theirs), flat(mine)

    def plain(key: str, value: Any) -> Any:
        if key not in _PATHS or value in ("", RANDOM) or remote.is_address(value):
            return value
        place, best = split_best(value)
        return os.path.realpath(absolute(place)) + BEST * best

    return {k: (one[k], other[k]) for k in other if one[k] != other[k] and plain(k, one[k]) != plain(k, other[k])}


def note_command(run_dir: pathlib.Path, argv: Sequence[str]) -> None:
    """Appends the command that works on a run from now on to its commands.jsonl.

    Args:
        argv: as `sys.argv`.
    """
    program = pathlib.Path(argv[0] or "?")
    name = f"python -m z1_jax.{program.stem}" if program.suffix == ".py" else program.name
    path = run_dir / COMMANDS
    drop_half_line(path)
    with writing(path), path.open("a") as file:
        file.write(json.dumps({"began": _now(), "command": " ".join([name, shlex.join(argv[1:])])}) + "\n")


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")


def note_environments(run_dir: pathlib.Path, mujoco: str) -> list[str]:
    """Records the simulator of a run, and warns if it is another than the run began with: episodes may differ.

    Args:
        mujoco: its version.

    Returns:
        What has simulated it so far, today's last.
    """
    files = sorted(pathlib.Path(envs.__file__).parent.rglob("*.py"))
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:8]
    today = f"mujoco {mujoco}, envs {digest}"
    path = run_dir / "environments.json"
    told = list(map(str, read_json(path, list, [])))
    if told and told[-1] != today:
        print(
            f"warning: {run_dir} was simulated with {told[-1]}, and goes on with {today}: its episodes may not be "
            "comparable with one another; use a new run_dir to start afresh",
            flush=True,
        )
    told += [today] * (told[-1:] != [today])
    write_json(path, told)
    return told


def finished_sentence(run_dir: pathlib.Path) -> str | None:
    """The result of a run that is finished; None for one that is not. A report that is missing is written.

    Raises:
        UserError: its summary is damaged.
    """
    path = run_dir / SUMMARY
    if not os.path.lexists(path):
        return None
    sentence = read_json(path, dict, {}).get("sentence")
    if not isinstance(sentence, str):
        raise UserError(f"{path} is damaged; delete it, and the same command writes it anew")
    if not (run_dir / REPORT).exists():
        write_report(run_dir)
    return sentence


def policy_identity(path: str) -> str:
    """A short hash of a policy, wherever it lies: of parameters and tokenizer, then of all else that it acts by.

    The same parameters under other statistics, cameras or prompts are another policy.

    Raises:
        CheckpointError: there is no policy at `path`, or it is damaged.
    """
    if remote.is_address(path):
        return remote.identity(path)
    directory, step = find_policy(path)
    checkpoints = Checkpoints(directory)
    try:
        stored = checkpoints.checksums(step, "assets")  # a converted checkpoint may come without its tokenizer
        arrays = checkpoints.digest(step, ("params", "assets") if stored else ("params",))
        document = checkpoints.document(step)
        beside = directory / str(step) / TOKENIZER
        words = beside.read_bytes() if not stored and beside.is_file() else b""
        acts_by = {key: document.get(key) for key in _ACTS_BY}
        acts_by |= {key: document[key] for key in _ACTS_BY_SINCE if document.get(key) is not None}
        rest = json.dumps(acts_by, sort_keys=True).encode()
        return f"{arrays}-{hashlib.sha256(rest + words).hexdigest()[:8]}"
    finally:
        checkpoints.close()


# Of a policy's document: what its actions depend on besides its arrays.
_ACTS_BY = (
    "architecture",
    "norm_stats",
    "norm_mode",
    "cameras",
    "state_in_prompt",
    "prompt_state_dim",
    "clip",
    "tokenizer_sha256",
    "executed",
    "denoising_steps",
)
# Where a policy has them: the identities of others stay what they were.
_ACTS_BY_SINCE = ("relative_actions", "temperature")


def claim_policy(run_dir: pathlib.Path, identities: Mapping[str, str]) -> None:
    """Notes which policies and data a run directory is about, or checks that they are still the same.

    Raises:
        UserError: a path leads to something else than before: its run went on, or it was made anew.
    """
    path = run_dir / "policies.json"
    known = known_identities(path)
    for name, identity in identities.items():
        if not _same(known.get(name, identity), identity):
            what = "dataset" if name == DATASET else "policy"
            raise UserError(
                f"{run_dir} began with {what} {known[name]} as {name}, the path leads to {identity} now; "
                "choose another --config.run_dir"
            )
    write_json(path, dict(identities))


def known_identities(path: pathlib.Path) -> dict[str, str]:
    """What a policies.json says; empty where there is none.

    Raises:
        UserError: it is damaged.
    """
    known = read_json(path, dict, {})
    if wrong := [name for name, identity in known.items() if not isinstance(identity, str)]:
        raise UserError(f"{path} is damaged: {wrong[0]} is {known[wrong[0]]!r:.80}, expected a text; restore it")
    return known


def _same(known: str, identity: str) -> bool:
    """Whether two identities are one; an older run knows its policies by their arrays alone."""
    return known in (identity, identity.partition("-")[0])


def dataset_identity(config: Config) -> dict[str, str]:
    """What `claim_policy` notes of the dataset that a run trains on; empty where none is given.

    Raises:
        UserError: it is absent or damaged.
    """
    used = config.algorithm == "sft" or (config.algorithm == "grpo" and not config.init)
    return {DATASET: open_dataset(config.demos.dataset).identity} if used and config.demos.dataset else {}


def results_of(run_dir: pathlib.Path, name: str, stage: str | None) -> pathlib.Path:
    """The file of an evaluation's episodes, after a check that they are this policy's.

    Args:
        stage: whose newest checkpoint is evaluated; None where the policy is known otherwise.

    Raises:
        UserError: those that are there are of another policy, which was trained again since.
    """
    results, claims = (run_dir / "evaluation" / file for file in (f"{name}.jsonl", "policies.json"))
    if stage is None or not processes.leads():
        return results
    identity = policy_identity(str(run_dir / "checkpoints" / stage))
    known = known_identities(claims)
    if results.exists() and not _same(known.get(name, identity), identity):
        raise UserError(
            f"{results} holds episodes of policy {known[name]}, and what is evaluated now is {identity}, trained again "
            f"since: move it and {run_dir / 'videos'} away to evaluate anew"
        )
    results.parent.mkdir(parents=True, exist_ok=True)
    write_json(claims, {**known, name: identity})
    return results


def clip_paths(config: Config, run_dir: pathlib.Path, name: str) -> dict[tuple[str, int], pathlib.Path]:
    """Where the videos of a policy lie, by task and seed."""
    return {
        (task, seed): run_dir / "videos" / clip_file(config, name, task, seed)
        for task in config.every_task
        for seed in config.eval.filmed
    }


def clip_file(config: Config, name: str, task: str, seed: int) -> str:
    """The name of a video: of a policy, a task and a seed."""
    part = f"_{task.replace('/', '-')}" * (len(config.every_task) > 1)
    return f"{name}{part}_seed{seed}.webp"


def missing_clips(config: Config, run_dir: pathlib.Path, name: str) -> list[tuple[str, int]]:
    """Tasks and seeds that have yet to be filmed, or whose outcome is not known."""
    known = known_outcomes(run_dir)
    return [
        key
        for key, path in clip_paths(config, run_dir, name).items()
        if not (path.exists() and isinstance(known.get(path.name), bool))
    ]


def known_outcomes(run_dir: pathlib.Path) -> dict[str, bool]:
    """Of each video, whether its episode succeeded."""
    with contextlib.suppress(UserError):  # damaged: the episodes are filmed again
        return read_json(run_dir / "videos" / OUTCOMES, dict, {})
    return {}


class StageClock:
    """Wall seconds of each stage, kept over interruptions."""

    def __init__(self, path: pathlib.Path, every_s: float = 5.0):
        """Args: every_s: how often a running stage's time is noted."""
        self._path, self._every_s = path, every_s
        self.seconds: dict[str, float] = {}
        with contextlib.suppress(UserError):  # a damaged file costs only the times it held
            known = read_json(path, dict, {})
            self.seconds = {name: float(told) for name, told in known.items() if isinstance(told, int | float)}

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Adds the enclosed time to the stage, also when it is interrupted; a kill loses the last seconds."""
        before, began, over = self.seconds.get(name, 0.0), time.perf_counter(), threading.Event()

        def note() -> None:
            self.seconds[name] = before + time.perf_counter() - began
            if processes.leads():
                write_json(self._path, self.seconds)

        def note_now_and_then() -> None:
            while not over.wait(self._every_s):
                with contextlib.suppress(OSError):  # the stage itself will say what is wrong with the directory
                    note()

        keeper = threading.Thread(target=note_now_and_then, daemon=True)
        keeper.start()
        failed = True
        try:
            yield
            failed = False
        finally:
            over.set()
            keeper.join()
            with contextlib.suppress(*[OSError] * failed):  # a full disk has been told of
                note()


def conclude(
    config: Config,
    policy: Policy | remote.ServedPolicy,
    run_dir: pathlib.Path,
    clock: StageClock,
    result: dict[str, Any],
    line: str,
    differing: Sequence[str] = (),
) -> None:
    """Writes summary.json and the report, and prints the result; `differing` is what `check_worlds` found."""
    if not processes.leads():
        return
    simulators = note_environments(run_dir, suites.mujoco_version(config))
    forced, taken = read_json(run_dir / FORCED, list, []), read_json(run_dir / TAKEN_FROM, dict, {})
    changed = ", ".join(f"{one['key']} {one['was']} → {one['now']}" for one in forced)
    told = ", ".join(f"“{said}” is told as “{instead}”" for said, instead in config.eval.told.items())
    for note in filter(None, (suites.label(config), told, f"changed by force on the way: {changed}" * bool(forced))):
        line += f" [{note}]"
    summary = {
        "task": list(config.tasks) or config.task,
        "seeds": {"run": config.seed, "evaluation": [config.eval.first_seed, config.eval.episodes]},
        "protocol": {
            **protocol(config, policy),
            **({"allowed_to_differ": list(config.allow)} if config.allow else {}),
            **({"differences": list(differing)} if differing else {}),
            **({"environments": simulators} if len(simulators) > 1 else {}),
            **({"before_from": str(taken["run"])} if "run" in taken else {}),
            **({"forced": forced} if forced else {}),
        },
        **result,
        **({} if config.algorithm == "eval" else {"repeats": REPEATS}),
        "wall_seconds": clock.seconds,
        "ended": _now(),
        "sentence": line,
    }
    path = run_dir / SUMMARY
    write_json(path, summary)
    page = write_report(run_dir)
    total = sum(clock.seconds.values())
    print("\n" + "\n  ".join([line, *task_lines(result, config.eval.confidence)]))
    if best := result.get("best_checkpoint"):
        print(f"best checkpoint: {best_sentence(best)}; its path is {run_dir}{BEST}")
    if config.algorithm != "eval":
        print(f"{REPEATS[0].upper()}{REPEATS[1:]}.")
    print(f"{total / 60:.1f} minutes in all; summary {path}, report {page}", flush=True)


def protocol(config: Config, policy: Policy | remote.ServedPolicy) -> dict[str, Any]:
    """What the success rates depend on."""
    facts = policy.facts if isinstance(policy, remote.ServedPolicy) else _policy_facts(config, policy)
    return {
        "version": __version__,
        "revision": revision(),
        "suite": config.env.suite,
        "task": list(config.tasks) or config.task,
        "config": fingerprint(config),
        "evaluation_seeds": f"{config.eval.first_seed} … {config.eval.first_seed + config.eval.episodes - 1}"
        if config.eval.episodes
        else "none",
        "noise_seed": config.eval.noise_seed,
        **({"words": config.eval.told} if config.eval.words else {}),
        "confidence": config.eval.confidence,
        "cameras": list(config.env.cameras),
        "image_size": config.env.image_size,
        **facts,
        **suites.facts(config),
        "stop_on_success": True,
        "latched_success": True,
        "jax": jax.__version__,
        "devices": f"{jax.device_count()} × {jax.devices()[0].device_kind}",
        **({"processes": processes.count()} if processes.count() > 1 else {}),
    }


def _policy_facts(config: Config, policy: Policy) -> dict[str, Any]:
    processor = policy.processor
    return {
        "predicted_steps_per_chunk": policy.config.horizon,
        "executed_steps_per_chunk": policy.executed,
        "denoising_steps": config.flow.steps,
        "sampler": "ODE",
        "temperature": policy.temperature,
        "slots": list(processor.cameras),
        "widths": {name: stats.dim for name, stats in processor.stats.items()},
        "tokenizer": processor.tokenizer.identity[:12],
    }


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes a JSON file whole: a kill leaves the old one or the new one."""
    write_whole(path, json.dumps(value, indent=1))


def revision() -> str:
    try:
        root = pathlib.Path(__file__).parent
        command = ["git", "-C", str(root), "describe", "--always", "--dirty"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "not a git checkout"
