"""What a conversion prints when it is done: the table of parts, what goes with the weights, and what is missing."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from z1_jax.convert import arrays, companions, targets
from z1_jax.convert.arrays import Piece
from z1_jax.convert.companions import Stats
from z1_jax.convert.sources import Format, Source
from z1_jax.convert.store import TensorInfo
from z1_jax.convert.transfer import PartSummary
from z1_jax.data.relative import relative_from_json
from z1_jax.models.pi05 import Pi05Config


@dataclasses.dataclass(frozen=True)
class Model:
    """Everything in a checkpoint except its arrays."""

    config: Pi05Config
    pieces: list[Piece]
    document: dict[str, Any]  # as a policy of ours stores it
    stats: Stats | None
    tokenizer: bytes | None
    untold: tuple[str, ...] = ()  # settings that are only assumed


def print_table(
    source: Source, model: Model, summaries: Mapping[str, PartSummary], infos: Mapping[str, TensorInfo]
) -> None:
    """Prints counts, dtypes and checksum of each part, then unused arrays and what goes with the weights."""
    rows = [("part", "tensors", "parameters", "dtype", "stored as", "checksum")]
    for name, part in summaries.items():
        dtypes = ("+".join(sorted(part.source_dtypes)), "+".join(sorted(part.dtypes)))
        rows.append((name, str(part.tensors), f"{part.parameters:,}", *dtypes, part.checksum))
    count, parameters = (sum(getattr(p, f) for p in summaries.values()) for f in ("tensors", "parameters"))
    rows.append(("all", str(count), f"{parameters:,}", "", f"{sum(i.nbytes for i in infos.values()) / 1e9:.2f} GB", ""))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print(
            "  ".join(
                cell.rjust(w) if 0 < i < 3 else cell.ljust(w)
                for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
        )
    if arrays.UNUSED_HEAD in source.tensors:
        shape = list(source.tensors[arrays.UNUSED_HEAD].shape)
        print(f"not used: {arrays.UNUSED_HEAD} {shape}: the action expert predicts no tokens")
    for note in source.notes:
        print(note)
    config, document = model.config, model.document
    print(
        f"architecture: heads {config.language.heads} of {config.language.head_dim}, {config.cameras} cameras of "
        f"{config.vision.image_size} pixels ({config.vision.tokens} tokens each), prompt {config.prompt_length}, "
        f"actions {config.horizon} x {config.action_dim}"
    )
    width = document["prompt_state_dim"]
    padded = f", padded to {width} numbers" if width else ""
    print(f"prompt: {f'holds the state{padded}' if document['state_in_prompt'] else 'holds no state'}")
    print(f"actions: {relative_words(model)}")
    if document["ignored"]:
        print(f"ignored as without effect: {', '.join(document['ignored'])}")
    if model.stats:
        dims = ", ".join(f"{key} {value.dim}" for key, value in model.stats.items())
        print(f"statistics: {dims}; {document['norm_mode']} normalisation")
    else:
        print("statistics: none")
    identity = document["tokenizer_sha256"]
    name = document["tokenizer_name"] or f"a SentencePiece model of {config.vocab_size} tokens"
    print(f"tokenizer: {name}, {f'SHA-256 {identity[:12]}…' if identity else 'its file does not travel with it'}")


def relative_words(model: Model) -> str:
    """Whether actions are absolute or relative, and whether the source or a flag said so."""
    if relative := relative_from_json(model.document["relative_actions"]):
        return relative.words
    untold = "relative_actions" in model.untold
    hint = "; nothing in openpi's checkpoints tells: give --relative-actions=6,-1 if it was trained with DeltaActions"
    return f"absolute{hint * untold}"


def advice(format: Format, place: pathlib.Path, model: Model) -> str:
    """What the result still needs before it can act."""
    if format == "lerobot":
        sizes = "; LeRobot has no name for these sizes: its config.json says gemma_2b, z1_jax.json has the real ones"
        padded = "; only LeRobot 0.4.4 and older pads the state in its prompts: do not run it with a newer one"
        named = companions.is_published_size(model.config)
        return ("" if named else sizes) + (padded if model.document["prompt_state_dim"] else "")
    if format != "ours":
        return openpi_advice(model.document)
    missing = []
    if not model.tokenizer:
        missing.append(f"a tokenizer: put its .model file at {place / str(targets.STEP) / companions.TOKENIZERS[0]}")
    if not model.stats:
        missing.append("normalisation statistics: convert again with --norm-stats=FILE")
    return f"; before it can act it needs {' and '.join(missing)}" if missing else ""


def openpi_advice(document: Mapping[str, Any]) -> str:
    """What openpi's training config has to say to use the result: its checkpoints do not hold it."""
    config = f"action_horizon={document['horizon']}, discrete_state_input={document['state_in_prompt']}"
    quantile = "" if document["norm_mode"] == "quantile" else ", use_quantile_norm=False"
    if relative := relative_from_json(document["relative_actions"]):
        config += f", and its data DeltaActions and AbsoluteActions with the mask {relative.mask}"
    width = document["prompt_state_dim"]
    padded = f"; openpi cannot pad the state in the prompt to {width} numbers, as this policy has it" if width else ""
    return f"; openpi's config must say pi05=True, {config}{quantile}{padded}"
