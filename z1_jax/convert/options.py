"""The command line of a conversion, and the settings that it names."""

from __future__ import annotations

import argparse
import pathlib
from collections.abc import Sequence
from typing import Any

from z1_jax.config.command_line import Parser
from z1_jax.convert.sources import FORMATS
from z1_jax.convert.store import FormatError
from z1_jax.convert.transfer import DTYPE_CHOICES
from z1_jax.data.normalize import NORM_MODES
from z1_jax.data.relative import parse_relative

DESCRIPTION = "π0.5 checkpoints of openpi (Orbax, PyTorch) and LeRobot → ours, and back with --to."
_MOST = {  # of numbers that the command line gives; heads must divide a width
    "horizon": 1000,
    "executed": 1000,
    "prompt_length": 8192,  # PaliGemma's context
    "denoising_steps": 1000,
    "pad_state": 8192,
}


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line. Raises ConfigError for an unknown option or a wrong value."""
    parser = Parser(prog="python -m z1_jax.convert", description=DESCRIPTION)
    parser.add_argument("src", type=pathlib.Path, metavar="SRC", help="checkpoint: a folder or a safetensors file")
    parser.add_argument("dst", type=pathlib.Path, metavar="DST", nargs="?", help="folder that does not exist yet")
    parser.add_argument("--describe", action="store_true", help="say how the policy of SRC wants to be driven (slots, "
                        "widths, chunk, prompt, statistics); no DST, nothing is written")  # fmt: skip
    parser.add_argument("--to", choices=FORMATS, help="what DST becomes (ours, unless SRC is)")
    parser.add_argument("--dtype", choices=DTYPE_CHOICES, default="float32", help="of the stored arrays (%(default)s); "
                        "bfloat16 keeps in float32 what computes in it; source keeps each array's own")  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the table, write nothing")
    parser.add_argument("--norm-stats", metavar="FILE", help="openpi's norm_stats.json, or none to leave them out")
    parser.add_argument("--asset-id", metavar="ID", help="whose statistics: the folder's name in assets/")
    parser.add_argument("--norm-mode", choices=NORM_MODES, help="how to normalise (quantile)")
    parser.add_argument("--tokenizer", metavar="FILE", help="SentencePiece model that shall travel with the checkpoint")
    parser.add_argument("--cameras", metavar="A,B,…", help="camera of each slot; none for an unused one")
    for name, meaning in (
        ("heads", "attention heads of language model and expert"),
        ("vision-heads", "attention heads of the vision tower"),
        ("horizon", "control steps that a chunk predicts"),
        ("prompt-length", "tokens of a prompt (200)"),
        ("executed", "control steps of a chunk that are executed (all)"),
        ("denoising-steps", "of the sampler (10)"),
    ):
        parser.add_argument(f"--{name}", type=int, metavar="N", help=meaning)
    parser.add_argument("--state-in-prompt", action=argparse.BooleanOptionalAction, default=None,
                        help="whether the prompt holds the state; asked where nothing in SRC tells")  # fmt: skip
    parser.add_argument("--pad-state", type=width_or_none, metavar="N", help="width that the state in the prompt is "
                        "padded to (LeRobot 0.4.4 and older), or none; asked where nothing in SRC tells")  # fmt: skip
    parser.add_argument("--base", type=pathlib.Path, metavar="PATH", help="the checkpoint that a PEFT folder's "
                        "adapters belong to, where its adapter_config.json names no folder that is there")  # fmt: skip
    parser.add_argument("--lora-alpha", type=float, metavar="N", help="of openpi's adapters of other ranks than its "
                        "own sizes have (alpha is the rank there)")  # fmt: skip
    parser.add_argument("--relative-actions", metavar="MASK", help="action dimensions that are offsets from the state, "
                        "as in openpi's make_bool_mask: 6,-1 is six relative ones, then an absolute one")  # fmt: skip
    parser.add_argument("--ignore", type=lambda text: text.split(","), default=[], metavar="KEY,…",
                        help="keys or processor steps of SRC that are known to you to be without effect")  # fmt: skip
    given = parser.parse_args(list(arguments))
    if given.describe == (given.dst is not None):
        got = (
            f"{given.dst} with --describe, which writes nothing: leave it out"
            if given.describe
            else "none, expected one"
        )
        parser.error(f"argument DST: got {got}")
    if given.describe and (given.to or given.dry_run):
        parser.error(f"argument {'--to' if given.to else '--dry-run'}: it has no effect with --describe; leave it out")
    return given


def width_or_none(text: str) -> str:
    """A number's text, or "none"."""
    if text == "none" or text.lstrip("-").isdecimal():
        return text
    raise argparse.ArgumentTypeError(f"{text!r}, expected a number or none")


def given_settings(given: argparse.Namespace) -> dict[str, Any]:
    """The settings that flags name. Raises FormatError for a value that no policy can have."""
    names = ("heads", "vision_heads", "horizon", "prompt_length", "executed", "denoising_steps", "norm_mode")
    settings = {name: getattr(given, name) for name in (*names, "state_in_prompt") if getattr(given, name) is not None}
    if given.pad_state is not None:
        settings["prompt_state_dim"] = None if given.pad_state == "none" else int(given.pad_state)
    numbers = {name: value for name, value in settings.items() if name not in ("norm_mode", "state_in_prompt")}
    if given.relative_actions is not None:
        try:
            relative = parse_relative(given.relative_actions.split(","))
        except ValueError as error:
            raise FormatError(f"--relative-actions={given.relative_actions}: {error}") from None
        settings["relative_actions"] = relative.to_json() if relative else None
    for name, value in numbers.items():
        option = "pad-state" if name == "prompt_state_dim" else name.replace("_", "-")
        most = _MOST.get(option.replace("-", "_"))
        if value is not None and not 1 <= value <= (most or value):
            raise FormatError(f"--{option}={value}: expected {f'1 to {most}' if most else 'at least 1'}")
    if given.cameras is not None:
        cameras = given.cameras.split(",")
        named = [name for name in cameras if name != "none"]
        if "" in named or not named or len(set(named)) < len(named):
            raise FormatError(f"--cameras={given.cameras}: expected a camera of its own for each slot, or none")
        settings["cameras"] = [name if name != "none" else None for name in cameras]
    if given.asset_id is not None and {"", ".", ".."} & set(given.asset_id.split("/")):
        raise FormatError(f"--asset-id={given.asset_id}: expected the name of a folder in assets/")
    return settings
