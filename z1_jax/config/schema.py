"""The settings of a run: frozen dataclasses with their defaults, and the run directory that belongs to one.

Only this module knows ml_collections; `checks` refuses values. A user's mistake raises ConfigError: one line that names
the key, what was given and what is allowed.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import pathlib
import typing
from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple

import ml_collections

from z1_jax.errors import UserError
from z1_jax.files import absolute


class ConfigError(UserError):
    """A setting that cannot be used."""


class Within(NamedTuple):
    """The values that a key may have, both ends included."""

    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class EnvConfig:
    """The environments that rollouts and evaluations run in."""

    # kitchen: built in; robocasa: v0.2 or v1.0.1, as installed (docs/robocasa.md); libero (docs/libero.md);
    # metaworld (docs/metaworld.md); gym:ENV_ID, or package.module:name of your own (docs/own-environment.md)
    suite: str = "kitchen"
    options: tuple[str, ...] = ()  # gym: NAME=VALUE, where picture, state, success and words are; image, once a camera
    version: str = ""  # robocasa, libero, metaworld: its version, e.g. 1.0.1; empty: the one that is installed
    # The Python whose packages the built-in suite is installed in, e.g. VENV/bin/python: its workers run there
    # (docs/libero.md); empty: this one
    python: str = ""
    standins: bool = False  # robocasa: primitive stand-ins for the downloaded assets; a smoke test, and labelled so
    cameras: tuple[str, ...] = ("robot0_agentview_left", "robot0_eye_in_hand")  # in the order of the image slots
    image_size: Annotated[int, Within(14, 1024)] = 64  # pixels
    horizon: Annotated[int, Within(0, 100_000)] = 0  # control steps of an episode; 0: the task's own
    # E, steps of a predicted chunk that run before the policy looks again; 0: the policy's own
    executed: Annotated[int, Within(0, 1000)] = 0
    scenes: tuple[str, ...] = ()  # robocasa: training | evaluation | …, or layout/style; each episode draws one
    layouts: tuple[str, ...] = ("straight",)  # kitchens; each episode draws one; also: train, heldout (all of a split)
    styles: tuple[str, ...] = ("oak",)  # colours; the same
    objects: tuple[str, ...] = ("train",)  # splits of the things that stand about: train, heldout; robocasa also: all
    # Whose steps and no-ops. libero: openpi | rlinf | lerobot (docs/libero.md); metaworld: lerobot | rlinf | quick
    protocol: str = "openpi"
    train_on: str = "placements"  # libero: drawn ones; initial_states: the evaluation's own, and labelled so
    parallel: Annotated[int, Within(1, 4096)] = 64  # environments alive at once, over all workers
    workers: Annotated[int, Within(0, 512)] = 2  # worker processes, or actors of Ray; 0: step inside this process
    # most that a worker keeps, in which its environments take turns; 0: as the suite does best
    simulators: Annotated[int, Within(0, 4096)] = 0
    timeout_s: Annotated[float, Within(0.1, 86_400.0)] = 60.0  # longest that one call to a worker may take

    @property
    def start_timeout_s(self) -> float:
        """Longest that a worker may take to start: it imports and builds its first environment."""
        return max(120.0, 2 * self.timeout_s)


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    """Where and how the environments of rollouts and evaluations run."""

    backend: str = "local"  # local: in env.workers processes; ray: in as many actors of a Ray cluster (docs/ray.md)
    # ray: of the cluster, HOST:PORT, or auto: the one that runs on this machine; empty: RAY_ADDRESS, or else a cluster
    # of this machine alone, which ends with the run
    address: str = ""
    # In two halves: while one is simulated, the other's chunks are sampled. Batches have half the size, which moves the
    # last digits. It can pay where sampling leaves the cores to the simulators: a GPU or TPU (docs/pool.md)
    overlap: bool = False


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The policy's size and computation. A run that starts from a checkpoint takes preset and dtype from there."""

    preset: str = "kitchen"  # its size: z1_jax/models/presets.py
    dtype: str = "float32"  # of the computation; trained parameters are float32, frozen ones as wide as this
    remat: str = "none"  # activations kept for the backward pass: none (all) | dots | full (recompute all)
    attention: str = "einsum"  # einsum | xla | cudnn: a GPU, bfloat16; head widths above 128 need Hopper or later
    # The weights that decisions read: plain (as they are trained), prepared (a copy laid out for it: fewer, larger
    # kernels), or auto: prepared on a GPU or TPU, where there are no adapters.
    acting: str = "auto"


