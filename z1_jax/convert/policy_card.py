"""What `--describe` prints: how a policy wants to be driven."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from z1_jax.convert.companions import Stats
from z1_jax.data.relative import relative_from_json
from z1_jax.data.tokenizer import prompt_text
from z1_jax.models.pi05 import Pi05Config
from z1_jax.policy import OPENPI_SLOTS

_SLOTS = ("base", "left wrist", "right wrist")  # openpi's order
_EXAMPLE = "open the drawer"


def policy_card(config: Pi05Config, document: Mapping[str, Any], stats: Stats | None, unknown: Sequence[str]) -> str:
    """The lines: image slots, state, actions, prompt, and the statistics dimension by dimension.

    Args:
        unknown: settings that neither source nor flags gave; whatever depends on them is printed as open.
    """
    return "\n".join(
        [*_inputs(config, document, stats, unknown), *_outputs(config, document, stats, unknown), *_spans(stats)]
    )


def _inputs(
    config: Pi05Config, document: Mapping[str, Any], stats: Stats | None, unknown: Sequence[str]
) -> Iterator[str]:
    side = config.vision.image_size
    yield f"images: {config.cameras} slots of {side} x {side} pixels, RGB"
    for slot, camera in enumerate(document["cameras"]):
        place = f" ({_SLOTS[slot]})" if slot < len(_SLOTS) else ""
        yield f"  slot {slot}{place}: {camera or 'none: masked'}"
    if {camera for camera in document["cameras"] if camera} <= set(OPENPI_SLOTS):
        yield "  (names of openpi's slots: --cameras=A,B,none gives them the environment's)"
    words = document.get("world", {}).get("instructions", ())
    example = words[0] if words else _EXAMPLE
    width = f"{stats['state'].dim} numbers" if stats else "width unknown: no statistics"
    yield f"state: {width}, raw units"
    if "state_in_prompt" in unknown:
        yield f"prompt: at most {config.prompt_length} tokens; not told whether it holds the state (--state-in-prompt)"
    else:
        yield f"prompt: at most {config.prompt_length} tokens, for example {_prompt(document, stats, example)!r}"
    if "pad_state" in unknown:
        yield "  whether the state was padded there is not told (--pad-state)"


def _prompt(document: Mapping[str, Any], stats: Stats | None, instruction: str) -> str:
    """The prompt of an instruction with the mean of the states, where it holds one."""
    if not document["state_in_prompt"]:
        return prompt_text(instruction, None)
    if stats is None:
        return prompt_text(instruction, np.zeros(1)).replace("128", "(the state's bins)")
    state = stats["state"].normalise(stats["state"].mean, document["norm_mode"])
    return prompt_text(instruction, np.pad(state, (0, max(0, (document["prompt_state_dim"] or 0) - len(state)))))


def _outputs(
    config: Pi05Config, document: Mapping[str, Any], stats: Stats | None, unknown: Sequence[str]
) -> Iterator[str]:
    horizon = "not told (--horizon)" if "horizon" in unknown else f"{config.horizon} control steps"
    executed = "" if "horizon" in unknown else f", of which {document['executed']} are executed before it looks again"
    yield f"chunk: {horizon}{executed}"
    real = f"{stats['actions'].dim} numbers" if stats else "width unknown: no statistics"
    yield f"actions: {real}, raw units, of the model's {config.action_dim}"
    relative = relative_from_json(document["relative_actions"])
    untold = "not told whether absolute or offsets from the state (--relative-actions)"
    yield f"  {relative.words if relative else untold if 'relative_actions' in unknown else 'absolute'}"
    if document["clip"]:
        yield f"  cut to {document['clip'][0]:g} … {document['clip'][1]:g}"
    if rate := document.get("world", {}).get("rate"):
        yield f"rate: {rate:g} control steps a second"
    yield f"sampler: {document['denoising_steps']} denoising steps"


def _spans(stats: Stats | None) -> Iterator[str]:
    if not stats:
        yield "statistics: none; SFT takes those of its demonstrations"
        return
    for key, value in stats.items():
        yield f"{key}, by dimension: 1 % … 99 %, mean, standard deviation"
        for dim in range(value.dim):
            held = "  held constant" if value.constant[dim] else ""
            numbers = (value.q01[dim], value.q99[dim], value.mean[dim], value.std[dim])
            low, high, mean, std = (f"{number:.4g}" for number in numbers)
            yield f"  {dim:>3}  {low:>10} … {high:<10} {mean:>10}  {std:>10}{held}"
