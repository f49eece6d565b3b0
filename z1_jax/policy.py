"""A policy: network, parameters and everything that turns observations into its inputs and its outputs into actions.

Saved whole: a checkpoint without its statistics and tokenizer is not a policy.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from z1_jax.checkpoint import CheckpointError, Checkpoints
from z1_jax.config.schema import LoraConfig
from z1_jax.data.normalize import NormMode, NormStats, stats_from_json, stats_to_json
from z1_jax.data.relative import RelativeActions, relative_from_json
from z1_jax.data.tokenizer import PromptTokenizer, load_tokenizer
from z1_jax.data.transforms import InputProcessor
from z1_jax.files import absolute
from z1_jax.models import lora, pi05
from z1_jax.models.gemma import GemmaConfig
from z1_jax.models.params import initialise
from z1_jax.models.siglip import SiglipConfig
from z1_jax.sharding import param_sharding

STAGES = ("grpo", "sft")  # where a run keeps policies, the later stage first
BEST = "@best"  # after a path: see `find_policy`
OPENPI_SLOTS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")  # cameras of a policy that names no others
TOKENIZER = "tokenizer.model"  # in a step's folder, where a conversion had none to store


@dataclasses.dataclass(frozen=True)
class Policy:
    """A network with its parameters and its processor.

    Attributes:
        executed: E, steps of each predicted chunk of H that the environment runs before the policy looks again.
        denoising_steps: K that the policy acts with.
        temperature: scale of the noise that it starts from when it acts, 0 … 1.
        world: what it was trained in, where that is known: "tasks", "instructions" (lists) and "rate" (Hz).
    """

    config: pi05.Pi05Config
    graphdef: nnx.GraphDef
    params: nnx.State
    processor: InputProcessor
    executed: int
    denoising_steps: int
    world: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    temperature: float = 1.0

    def with_params(self, *states: nnx.State) -> Policy:
        """The same policy with other parameters, adapters folded into their kernels."""
        return dataclasses.replace(self, params=lora.fold(nnx.merge_state(*states)))

    def without_params(self) -> Policy:
        """The same policy without its arrays, so that they can be freed."""
        return dataclasses.replace(self, params=nnx.State({}))

    def with_compute(self, remat: str, attention: str, acting: str = "auto") -> Policy:
        """The same policy with other settings of the computation: they move no number but by rounding."""
        config = dataclasses.replace(self.config, remat=remat, attention=attention, acting=acting)
        graphdef, _ = nnx.split(pi05.abstract_model(config))
        return dataclasses.replace(self, config=config, graphdef=graphdef)

    def split(
        self, scope: str, adapters: LoraConfig | None = None, seed: int = 0
    ) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
        """(graphdef, trainable, frozen) for a training scope, see `pi05.is_trained`.

        Trainable parameters are float32. Where the policy computes in bfloat16, frozen ones are bfloat16 too, except
        those that are used in float32. Scope lora adds adapters (default: those of LoraConfig), drawn from `seed` onto
        the policy's mesh; put together again by `with_params`.
        """
        model = nnx.merge(self.graphdef, self.params)
        if scope == "lora":
            model = self._adapted(model, adapters or LoraConfig(), seed)
        return pi05.split_model(model, scope, "bfloat16" if self.config.dtype == "bfloat16" else None)

    def _adapted(self, model: pi05.Pi05, adapters: LoraConfig, seed: int) -> pi05.Pi05:
        vlm, expert = (adapters.vlm_rank, adapters.vlm_alpha), (adapters.expert_rank, adapters.expert_alpha)
        wanted: dict[pi05.Part, tuple[int, float]] = {"vision": vlm, "language": vlm, "expert": expert}
        graphdef, params = nnx.split(
            pi05.add_adapters(model, {part: size for part, size in wanted.items() if size[0] > 0})
        )
        like = jax.tree.leaves(self.params)[0]
        mesh: Any = like.sharding.mesh if isinstance(like.sharding, jax.sharding.NamedSharding) else None
        if isinstance(like, jax.ShapeDtypeStruct):  # a plan: nothing is drawn
            return nnx.merge(graphdef, _placed(params, mesh))
        return nnx.merge(graphdef, initialise(params, seed, mesh))

    def document(self) -> dict[str, Any]:
        """What `load_policy` needs besides the arrays."""
        processor = self.processor
        return {
            "architecture": dataclasses.asdict(self.config),
            "norm_stats": stats_to_json(processor.stats),
            "norm_mode": processor.norm_mode,
            "cameras": list(processor.cameras),
            "state_in_prompt": processor.state_in_prompt,
            "prompt_state_dim": processor.prompt_state_dim,
            "relative_actions": processor.relative.to_json() if processor.relative else None,
            "clip": processor.clip,
            "tokenizer_sha256": processor.tokenizer.identity,
            "executed": self.executed,
            "denoising_steps": self.denoising_steps,
            "world": dict(self.world),
            **({} if self.temperature == 1 else {"temperature": self.temperature}),
        }

    def parts(self) -> dict[str, Any]:
        """The arrays of a checkpoint: parameters by name, and the tokenizer's bytes."""
        model = self.processor.tokenizer.model_bytes
        return {"params": named(self.params), "assets": {"tokenizer": np.frombuffer(model, np.uint8)}}