@dataclasses.dataclass(frozen=True)
class InputsConfig:
    """How a fresh policy sees. What a checkpoint says takes precedence when a run starts from one."""

    tokenizer: str = ""  # a SentencePiece .model, its directory, or a hub name; empty: a small one is made
    state_in_prompt: bool = True  # false: the instruction alone, as openpi's LIBERO policies
    norm: str = "quantile"  # of states and actions
    # Action dimensions that the policy predicts as offsets from the same dimensions of the state, as openpi writes its
    # masks: 6,-1 is six relative ones, then an absolute one; empty: all absolute.
    relative_actions: tuple[str, ...] = ()
    slots: tuple[str, ...] = ()  # camera of each image slot, "none" for a missing one; empty: env.cameras in order


@dataclasses.dataclass(frozen=True)
class DemosConfig:
    """Expert demonstrations."""

    # successful ones to keep; above 3,333 runs of neighbouring seeds share some
    episodes: Annotated[int, Within(1, 50_000)] = 250
    noise: Annotated[float, Within(0.0, 1.0)] = 0.2  # an episode's action noise is one of 0, noise, 2·noise
    stride: Annotated[int, Within(1, 10_000)] = 4  # control steps between recorded observations
    # recorded: a chunk holds what the expert did amid the noise. As in people's demonstrations, these are answers to
    # what could not be foreseen, and SFT is stuck near one half. undisturbed: what it would have done from there
    # without noise, which suits SFT alone.
    labels: str = "recorded"
    dataset: str = ""  # a dataset directory (see z1_jax.collect) that replaces the collection
    sampling: str = "proportional"  # of SFT's batches: every record alike; balanced: every task alike


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """AdamW after global-norm clipping."""

    lr: Annotated[float, Within(1e-12, 1.0)] = 1e-3  # the peak
    warmup_steps: Annotated[int, Within(0, 10_000_000)] = 100  # from 0 to lr, linearly
    schedule: str = "cosine"  # cosine: to lr_end at the last step; constant
    lr_end: Annotated[float, Within(0.0, 1.0)] = 1e-5  # after the last step
    b1: Annotated[float, Within(0.0, 0.99999)] = 0.9  # decay of the mean of gradients
    b2: Annotated[float, Within(0.0, 0.99999)] = 0.95  # decay of the mean of their squares
    eps: Annotated[float, Within(0.0, 1.0)] = 1e-8  # beside the root of the latter
    weight_decay: Annotated[float, Within(0.0, 1.0)] = 1e-4  # decoupled, times the learning rate
    clip_norm: Annotated[float, Within(1e-9, 1e9)] = 1.0  # largest global norm of a gradient


