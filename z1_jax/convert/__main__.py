"""python -m z1_jax.convert SRC DST: π0.5 checkpoints of openpi (Orbax, PyTorch) and LeRobot → ours, and back with --to.

The names and shapes of SRC's arrays tell its format and the model's sizes. Every array of SRC is used once, or known to
be unused; any other is an error. DST appears whole or not at all.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from z1_jax.convert import arrays, companions, targets
from z1_jax.convert.architecture import check_tensors, read_architecture
from z1_jax.convert.arrays import Piece
from z1_jax.convert.companions import Stats
from z1_jax.convert.keys import Ignored
from z1_jax.convert.lerobot import prompt_state_dim
from z1_jax.convert.options import given_settings, parse_arguments
from z1_jax.convert.policy_card import policy_card
from z1_jax.convert.sources import FORMATS, Format, Source, describe, open_source, source_settings
from z1_jax.convert.store import DTYPES, FormatError, TensorInfo, Writer
from z1_jax.convert.summary import Model, advice, print_table
from z1_jax.convert.transfer import End, PartSummary, chunks, target_tensors, transfer
from z1_jax.data.normalize import stats_from_json, stats_to_json
from z1_jax.data.relative import relative_from_json
from z1_jax.data.tokenizer import PALIGEMMA, PALIGEMMA_VOCAB_SIZE, load_tokenizer
from z1_jax.files import absolute
from z1_jax.models.pi05 import Pi05Config
from z1_jax.policy import OPENPI_SLOTS, architecture
from z1_jax.process import run_main

_ASSUMED = {"horizon": 50, "state_in_prompt": True}  # by --describe, where nothing tells; it says so
_DEFAULTS = {"denoising_steps": 10, "norm_mode": "quantile", "clip": None}


def main(argv: Sequence[str]) -> int:
    """Converts, prints the table, and says what to do next."""
    given = parse_arguments(argv[1:])
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the cleaning up is the same
    try:
        return convert(given)
    except KeyboardInterrupt:
        print("\ninterrupted: nothing was written", file=sys.stderr)
        return 130


def convert(given: argparse.Namespace) -> int:
    """The conversion that the command line asks for."""
    if given.describe:
        return describe_policy(given)
    source_path, place = (absolute(path) for path in (given.src, given.dst))
    if place.resolve().is_relative_to(source_path.resolve()):
        raise FormatError(f"DST {place} lies in SRC {source_path}, which stays as it is; choose another DST")
    source = open_source(source_path, given.base and absolute(given.base), given.lora_alpha)
    try:
        format = target_format(given.to, source)
        model = read_model(source, given)
        if format == "lerobot":
            companions.require_lerobot(model.document, given.pad_state is not None)
        end = targets.end_of(format)
        infos = target_tensors(model.pieces, end, dtype_rule(given.dtype, source, end.style))
        print(f"{source_path}: {describe(source)}", flush=True)
        if given.dry_run:
            summaries = run_transfer(source, model, None, end, infos)
            print_table(source, model, summaries, infos)
            print("dry run: nothing was written")
            return 0
        targets.require_space(place, infos)
        began = time.perf_counter()
        with targets.written_aside(place) as folder:
            writer = targets.open_writer(format, folder, infos, chunks(model.pieces, end))
            try:
                summaries = run_transfer(source, model, writer, end, infos)
                targets.finish(
                    format, folder, writer, model.config, model.document, model.stats, model.tokenizer, summaries
                )
            finally:
                writer.abandon()
    finally:
        source.reader.close()
    print_table(source, model, summaries, infos)
    print(f"written to {place} in {time.perf_counter() - began:.0f} s{advice(format, place, model)}")
    return 0


def describe_policy(given: argparse.Namespace) -> int:
    """Prints how the policy of SRC wants to be driven. Settings that neither files nor flags give stay open."""
    source = open_source(absolute(given.src), given.base and absolute(given.base), given.lora_alpha)
    try:
        model = read_model(source, given)
    finally:
        source.reader.close()
    print(f"{source.path}: {describe(source)}")
    for note in source.notes:
        print(note)
    print(policy_card(model.config, model.document, model.stats, model.untold))
    return 0


def target_format(asked: Format | None, source: Source) -> Format:
    """The format of DST. Raises FormatError where no flag says which."""
    if asked is None and source.format == "ours":
        raise FormatError(f"{source.path} is ours already; say what DST shall be: --to={' or --to='.join(FORMATS[1:])}")
    return asked or "ours"


def read_model(source: Source, given: argparse.Namespace) -> Model:
    """Sizes, pieces and companions of a source, after checking that every array is used or known to be unused."""
    ignored, asked = Ignored(given.ignore), given_settings(given)
    found = source_settings(source, ignored)
    settings = {**_DEFAULTS, **found, **asked}
    untold = tuple(name for name in _ASSUMED if given.describe and name not in settings and source.document is None)
    settings |= {name: _ASSUMED[name] for name in untold}
    if given.describe and settings.get("pads_state", False) is None and "prompt_state_dim" not in asked:
        settings["prompt_state_dim"], untold = None, (*untold, "pad_state")
    if "relative_actions" not in settings and source.document is None:
        untold = (*untold, "relative_actions")
    refuse_contradictions(source, found, asked, ("norm_mode",))
    if source.document is not None:
        refuse_contradictions(source, found, asked, ("heads", "vision_heads", "horizon", "prompt_length"))
        try:
            config = architecture(source.document["architecture"])
        except (KeyError, TypeError, ValueError) as error:
            raise FormatError(f"{source.path} holds no policy ({error})") from None
    else:
        cameras = settings.get("cameras")
        slots = {"camera_slots": len(cameras)} if cameras else {}
        config = read_architecture(source.shapes, source.end.style, {**settings, **slots})
    pieces = arrays.pieces(config)
    expected = arrays.shapes(pieces, source.end.style)
    check_tensors(source.shapes, expected, [arrays.UNUSED_HEAD], str(source.path))
    stats, asset_id = read_statistics(source, given, settings, ignored)
    check_relative(source, found, asked, settings, stats)
    settings |= prompt_settings(source, settings, asked, stats, asset_id)
    settings["ignored"] = sorted({*settings.get("ignored", ()), *ignored.finish()})
    tokenizer = read_tokenizer(source, given, settings, config)
    document = make_document(config, settings, stats, asset_id, tokenizer)
    return Model(config, pieces, document, stats, tokenizer, untold)


def refuse_contradictions(
    source: Source, found: Mapping[str, Any], asked: Mapping[str, Any], names: Sequence[str]
) -> None:
    """Raises FormatError where a flag contradicts what the source says of itself."""
    for name in names:
        if name in asked and asked[name] != found.get(name, asked[name]):
            raise FormatError(
                f"--{name.replace('_', '-')}={asked[name]} was given, {source.path} has {found[name]}; leave it out"
            )


def check_relative(
    source: Source, found: Mapping[str, Any], asked: Mapping[str, Any], settings: Mapping[str, Any], stats: Stats | None
) -> None:
    """Raises FormatError where the flag contradicts the source, or actions or state lack a relative dimension."""
    known, relative = (relative_from_json(values.get("relative_actions")) for values in (found, settings))
    if "relative_actions" in asked and "relative_actions" in found:
        if (known.dims if known else ()) != (relative.dims if relative else ()):
            told = known.words if known else "all actions are absolute"
            raise FormatError(f"--relative-actions was given, {source.path} says that {told}; leave it out")
    if relative and stats:
        try:
            relative.check(stats["actions"].dim, stats["state"].dim)
        except ValueError as error:
            raise FormatError(f"--relative-actions: {error}") from None


def prompt_settings(
    source: Source,
    settings: Mapping[str, Any],
    asked: Mapping[str, Any],
    stats: Stats | None,
    asset_id: str | None,
) -> dict[str, Any]:
    """Whether the state goes into the prompt, and the width that it is padded to there.

    Raises:
        FormatError: neither source nor flags tell, or a flag contradicts the source or would have no effect.
    """
    if "state_in_prompt" not in settings:
        libero = asset_id == "physical-intelligence/libero"
        hint = f"; its statistics are {asset_id}, and openpi trained pi05_libero without" if libero else ""
        raise FormatError(
            f"nothing in {source.path} tells whether the state stands in the prompt; give --state-in-prompt (openpi's "
            f"pi05_base, pi05_droid) or --no-state-in-prompt (pi05_libero: discrete_state_input=False){hint}"
        )
    if "pads_state" in settings and not settings["state_in_prompt"]:
        raise FormatError(f"--no-state-in-prompt was given, {source.path} is LeRobot's, whose prompts hold the state")
    state_dim = stats["state"].dim if stats else None
    width = asked.get("prompt_state_dim")
    if width is not None and not settings["state_in_prompt"]:
        raise FormatError(f"--pad-state={width} has no effect on a prompt that holds no state; leave it out")
    if width is not None and state_dim is not None and width <= state_dim:
        raise FormatError(f"--pad-state={width} pads nothing: the state has {state_dim} numbers; leave it out")
    if not settings["state_in_prompt"]:
        return {"state_in_prompt": False, "prompt_state_dim": None}
    return {"state_in_prompt": True, "prompt_state_dim": prompt_state_dim(settings, state_dim, source.path)}


def read_statistics(
    source: Source, given: argparse.Namespace, settings: Mapping[str, Any], ignored: Ignored
) -> tuple[Stats | None, str | None]:
    """(statistics, asset id): from the flag, our document, or the files beside the weights. None only if asked for."""
    asset_id = given.asset_id or settings.get("asset_id")
    if given.norm_stats == "none":
        return None, asset_id
    if given.norm_stats is not None:
        return companions.read_norm_stats(absolute(given.norm_stats), settings["norm_mode"], ignored), asset_id
    if source.document is not None:
        return stats_from_json(source.document["norm_stats"]) or None, asset_id
    stats, asset_id = companions.read_stats(source.folder, given.asset_id, settings["norm_mode"], ignored)
    if stats is None and given.describe:
        return None, asset_id
    if stats is None:
        raise FormatError(
            f"{source.folder} holds no normalisation statistics; give openpi's norm_stats.json with --norm-stats=FILE, "
            "or --norm-stats=none for a checkpoint that will be trained on other data"
        )
    return companions.with_rules(source.folder, stats, settings), asset_id


def read_tokenizer(
    source: Source, given: argparse.Namespace, settings: Mapping[str, Any], config: Pi05Config
) -> bytes | None:
    """The SentencePiece model's bytes: from the flag, our checkpoint, or beside the weights.

    Raises:
        FormatError: it is not the one that the checkpoint names.
    """
    where = given.tokenizer or companions.find_tokenizer(source.folder)
    if where is not None:
        try:
            content: bytes | None = load_tokenizer(where, config.prompt_length, config.vocab_size).model_bytes
        except ValueError as error:
            raise FormatError(str(error)) from None
    elif source.document is not None:
        content = stored_tokenizer(source)
    else:
        return None
    known = settings.get("tokenizer_sha256")
    if content is not None and known and hashlib.sha256(content).hexdigest() != known:
        raise FormatError(f"tokenizer {where or source.path} has another SHA-256 than the checkpoint's, {known[:12]}…")
    return content


def stored_tokenizer(source: Source) -> bytes | None:
    """The tokenizer in a checkpoint of ours."""
    from z1_jax.convert.orbax import TREE, OrbaxReader

    if not (source.folder / "assets" / TREE).is_file():
        return None
    reader = OrbaxReader(source.folder / "assets")
    try:
        return reader.read("tokenizer").tobytes()
    finally:
        reader.close()


def make_document(
    config: Pi05Config,
    settings: Mapping[str, Any],
    stats: Stats | None,
    asset_id: str | None,
    tokenizer: bytes | None,
) -> dict[str, Any]:
    """What `policy.load_policy` reads."""
    cameras = settings.get("cameras") or [*OPENPI_SLOTS, *(None for _ in range(config.cameras))][: config.cameras]
    if len(cameras) != config.cameras:
        raise FormatError(f"got {len(cameras)} cameras, the model has {config.cameras} slots; give --cameras for each")
    executed = settings.get("executed", config.horizon)
    if not 1 <= executed <= config.horizon:
        raise FormatError(f"executed={executed} does not lie within the horizon of {config.horizon}; give --executed")
    published = PALIGEMMA if config.vocab_size == PALIGEMMA_VOCAB_SIZE else None
    return {
        "architecture": dataclasses.asdict(config),
        "norm_stats": stats_to_json(stats or {}),
        "norm_mode": settings["norm_mode"],
        "cameras": list(cameras),
        "state_in_prompt": settings["state_in_prompt"],
        "prompt_state_dim": settings["prompt_state_dim"],
        "clip": settings["clip"],
        "relative_actions": settings.get("relative_actions"),
        "tokenizer_sha256": hashlib.sha256(tokenizer).hexdigest() if tokenizer else settings.get("tokenizer_sha256"),
        "tokenizer_name": settings.get("tokenizer_name", published),
        "executed": executed,
        "denoising_steps": settings["denoising_steps"],
        "world": settings.get("world", {}),
        "asset_id": asset_id,
        "ignored": settings["ignored"],  # what the user said was without effect
        "heads": config.language.heads,
        "vision_heads": config.vision.heads,
        "horizon": config.horizon,
        "prompt_length": config.prompt_length,
        "compute": dataclasses.asdict(config.compute),
    }


def dtype_rule(choice: str, source: Source, style: arrays.Style) -> Callable[[Piece], np.dtype]:
    """Piece -> the dtype that it is stored in."""

    def rule(piece: Piece) -> np.dtype:
        if choice == "source":
            dtype = source.tensors[piece.place(source.end.style)[0]].dtype
            return dtype if dtype == DTYPES["bfloat16"] else DTYPES["float32"]
        return DTYPES["float32" if piece.float32_in(style) else choice]

    return rule


def run_transfer(
    source: Source, model: Model, writer: Writer | None, end: End, infos: Mapping[str, TensorInfo]
) -> dict[str, PartSummary]:
    """Moves the arrays, with a line of progress on a terminal."""
    total = sum(source.tensors[name].nbytes for name in source.tensors if name != arrays.UNUSED_HEAD)
    done = 0

    def progress(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if sys.stdout.isatty():
            print(f"\r{done / 1e9:6.2f} of {total / 1e9:.2f} GB", end="\r" if done < total else "\n", flush=True)

    return transfer(
        model.pieces, source.reader, source.end, writer, end, infos, stored_crcs=source.crcs, progress=progress
    )


if __name__ == "__main__":
    run_main(main)
