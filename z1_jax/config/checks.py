"""Every check that a config must pass: types, choices, ranges, what fits together, and what would have no effect."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable
from typing import Any

from envs.base import LABELS
from z1_jax.config.schema import (
    RANDOM,
    Config,
    ConfigError,
    LoraConfig,
    OptimConfig,
    SelectiveConfig,
    build,
    flat,
    ranges,
)
from z1_jax.data.normalize import NORM_MODES
from z1_jax.data.order import SAMPLING
from z1_jax.models import choices
from z1_jax.rl.advantage import REWARDS, STDS
from z1_jax.rl.schedules import SCHEDULES
from z1_jax.rl.task_groups import SPREADS
from z1_jax.rl.tree import BRANCHING
from z1_jax.worlds import MUST_AGREE

PLACEMENTS = ("device", "host", "recompute")  # of the prefix caches: see rl/prefix_cache
# Each list of choices stands once: here, or in the module that makes the difference.
CHOICES: dict[str, tuple[str, ...]] = {
    "algorithm": ("grpo", "sft", "eval"),
    "rollout.backend": ("local", "ray"),
    "model.dtype": choices.DTYPES,
    "model.remat": choices.REMAT,
    "model.attention": choices.ATTENTION,
    "model.acting": choices.ACTING,
    "sft.scope": choices.SCOPES,
    "inputs.norm": NORM_MODES,
    "sft.loss_dims": ("all", "real"),
    "sft.optim.name": ("adamw", "muon"),
    "sft.optim.schedule": ("cosine", "constant"),
    "update.optim.schedule": ("cosine", "constant"),
    "demos.labels": LABELS,
    "demos.sampling": SAMPLING,
    "group.spread": SPREADS,
    "group.branching": BRANCHING,
    "group.prefix_schedule": SCHEDULES,
    "flow.noise_schedule": SCHEDULES,
    "flow.sde_steps": ("all", "one"),
    "flow.last_step": ("sde", "ode"),
    "flow.logprob_reduce": ("sum", "mean"),
    "flow.logprob_coords": ("executed", "horizon"),
    "reward.kind": REWARDS,
    "reward.std": STDS,
    "reward.filter_on": ("return", "success"),
    "update.prefix_cache": ("auto", *PLACEMENTS),
    "train.scope": (*choices.SCOPES, "auto"),
    "selective.then": ("joint", "lora", "everything"),
}

_RANGES = ranges()


def checked(values: dict[str, Any]) -> Config:
    """Checks nested values and freezes them.

    Raises:
        ConfigError: an unknown key, a value of the wrong type or out of range, or values that do not fit together.
    """
    built = build(Config, values)
    check(built)
    return built


def check(config: Config) -> None:
    """Refuses values out of range and combinations that cannot work.

    Raises:
        ConfigError: one line.
    """
    values = flat(config)
    for key, known in CHOICES.items():
        if values[key] not in known:
            raise ConfigError(f"config key {key}: got {values[key]!r}, expected one of {', '.join(known)}")
    for key, (low, high) in _RANGES.items():
        value = values[key]
        if not low <= value <= high:  # nan neither
            raise ConfigError(f"config key {key}: got {value}, expected {low} … {high}")
    _check_combinations(config)


def _check_rollout(config: Config) -> None:
    """Refuses an address that nothing would look at, or that no Ray cluster has."""
    backend, address = config.rollout.backend, config.rollout.address
    if config.rollout.overlap and not config.env.workers:
        raise ConfigError(
            "config key rollout.overlap: got true with env.workers=0, which simulates in this process: nothing could "
            "overlap; ask for workers, or leave it out"
        )
    if backend == "local":
        if address:
            raise ConfigError(
                f"config key rollout.address: got {address}, which has no effect with rollout.backend=local; leave it "
                "out, or set rollout.backend=ray"
            )
        return
    if not config.env.workers:
        raise ConfigError("config key env.workers: got 0 with rollout.backend=ray, expected the number of actors")
    if not config.eval.episodes and config.algorithm == "sft":
        raise ConfigError("config key rollout.backend: got ray, but with eval.episodes=0 nothing is simulated")
    host, _, port = address.rpartition(":")
    if address not in ("", "auto") and ("/" in address or not host or not port.isdigit() or not 0 < int(port) < 65536):
        raise ConfigError(
            f"config key rollout.address: got {address}, expected HOST:PORT as ray start --head prints it, or auto"
        )


def _check_combinations(config: Config) -> None:
    group, env = config.group, config.env
    size = group.size
    if group.branching == "tree" and size & (size - 1):
        raise ConfigError(f"config key group.size: got {size} with branching=tree, expected a power of two (4, 8, 16…)")
    if env.parallel % size and config.algorithm == "grpo":
        raise ConfigError(f"config key env.parallel: got {env.parallel}, expected a multiple of group.size = {size}")
    if config.update.batch_size % config.update.micro_batch:
        raise ConfigError(
            f"config key update.batch_size: got {config.update.batch_size}, "
            f"expected a multiple of update.micro_batch = {config.update.micro_batch}"
        )
    if config.sft.micro_batch and config.sft.batch_size % config.sft.micro_batch:
        raise ConfigError(
            f"config key sft.batch_size: got {config.sft.batch_size}, "
            f"expected a multiple of sft.micro_batch = {config.sft.micro_batch}"
        )
    if config.reward.keep_low > config.reward.keep_high:
        raise ConfigError(
            f"config key reward.keep_low: got {config.reward.keep_low}, "
            f"expected at most reward.keep_high = {config.reward.keep_high}"
        )
    given = config.algorithm == "eval" or config.init not in ("", RANDOM)
    if config.flow.steps < 2 and not (given and config.flow.steps == 0):
        raise ConfigError(
            f"config key flow.steps: got {config.flow.steps}, expected 2 … 1000"
            + ", or 0 for those that the given policy acts with" * given
        )
    if -1 < config.flow.temperature < 0:
        raise ConfigError(
            f"config key flow.temperature: got {config.flow.temperature:g}, expected 0 … 1, or -1 for the policy's own"
        )
    if group.branching == "none" and (group.prefix_chunks or group.prefix_chunks_end):
        raise ConfigError(
            "config key group.prefix_chunks: branching=none shares no prefix, "
            f"got {group.prefix_chunks} → {group.prefix_chunks_end}, expected 0 → 0"
        )
    for kind in config.allow:
        if kind not in MUST_AGREE:
            raise ConfigError(f"config key allow: got {kind!r}, expected one or more of {', '.join(MUST_AGREE)}")
    _check_scopes(config)
    if _trains_sft(config):
        _check_inert(config, _INERT_SFT)
    if config.algorithm == "grpo":
        _check_switches(config)
    _check_slots(config)
    _check_rates(config)
    _check_rollout(config)
    if config.init == RANDOM and config.algorithm != "grpo":
        raise ConfigError(f"config key init: got random with algorithm={config.algorithm}, expected grpo")
    if config.mesh.data == 0:
        raise ConfigError("config key mesh.data: got 0, expected a number of devices, or -1 for all that are left")
    if not config.eval.episodes and not (config.algorithm == "sft" and config.demos.dataset):
        raise ConfigError(
            "config key eval.episodes: got 0, expected at least 1; 0 is for algorithm=sft with a demos.dataset, which "
            "then trains without simulating"
        )
    if config.sft.validation and config.demos.episodes < 2 and not config.demos.dataset:
        raise ConfigError(
            f"config key sft.validation: got {config.sft.validation:g} with demos.episodes=1, expected two episodes of "
            "a task or more: one of them is held out"
        )
    for key, section in (("sft", config.sft), ("train", config.train)):
        if section.keep_every % section.checkpoint_every:
            raise ConfigError(
                f"config key {key}.keep_every: got {section.keep_every}, expected a multiple of "
                f"{key}.checkpoint_every = {section.checkpoint_every}: there is nothing to keep in between"
            )
    seeds = config.eval.film_seeds
    for seed in seeds:
        if not (seed.isascii() and seed.isdigit() and int(seed) < 2**31):
            raise ConfigError(f"config key eval.film_seeds: got {seed!r}, expected seeds of 0 … {2**31 - 1}")
    if len(set(map(int, seeds))) < len(seeds):
        raise ConfigError(f"config key eval.film_seeds: got {', '.join(seeds)}, expected each seed once")
    _check_profile(config)
    _check_words(config)
    if config.algorithm == "eval" and not config.checkpoint:
        raise ConfigError("config key checkpoint: got '', expected a run directory or a checkpoint to evaluate")


def _check_words(config: Config) -> None:
    words = config.eval.words
    if words and config.algorithm != "eval":
        raise ConfigError(
            f"config key eval.words: got {', '.join(words)} with algorithm={config.algorithm}; other words are for "
            "python -m z1_jax.evaluate alone: leave it out"
        )
    for pair in words:
        said, colon, instead = pair.partition(":")
        if (
            not colon
            or not said
            or not instead
            or said == instead
            or any(c.isspace() or c == ":" for c in said + instead)
        ):
            raise ConfigError(f"config key eval.words: got {pair!r}, expected WORD:INSTEAD, e.g. left:right,right:left")
    if len(config.eval.told) < len(words):
        raise ConfigError(f"config key eval.words: got {', '.join(words)}, expected each word once before a colon")


def _check_profile(config: Config) -> None:
    chosen, last = config.log.profile, config.train.iterations - 1
    for name in chosen:
        if not (name.isascii() and name.isdigit() and int(name) <= last):
            raise ConfigError(f"config key log.profile: got {name!r}, expected iterations of 0 … {last}, e.g. 3,4")
    if len(config.log.profiled) < len(chosen):
        raise ConfigError(f"config key log.profile: got {', '.join(chosen)}, expected each iteration once")
    if chosen and config.algorithm != "grpo":
        raise ConfigError(
            f"config key log.profile: got {', '.join(chosen)} with algorithm={config.algorithm}, which has no "
            "iterations of GRPO; leave it out"
        )


def _trains_sft(config: Config) -> bool:
    return config.algorithm == "sft" or (config.algorithm == "grpo" and not config.init)


def _check_scopes(config: Config) -> None:
    """Refuses scopes that would train nothing sensible, and adapters that no part uses."""
    trains_sft = _trains_sft(config)
    scopes = [config.sft.scope] * trains_sft
    if config.algorithm == "grpo":
        scopes.append(config.selective.then if config.train.scope == "auto" else config.train.scope)
    if trains_sft and not config.init and config.sft.scope in ("expert", "lora"):
        raise ConfigError(
            f"config key sft.scope: got {config.sft.scope} for a fresh policy, whose frozen part would stay random; "
            "expected everything or joint, or SFT of an existing policy (algorithm=sft with init)"
        )
    lora = config.lora
    if "lora" in scopes and not (lora.vlm_rank or lora.expert_rank):
        raise ConfigError("config key lora.vlm_rank: got 0, and lora.expert_rank is 0 too; expected one above 0")
    for key, value in flat(lora, "lora.").items():
        if value != flat(LoraConfig(), "lora.")[key] and "lora" not in scopes and config.algorithm != "eval":
            raise ConfigError(
                f"config key {key}: got {value}, but no scope of this run is lora; set train.scope or sft.scope to it"
            )
    attention = config.model.attention
    if attention == "cudnn" and config.model.dtype != "bfloat16":
        raise ConfigError(
            f"config key model.attention: {attention} computes in bfloat16 only; set model.dtype=bfloat16"
        )
    if config.model.acting == "prepared" and config.algorithm == "grpo" and scopes[-1] == "lora":
        raise ConfigError(
            "config key model.acting: got prepared, which takes no adapters (train.scope=lora); expected auto or plain"
        )


# Where a key has no effect it must keep its default: nothing that was asked for is ignored in silence.
# (key, the key that decides, values of that key under which the first has no effect)
_INERT_SFT: tuple[tuple[str, str, tuple[Any, ...]], ...] = (
    ("sft.optim.lr_end", "sft.optim.schedule", ("constant",)),
    ("sft.optim.muon_rms", "sft.optim.name", ("adamw",)),
)
_INERT: tuple[tuple[str, str, tuple[Any, ...]], ...] = (
    ("group.floor", "group.spread", ("uniform",)),
    ("group.prefix_schedule", "group.branching", ("none",)),
    ("group.prefix_chunks_end", "group.prefix_schedule", ("constant",)),
    ("flow.noise_level_end", "flow.noise_schedule", ("constant",)),
    ("reward.discount", "reward.kind", ("penalty", "sparse")),
    ("reward.penalty", "reward.kind", ("decay", "sparse")),
    ("reward.filter_on", "reward.kind", ("sparse",)),
    ("update.optim.lr_end", "update.optim.schedule", ("constant",)),
    ("update.vlm_lr_factor", "train.scope", ("expert",)),
    *((f"selective.{f.name}", "train.scope", choices.SCOPES) for f in dataclasses.fields(SelectiveConfig)),
)


def _check_inert(config: Config, rows: tuple[tuple[str, str, tuple[Any, ...]], ...]) -> None:
    values, default = flat(config), flat(Config())
    for key, by, without in rows:
        if values[by] in without and values[key] != default[key]:
            raise ConfigError(
                f"config key {key}: got {values[key]}, which has no effect with {by}={values[by]}; "
                f"leave it at {default[key]} or change {by}"
            )


def _check_switches(config: Config) -> None:
    _check_inert(config, _INERT)
    update, scope = config.update, config.train.scope
    if 0.0 < update.ratio_max <= 1.0:
        raise ConfigError(
            f"config key update.ratio_max: got {update.ratio_max}, expected 0 for no dual clip, or more than 1"
        )
    if scope == "auto" and config.selective.iterations >= config.train.iterations:
        raise ConfigError(
            f"config key selective.iterations: got {config.selective.iterations}, expected less than "
            f"train.iterations = {config.train.iterations}, so that something is left to train after the decision; "
            "or train.scope=expert"
        )
    may_train_vlm = scope == "auto" or choices.trains_vlm(scope, config.lora.vlm_rank)
    if update.prefix_cache in ("device", "host") and may_train_vlm:
        raise stale_cache(update.prefix_cache, scope)
    if scope == "auto" and config.selective.then == "lora" and config.lora.expert_rank:
        raise ConfigError(
            f"config key lora.expert_rank: got {config.lora.expert_rank} with selective.then=lora, where the expert "
            "goes on being trained whole; expected 0"
        )


# Sections of the RL; of flow only how a policy acts matters without it.
_RL = ("group.", "reward.", "update.", "train.", "selective.", "flow.")
_ACTING = ("flow.steps", "flow.temperature")


def check_given(config: Config, keys: Iterable[str]) -> None:
    """Refuses keys that were given on the command line and have no effect on what the command does.

    A config file's presets hold the keys of all stages; a key that is given must take effect.

    Raises:
        ConfigError: one line.
    """
    keys = list(keys)
    _check_warmup(config, keys)
    if config.eval.film_seeds and "eval.videos" in keys:
        raise ConfigError("config key eval.videos: it has no effect beside eval.film_seeds; leave one of them out")
    if "task" in keys and "tasks" in keys:
        raise ConfigError("config key task: it has no effect beside tasks; leave one of them out")
    films = ("eval.video", "eval.film_seeds")  # eval.videos and eval.video_size
    if config.algorithm == "eval":
        unused: tuple[str, ...] = (*_RL, "sft.", "demos.", "lora.", "log.", "init", "seed")
        why = "algorithm=eval trains and draws nothing"
    elif config.algorithm == "sft":
        unused, why = (*_RL, *films, "checkpoint", "compare"), "algorithm=sft neither trains by RL, compares nor films"
    elif config.init:
        unused, why = ("sft.", "demos.", "checkpoint", "compare"), "RL starts from init, without demonstrations and SFT"
    else:
        unused, why = ("checkpoint", "compare"), "algorithm=grpo makes its own policy, or starts from init"
    for key in keys:
        if key.startswith(unused) and key not in _ACTING:
            raise ConfigError(f"config key {key}: it has no effect, {why}; leave it out")


def stale_cache(placement: str, scope: str) -> ConfigError:
    """The refusal of a prefix cache where updates move what it was computed with."""
    return ConfigError(
        f"config key update.prefix_cache: got {placement} with train.scope={scope}, which trains the VLM: its keys and "
        "values would be stale after the first update; expected auto or recompute"
    )


def check_horizon(config: Config, control_steps: int, executed: int) -> None:
    """Refuses a prefix that leaves nothing of the episode to compare.

    Args:
        control_steps: of an episode of the task; executed: E, of a chunk.
    Raises:
        ConfigError: one line.
    """
    chunks = -(-control_steps // executed)
    group = config.group
    ends = {"group.prefix_chunks": group.prefix_chunks}
    if group.prefix_schedule != "constant":
        ends["group.prefix_chunks_end"] = group.prefix_chunks_end
    for key, prefix in ends.items():
        if prefix >= chunks:
            raise ConfigError(
                f"config key {key}: got {prefix}, but an episode of {control_steps} steps has {chunks} chunks of "
                f"{executed}: expected at most {chunks - 1}, so that the members part before it ends"
            )


def _optimisers(config: Config) -> list[tuple[str, OptimConfig, str, int]]:
    """The key of each optimiser that a run uses, its settings, the key of its length and that length."""
    found: list[tuple[str, OptimConfig, str, int]] = []
    if _trains_sft(config):
        found.append(("sft.optim", config.sft.optim, "sft.steps", config.sft.steps))
    if config.algorithm == "grpo":
        found.append(("update.optim", config.update.optim, "train.iterations", config.train.iterations))
    return found


def _check_rates(config: Config) -> None:
    for section, optim, _, _ in _optimisers(config):
        if optim.schedule == "cosine" and optim.lr_end > optim.lr:
            raise ConfigError(
                f"config key {section}.lr_end: got {optim.lr_end:g}, expected at most {section}.lr = {optim.lr:g}, "
                f"from which the rate falls; or {section}.schedule=constant"
            )


def _check_warmup(config: Config, given: Iterable[str]) -> None:
    """Refuses a warm-up that is asked for and does not end; tells of a file's, in a run that was made that short."""
    for section, optim, length, steps in _optimisers(config):
        if optim.warmup_steps <= steps:
            continue
        key = f"{section}.warmup_steps"
        if key not in given:
            told = f"{key}={optim.warmup_steps} is more than {length}={steps}: the learning rate only rises"
            print(told, file=sys.stderr, flush=True)  # a plan may print JSON
            continue
        raise ConfigError(
            f"config key {key}: got {optim.warmup_steps}, expected at most {length} = {steps}: the learning rate would "
            "only rise"
        )


def _check_slots(config: Config) -> None:
    """Checks that each rendered camera fills exactly one slot."""
    if twice := [camera for camera in config.env.cameras if config.env.cameras.count(camera) > 1]:
        raise ConfigError(f"config key env.cameras: got {twice[0]} twice, expected each camera once")
    named = [camera for camera in config.inputs.slots if camera != "none"]
    if config.inputs.slots and sorted(named) != sorted(config.env.cameras):
        raise ConfigError(
            f"config key inputs.slots: got {', '.join(config.inputs.slots)}, "
            f"expected each of env.cameras = {', '.join(config.env.cameras)} once, and none for a missing camera"
        )