@dataclasses.dataclass(frozen=True)
class SftOptimConfig(OptimConfig):
    """The same, or Muon."""

    name: str = "adamw"  # adamw; muon: orthogonalised momentum for kernels, AdamW for the rest
    # root mean square of a kernel's step with muon, as a share of the learning rate
    muon_rms: Annotated[float, Within(1e-6, 100.0)] = 0.4


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters of scope lora: on every kernel of attention and MLP; what has adapters is itself frozen.

    The vision-language model is frozen with and without. The expert without adapters (rank 0) is trained whole.
    """

    vlm_rank: Annotated[int, Within(0, 1024)] = 16  # of the vision tower and the language model; 0: no adapters
    vlm_alpha: Annotated[float, Within(1e-6, 1e6)] = 16.0  # the change is scaled by alpha / rank
    expert_rank: Annotated[int, Within(0, 1024)] = 32  # of the action expert; 0: trained whole
    expert_alpha: Annotated[float, Within(1e-6, 1e6)] = 32.0  # as vlm_alpha


@dataclasses.dataclass(frozen=True)
class SftConfig:
    """Supervised flow matching on the demonstrations."""

    steps: Annotated[int, Within(1, 10_000_000)] = 300  # of the optimiser
    batch_size: Annotated[int, Within(1, 65_536)] = 64  # observations a step
    # observations that go through the network at once, whose gradients are added up: less memory, and on a CPU less
    # time, where 8 stay in its caches; 0: all of the batch
    micro_batch: Annotated[int, Within(0, 65_536)] = 0
    flows: Annotated[int, Within(1, 1024)] = 4  # flow times and noises drawn per encoded observation
    loss_dims: str = "all"  # all: padding included, as openpi; real: the environment's action dimensions
    scope: str = "everything"  # what is trained, as in train.scope
    # decay of a moving average of the parameters, with which the policy then acts; 0: none
    ema: Annotated[float, Within(0.0, 0.99999)] = 0.0
    # share of each task's episodes that are not trained on: the loss on them is told at each checkpoint, beside that on
    # trained ones; 0: none
    validation: Annotated[float, Within(0.0, 0.9)] = 0.0
    augment: bool = False  # openpi's crop, rotation (first slot only) and colour jitter of the images
    optim: SftOptimConfig = dataclasses.field(default_factory=lambda: SftOptimConfig(lr=3e-3, warmup_steps=50))
    checkpoint_every: Annotated[int, Within(1, 10_000_000)] = 250  # steps
    keep_last: Annotated[int, Within(1, 10_000)] = 2  # the newest checkpoints, so many, are kept
    # also those of each such step, a multiple of checkpoint_every; 0: none
    keep_every: Annotated[int, Within(0, 10_000_000)] = 0


@dataclasses.dataclass(frozen=True)
class GroupConfig:
    """Groups of rollouts that start from one state, and how their members part."""

    count: Annotated[int, Within(1, 9_999)] = 8  # groups an iteration
    size: Annotated[int, Within(2, 1024)] = 8  # G, members of a group
    branching: str = "tree"  # none: from the start; prefix: after P chunks; tree: after P chunks, again and again
    prefix_chunks: Annotated[int, Within(0, 10_000)] = 2  # P at the first iteration
    prefix_chunks_end: Annotated[int, Within(0, 10_000)] = 1  # P at the last iteration
    prefix_schedule: str = "linear"  # from the one to the other
    shuffle_advantages: bool = False  # control: permutes the advantages within each group, which must gain nothing
    # Of a run of several tasks: uniform: each task in turn; adaptive: more where training success is neither 0 nor 1.
    spread: str = "uniform"
    # adaptive: least groups of a task, as a share of what it would get in turn
    floor: Annotated[float, Within(0.0, 1.0)] = 0.25
    # groups that the filter drops are drawn again, up to so many times `count` in all
    oversample: Annotated[float, Within(1.0, 100.0)] = 1.0


@dataclasses.dataclass(frozen=True)
class FlowConfig:
    """The stochastic sampler (Flow-SDE)."""

    # K, denoising steps of a decision; 0: those that the given policy acts with
    steps: Annotated[int, Within(0, 1000)] = 4
    # Scale of the noise that denoising starts from when the policy acts, in rollouts as in evaluations: 1: all that it
    # was trained from; 0: its middle, near the mean of what the policy thinks possible; -1: the policy's own (a fresh
    # one: 1). Training sees all of it either way.
    temperature: Annotated[float, Within(-1.0, 1.0)] = -1.0
    noise_level: Annotated[float, Within(1e-6, 10.0)] = 1.0  # a, at the first iteration
    noise_level_end: Annotated[float, Within(1e-6, 10.0)] = 0.5  # a at the last iteration
    noise_schedule: str = "linear"  # from the one to the other
    # Denoising steps that draw noise. Of one that does there may be more: success rises faster than with noise in all
    # four, and an update costs a quarter (docs/switches.md).
    sde_steps: str = "one"
    last_step: str = "sde"  # whether the last step may draw noise, or (ode) never does
    logprob_reduce: str = "sum"  # over the coordinates of a chunk
    logprob_coords: str = "executed"  # those that count: of the executed steps, or of the whole horizon


@dataclasses.dataclass(frozen=True)
class RewardConfig:
    """Completion-aware returns, advantages and the group filter."""

    kind: str = "decay"  # decay: γ^chunks of a success; penalty: success − penalty·chunks; sparse: success
    discount: Annotated[float, Within(1e-3, 1.0)] = 0.998  # γ per chunk
    penalty: Annotated[float, Within(0.0, 1.0)] = 0.002  # per chunk; to first order what γ = 0.998 takes from a success
    std: str = "population"  # deviation that the centred returns of a group are divided by
    filter_on: str = "return"  # what the filter averages: the return, after the decay, or success, before it
    # a group is kept when its mean is at least this; penalties may make that negative
    keep_low: Annotated[float, Within(-10.0, 1.0)] = 0.1
    keep_high: Annotated[float, Within(-10.0, 1.0)] = 0.99  # and at most this


@dataclasses.dataclass(frozen=True)
class UpdateConfig:
    """The policy update."""

    epochs: Annotated[int, Within(1, 1000)] = 2  # passes over the nodes of an iteration
    batch_size: Annotated[int, Within(1, 1_048_576)] = 128  # nodes (deduplicated chunks) an optimiser step
    # nodes that go through the network at once; those that are all padding cost nothing
    micro_batch: Annotated[int, Within(1, 65_536)] = 32
    clip_low: Annotated[float, Within(0.0, 1.0)] = 0.2  # η below 1
    clip_high: Annotated[float, Within(0.0, 1e3)] = 0.2  # η above 1
    # dual clip: bounds ρ for negative advantages; above 1, or 0 for none
    ratio_max: Annotated[float, Within(0.0, 1e6)] = 0.0
    kl_coef: Annotated[float, Within(0.0, 1e3)] = 0.0  # weight of the KL to the policy that RL started from; 0: none
    # learning rate of vision and language, where they are trained, over the expert's
    vlm_lr_factor: Annotated[float, Within(1e-6, 1e3)] = 0.5
    prefix_cache: str = "auto"  # where it is kept; auto: the first that fits, recompute if the VLM is trained
    # largest |ρ − 1| at the first update; 0: 1e-3 in float32, 0.1 in bfloat16
    ratio_gate: Annotated[float, Within(0.0, 1e6)] = 0.0
    optim: OptimConfig = dataclasses.field(
        # Steps of this schedule are iterations.
        default_factory=lambda: OptimConfig(lr=1.5e-4, warmup_steps=2, lr_end=1e-5, b2=0.999, weight_decay=0.01)
    )


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The loop."""

    iterations: Annotated[int, Within(1, 9_999)] = 240  # of GRPO
    scope: str = "expert"  # what is trained; joint: all but the token embedding; auto: see selective
    checkpoint_every: Annotated[int, Within(1, 9_999)] = 10  # iterations
    keep_last: Annotated[int, Within(1, 9_999)] = 2  # the newest checkpoints, so many, are kept
    # also those of each such iteration, a multiple of checkpoint_every; 0: none
    keep_every: Annotated[int, Within(0, 9_999)] = 0
    # also the best by mean training success of the iterations, so many, before it; 0: not
    keep_best: Annotated[int, Within(0, 9_999)] = 10
    # stop early when the training success over `stop_window` iterations reaches this
    stop_success: Annotated[float, Within(0.0, 100.0)] = 1.01
    stop_window: Annotated[int, Within(1, 9_999)] = 5  # iterations