def named(tree: Any) -> dict[str, Any]:
    """Leaves by their dotted path."""

    def name(path: tuple[Any, ...]) -> str:
        parts = (getattr(k, "key", getattr(k, "name", getattr(k, "idx", None))) for k in path)
        return ".".join(str(part) for part in parts if part != "value")

    return {name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def unnamed(like: Any, leaves: Mapping[str, Any]) -> Any:
    """The tree of `like`'s structure with the leaves of `named`."""
    return jax.tree.unflatten(jax.tree.structure(like), [leaves[name] for name in named(like)])


def fresh_policy(
    config: pi05.Pi05Config,
    processor: InputProcessor,
    seed: int,
    mesh: jax.sharding.Mesh,
    *,
    executed: int,
    denoising_steps: int,
    temperature: float = 1.0,
) -> Policy:
    """A policy with random parameters, to be trained from scratch.

    Neighbouring state bins start alike where each is one token.
    """
    model_key, number_key = jax.random.split(jax.random.key(seed))
    model = pi05.init_model(config, model_key, mesh)
    ids = processor.tokenizer.number_ids()
    if ids is not None:
        table = model.language.embedding
        table.set_value(pi05.smooth_number_embedding(table.get_value(), jnp.asarray(ids), number_key))
    graphdef, params = nnx.split(model)
    params = jax.device_put(params, param_sharding(params, mesh))
    return Policy(config, graphdef, params, processor, executed, denoising_steps, temperature=temperature)


def make_processor(
    config: pi05.Pi05Config,
    tokenizer: PromptTokenizer,
    stats: Mapping[str, NormStats],
    cameras: Sequence[str | None],
    *,
    norm_mode: NormMode = "quantile",
    state_in_prompt: bool = True,
    relative: RelativeActions | None = None,
) -> InputProcessor:
    """The processor of a policy on RoboCasa's action interface (raw actions within [−1, 1]).

    `cameras` fill the model's slots in order; None, and slots beyond the last, have none.
    """
    return InputProcessor(
        tokenizer=tokenizer,
        stats=stats,
        cameras=(*cameras, *[None] * (config.cameras - len(cameras))),
        image_size=config.vision.image_size,
        action_dim=config.action_dim,
        norm_mode=norm_mode,
        state_in_prompt=state_in_prompt,
        clip=(-1.0, 1.0),
        relative=relative,
    )


def abstract_params(config: pi05.Pi05Config, mesh: jax.sharding.Mesh) -> tuple[nnx.GraphDef, nnx.State]:
    """The network's graph and its parameters as shapes with their shardings."""
    graphdef, state = nnx.split(pi05.abstract_model(config))
    return graphdef, _placed(state, mesh)


def _placed(state: nnx.State, mesh: jax.sharding.Mesh) -> nnx.State:
    """Shapes with the shardings of the parameters that they stand for."""
    shardings = param_sharding(state, mesh)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings)


def load_policy(
    checkpoints: Checkpoints,
    step: int,
    mesh: jax.sharding.Mesh,
    missing_stats: Mapping[str, NormStats] | None = None,
) -> Policy:
    """The policy of a checkpoint, each parameter placed straight onto its shards, in the dtype that it was saved in.

    Args:
        missing_stats: the statistics of a policy that was converted without any.

    Raises:
        CheckpointError: absent, damaged, not a policy of this project, or without statistics.
    """
    document = checkpoints.document(step)
    try:
        config = architecture(document["architecture"])
        stats = stats_from_json(document["norm_stats"]) or dict(missing_stats or {})
        graphdef, abstract = abstract_params(config, mesh)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"checkpoint {checkpoints.directory / str(step)} holds no policy ({error})") from error
    folder = checkpoints.directory / str(step)
    if not stats:
        raise CheckpointError(
            f"checkpoint {folder} was converted without normalisation statistics: fine-tune it first (configs/sft.py, "
            "which takes those of the dataset), or convert it again with --norm-stats=FILE"
        )
    tokenizer = _tokenizer(checkpoints, step, config, document)
    stored = checkpoints.arrays(step, "params")
    wanted = {name: leaf.update(dtype=stored.get(name, leaf).dtype) for name, leaf in named(abstract).items()}
    loaded = checkpoints.load(step, {"params": wanted})["params"]
    try:
        processor = InputProcessor(
            tokenizer=tokenizer,
            stats=stats,
            cameras=tuple(document["cameras"]),
            image_size=config.vision.image_size,
            action_dim=config.action_dim,
            norm_mode=document["norm_mode"],
            state_in_prompt=document["state_in_prompt"],
            prompt_state_dim=document.get("prompt_state_dim"),
            relative=relative_from_json(document.get("relative_actions")),
            clip=tuple(document["clip"]) if document["clip"] else None,
        )
        executed, denoising_steps = document["executed"], document["denoising_steps"]
        world, temperature = dict(document.get("world") or {}), float(document.get("temperature", 1.0))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"checkpoint {checkpoints.directory / str(step)} holds no policy ({error})") from error
    params = unnamed(abstract, loaded)
    return Policy(config, graphdef, params, processor, executed, denoising_steps, world, temperature)