@dataclasses.dataclass(frozen=True)
class SelectiveConfig:
    """`train.scope=auto`: probes with the expert alone; after each, the trend of training success decides."""

    iterations: Annotated[int, Within(3, 9_998)] = 30  # of a probe
    confidence: Annotated[float, Within(0.5, 0.9999)] = 0.9  # one-sided, at which a rising trend keeps the expert alone
    enough: Annotated[float, Within(0.0, 1.01)] = 0.95  # mean success over the probe's later half that keeps it too
    then: str = "joint"  # scope from there on, where neither holds


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """The protocol of the paired evaluation."""

    episodes: Annotated[int, Within(0, 100_000)] = 256  # 0: sft on a given dataset trains and simulates nothing
    # held-out seeds are first_seed … first_seed + episodes − 1
    first_seed: Annotated[int, Within(900_000_000, 2**31 - 1_000_000)] = 900_000_000
    scenes: tuple[str, ...] = ()  # robocasa: the held-out seeds take these in turn, as many episodes in each
    objects: str = ""  # robocasa: the split of their objects
    noise_seed: Annotated[int, Within(0, 2**31 - 1)] = 0  # of the sampler's initial noise
    confidence: Annotated[float, Within(0.5, 0.9999)] = 0.95  # of all intervals
    # the first held-out seeds, so many, are filmed: before and after RL, or with an evaluated policy
    videos: Annotated[int, Within(0, 64)] = 4
    film_seeds: tuple[str, ...] = ()  # the seeds that are filmed instead of those, e.g. 900000007,12
    video_size: Annotated[int, Within(16, 1024)] = 160  # pixels
    # evaluate: words that the robot is told in place of others, e.g. left:right,right:left; a test that it listens
    words: tuple[str, ...] = ()

    @property
    def told(self) -> dict[str, str]:
        """Word of an instruction -> what is said instead."""
        return dict(pair.split(":") for pair in self.words)

    @property
    def filmed(self) -> tuple[int, ...]:
        """The seeds that are filmed, chosen before anything has run on them."""
        if self.film_seeds:
            return tuple(map(int, self.film_seeds))
        return tuple(range(self.first_seed, self.first_seed + min(self.videos, self.episodes)))


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; data = −1 takes the rest."""

    data: Annotated[int, Within(-1, 65_536)] = -1  # copies of the model, each with its share of the batch
    fsdp: Annotated[int, Within(1, 65_536)] = 1  # devices that share parameters and batch
    tensor: Annotated[int, Within(1, 65_536)] = 1  # devices that share each matrix product


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """Where numbers go besides the console and metrics.jsonl."""

    tensorboard: bool = False  # in the run directory; needs the extra log
    wandb: bool = False  # project z1-jax; needs the extra log
    every: Annotated[int, Within(1, 10_000_000)] = 50  # SFT steps between reports
    # Iterations of GRPO whose trace is written to RUN_DIR/profile, by their step in metrics.jsonl (the first is 0),
    # e.g. 3,4; for TensorBoard's profile plug-in, XProf or Perfetto.
    profile: tuple[str, ...] = ()

    @property
    def profiled(self) -> frozenset[int]:
        """`profile` as numbers."""
        return frozenset(map(int, self.profile))


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that a run depends on."""

    algorithm: str = "grpo"  # grpo: demonstrations → SFT → GRPO → paired evaluation; sft: without GRPO; eval
    task: str = "TurnOnSinkFaucet"  # of the suite
    tasks: tuple[str, ...] = ()  # several in one run, in place of task: names, and sets of the suite, e.g. kitchen24
    seed: Annotated[int, Within(0, 9_999)] = 0  # of demonstrations, parameters, data order and rollouts
    run_dir: str = ""  # empty: runs/<algorithm>-<task>-seed<seed>, runs/eval-<task>-<fingerprint>
    # A run directory or checkpoint: grpo starts from its policy, without SFT; sft trains it on. "random", for grpo in a
    # suite without demonstrations: an untrained policy, which shows that everything works.
    init: str = ""
    # eval: the policy to evaluate, a run directory or checkpoint, or the address of a server, ws://HOST:PORT. --policy=
    # is short for this key.
    checkpoint: str = ""
    compare: str = ""  # eval: the base A that it, B, is compared with on the same seeds
    allow: tuple[str, ...] = ()  # task, rate, images: may differ between the dataset or policy and the environments
    env: EnvConfig = dataclasses.field(default_factory=EnvConfig)
    rollout: RolloutConfig = dataclasses.field(default_factory=RolloutConfig)
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    inputs: InputsConfig = dataclasses.field(default_factory=InputsConfig)
    demos: DemosConfig = dataclasses.field(default_factory=DemosConfig)
    sft: SftConfig = dataclasses.field(default_factory=SftConfig)
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
    group: GroupConfig = dataclasses.field(default_factory=GroupConfig)
    flow: FlowConfig = dataclasses.field(default_factory=FlowConfig)
    reward: RewardConfig = dataclasses.field(default_factory=RewardConfig)
    update: UpdateConfig = dataclasses.field(default_factory=UpdateConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    selective: SelectiveConfig = dataclasses.field(default_factory=SelectiveConfig)
    eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    log: LogConfig = dataclasses.field(default_factory=LogConfig)

    @property
    def directory(self) -> pathlib.Path:
        """The run directory, absolute."""
        which = fingerprint(self)[:8] if self.algorithm == "eval" else f"seed{self.seed}"  # one of each set of policies
        # A class or function of the user's own, by its name.
        named = self.env.suite.rpartition(":")[2].replace("/", "-")
        suite = f"{named}-" * (self.env.suite != "kitchen") + "standins-" * self.env.standins
        tasks = "+".join(self.every_task).replace("/", "-")
        if len(self.every_task) > 2:
            digest = hashlib.sha256(tasks.encode()).hexdigest()[:6]
            tasks = f"{len(self.every_task)}tasks-{digest}"
        return absolute(self.run_dir or f"runs/{self.algorithm}-{suite}{tasks}-{which}")

    @property
    def every_task(self) -> tuple[str, ...]:
        """The tasks of the run, once sets are resolved (`suites.settled`)."""
        return self.tasks or (self.task,)

    @property
    def task_words(self) -> str:
        """The tasks in a sentence."""
        tasks = self.every_task
        return tasks[0] if len(tasks) == 1 else " and ".join(tasks) if len(tasks) == 2 else f"{len(tasks)} tasks"


RANDOM = "random"  # config.init: an untrained policy

# Keys that may change between two invocations of one run: they move no number.
FREE_KEYS = (
    "run_dir",
    "allow",
    "log",
    "env.workers",
    "env.python",
    "env.timeout_s",
    "env.simulators",
    "rollout.backend",
    "rollout.address",
    "train.checkpoint_every",
    "train.keep_last",
    "train.keep_every",
    "train.keep_best",
    "sft.checkpoint_every",
    "sft.keep_last",
    "sft.keep_every",
    "update.prefix_cache",
)


# Keys under which a run that has begun can go on when it is forced to: what is there still fits, but its numbers are of
# two configs.
FORCIBLE = (
    "env.parallel",
    "model.remat",
    "model.attention",
    "model.acting",
    "sft.micro_batch",
    "sft.flows",
    "sft.loss_dims",
    "sft.augment",
    *(f"sft.optim.{key}" for key in ("lr", "warmup_steps", "lr_end", "b1", "b2", "eps", "weight_decay", "clip_norm")),
    "group",
    "reward",
    "update",
    "flow.noise_level",
    "flow.noise_level_end",
    "flow.noise_schedule",
    "flow.sde_steps",
    "flow.last_step",
    "flow.logprob_reduce",
    "flow.logprob_coords",
    "train.stop_success",
    "train.stop_window",
    "eval.confidence",
    "eval.videos",
    "eval.film_seeds",
    "eval.video_size",
)

# Keys that fingerprints did not know, and their defaults.
_YOUNGER: dict[str, Any] = {
    "env.options": [],
    "env.protocol": "openpi",
    "env.train_on": "placements",
    "model.acting": "auto",
    "inputs.relative_actions": [],
    "tasks": [],
    "demos.sampling": "proportional",
    "group.spread": "uniform",
    "group.floor": 0.25,
    "group.oversample": 1.0,
    "flow.temperature": -1.0,
    "rollout.overlap": False,
    "eval.words": [],
    "sft.validation": 0.0,
    "sft.micro_batch": 0,
}


def defaults(**overrides: Any) -> ml_collections.ConfigDict:
    """The default configuration as a ConfigDict, for configs/*.py; `overrides` are dotted keys (`a__b` for `a.b`)."""
    config = ml_collections.ConfigDict(dataclasses.asdict(Config()))
    for key, value in overrides.items():
        *sections, leaf = key.split("__")
        node = config
        for section in sections:
            node = node[section]
        node[leaf] = value
    return config.lock()


def build(cls: type, values: dict[str, Any], prefix: str = "") -> Any:
    """A config dataclass from nested values, of the right types but otherwise unchecked; `prefix` is its own key.

    Raises:
        ConfigError: an unknown key or a value of the wrong type.
    """
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in hints:
            close = difflib.get_close_matches(key, hints, n=1)
            hint = f"; did you mean {prefix}{close[0]}?" if close else f"; known: {', '.join(hints)}"
            raise ConfigError(f"config key {prefix}{key} does not exist{hint}")
    built = {}
    for key, kind in hints.items():
        name = prefix + key
        if key not in values:
            continue
        value = values[key]
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            if not isinstance(value, dict):
                raise ConfigError(f"config key {name}: got {value!r}, expected a section of keys")
            built[key] = build(kind, value, name + ".")
        elif kind is float and isinstance(value, int) and not isinstance(value, bool):
            built[key] = float(value)
        elif typing.get_origin(kind) is tuple:
            if not isinstance(value, (tuple, list)) or not all(isinstance(v, str) for v in value):
                raise ConfigError(f"config key {name}: got {value!r}, expected a tuple of names")
            built[key] = tuple(value)
        elif type(value) is not kind:
            raise ConfigError(f"config key {name}: got {value!r} ({type(value).__name__}), expected {kind.__name__}")
        else:
            built[key] = value
    return cls(**built)


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """Every leaf of a config dataclass by its dotted key."""
    leaves: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            leaves |= flat(value, f"{prefix}{field.name}.")
        else:
            leaves[prefix + field.name] = list(value) if isinstance(value, tuple) else value
    return leaves


def ranges(cls: type = Config, prefix: str = "") -> dict[str, Within]:
    """What each number may be, by its dotted key."""
    found: dict[str, Within] = {}
    for name, kind in typing.get_type_hints(cls, include_extras=True).items():
        if dataclasses.is_dataclass(kind):
            found |= ranges(typing.cast(type, kind), f"{prefix}{name}.")
        for bounds in getattr(kind, "__metadata__", ()):
            found[prefix + name] = bounds
    return found


def identity(config: Config) -> dict[str, Any]:
    """The leaves that a run's numbers depend on: what two invocations of one run directory must share."""
    frees = FREE_KEYS + ("eval.videos", "eval.film_seeds") * (config.algorithm == "eval")  # films what is lacking
    return {key: value for key, value in flat(config).items() if not among(key, frees)}


def among(key: str, names: Sequence[str]) -> bool:
    """Whether a dotted key is one of these names, or in a section of that name."""
    return any(key == name or key.startswith(name + ".") for name in names)


def lengths(config: Config) -> tuple[str, ...]:
    """The keys that may change in a run directory because they only say how far training goes: see `extending`."""
    if config.algorithm == "sft":
        return ("sft.steps",)
    if config.algorithm == "grpo":
        return ("train.iterations",) if config.init else ("sft.steps", "train.iterations")
    return ()


def fingerprint(config: Config) -> str:
    """Short hash of `identity`, without younger keys that are at their default: it stays what it was."""
    values = {key: value for key, value in identity(config).items() if key not in _YOUNGER or value != _YOUNGER[key]}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]