def _tokenizer(
    checkpoints: Checkpoints, step: int, config: pi05.Pi05Config, document: Mapping[str, Any]
) -> PromptTokenizer:
    """The tokenizer that a checkpoint holds, or, of a converted one, the file that was put beside it."""
    folder = checkpoints.directory / str(step)
    identity = document.get("tokenizer_sha256")
    if checkpoints.checksums(step, "assets"):
        size = checkpoints.arrays(step, "assets")["tokenizer"].shape
        loaded = checkpoints.load(step, {"assets": {"tokenizer": np.empty(size, np.uint8)}})
        content = np.asarray(loaded["assets"]["tokenizer"]).tobytes()
        tokenizer = PromptTokenizer.from_bytes(content, config.prompt_length)
    elif (folder / TOKENIZER).is_file():
        try:
            tokenizer = load_tokenizer(folder / TOKENIZER, config.prompt_length, config.vocab_size)
        except ValueError as error:
            raise CheckpointError(str(error)) from error
        identity = identity or tokenizer.identity
    else:
        name = document.get("tokenizer_name") or "SentencePiece"
        raise CheckpointError(
            f"checkpoint {folder} was converted without its tokenizer: put {name}'s tokenizer.model "
            f"({config.vocab_size:,} tokens) at {folder / TOKENIZER}, or convert again with --tokenizer=FILE"
        )
    if tokenizer.identity != identity:
        raise CheckpointError(f"checkpoint {folder} holds another tokenizer than it names")
    return tokenizer


def architecture(values: Mapping[str, Any]) -> pi05.Pi05Config:
    """The configuration that a checkpoint's document holds. Raises KeyError, TypeError or ValueError."""
    parts = {
        "vision": SiglipConfig(**values["vision"]),
        "language": GemmaConfig(**values["language"]),
        "expert": GemmaConfig(**values["expert"]),
    }
    return pi05.Pi05Config(**{**values, **parts})


def find_policy(path: str | pathlib.Path) -> tuple[pathlib.Path, int]:
    """The newest policy at `path`: a run directory, a directory of checkpoints, or one checkpoint.

    PATH@best is the one of a run's RL (or of a directory of checkpoints) with the highest training success, which
    `train.keep_best` keeps.

    Returns:
        The directory of checkpoints and the step.

    Raises:
        CheckpointError: nothing of the kind is there.
    """
    place, best = split_best(path)
    root = absolute(place)
    if best:
        return _best_policy(root)
    if root.name.isdigit() and (root / "params").is_dir():
        return root.parent, int(root.name)
    for directory in (*(root / "checkpoints" / stage for stage in STAGES), root):
        if steps := policy_steps(directory):
            return directory, max(steps)
    raise CheckpointError(
        f"no policy at {root}; expected a run directory, a directory of checkpoints, or one checkpoint in it"
    )


def split_best(path: str | pathlib.Path) -> tuple[str, bool]:
    """A path without @best, and whether it had it."""
    return str(path).removesuffix(BEST), str(path).endswith(BEST)


def policy_steps(directory: pathlib.Path) -> list[int]:
    """Steps of the policies in a directory of checkpoints, ascending; looks at names alone."""
    return sorted(int(p.name) for p in directory.glob("*") if p.name.isdigit() and (p / "params").is_dir())


def _best_policy(root: pathlib.Path) -> tuple[pathlib.Path, int]:
    for directory in (root / "checkpoints" / "grpo", root):
        if policy_steps(directory):
            checkpoints = Checkpoints(directory)
            found = checkpoints.best()
            checkpoints.close()
            if found:
                return directory, found[0]
            raise CheckpointError(
                f"no checkpoint in {directory} has been rated yet: RL rates them by training success over "
                "train.keep_best iterations, once that many have passed"
            )
    raise CheckpointError(f"no policy of RL at {root}; {BEST} is for a run directory or its checkpoints of RL")
