"""Merges low-rank adapters into the weights that they change, while these are read.

openpi's lora.Einsum and FeedForward, and PEFT's LoRA of linear layers. A merged weight is float32, whatever the others.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
import re
import threading
from collections.abc import Mapping
from typing import Any

import numpy as np

from z1_jax.convert.keys import read_count, read_json
from z1_jax.convert.store import DTYPES, FormatError, Index, Reader, TensorInfo

PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PEFT_PREFIX = "base_model.model."
# Ranks and alphas of openpi's gemma_2b_lora and gemma_300m_lora. Its checkpoints do not hold the alpha.
_OPENPI_ALPHA = {"language": (16, 16.0), "expert": (32, 32.0)}
# PEFT's settings -> the values under which a merged weight is W + scale·B·A.
_PEFT_FIXED: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "use_dora": (False, None),
    "fan_in_fan_out": (False, None),
    "lora_bias": (False, None),
    "layer_replication": (None,),
    "trainable_token_indices": (None,),
    "target_parameters": (None, []),
    "alora_invocation_tokens": (None,),
    "use_qalora": (False, None),
    "use_bdlora": (False, None),
    "megatron_config": (None,),
    # pissa, olora, corda and loftq change the weights that they begin with.
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva", None),
}
PEFT_KEYS = (
    *_PEFT_FIXED, "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "base_model_name_or_path",
    # Settings that are not needed: the arrays show where adapters are, and the rest concerns training.
    "target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern", "lora_dropout",
    "auto_mapping", "inference_mode", "task_type", "revision", "peft_version", "megatron_core", "loftq_config",
    "eva_config", "corda_config", "arrow_config", "lora_ga_config", "qalora_group_size", "runtime_config",
    "ensure_weight_tying",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Adapter:
    """W + scale · a·b, over the last two axes.

    Attributes:
        a, b: names of the arrays [*leading, rows, rank] and [*leading, rank, columns].
        summed: the heads share one low-rank input: b's third axis from the end is summed over.
    """

    a: str
    b: str
    scale: float
    summed: bool = False


class MergedReader:
    """A reader whose weights have their adapters in them (see `Reader`).

    Args:
        base: reads the weights; `extra` reads the adapters.
        adapters: name of a weight in `base` -> its adapter in `extra`.
        replaced: name of a weight in `base` -> name of the weight in `extra` to read instead.
        hidden: names of `base` that are no weights.
    """

    def __init__(
        self,
        base: Reader,
        extra: Reader,
        adapters: Mapping[str, Adapter],
        replaced: Mapping[str, str] | None = None,
        hidden: frozenset[str] = frozenset(),
    ):
        self._base, self._extra = base, extra
        self._adapters, self._replaced = dict(adapters), dict(replaced or {})
        self._factors: dict[str, tuple[np.ndarray, np.ndarray]] = {}  # all of them are a percent of the weights
        self._lock = threading.Lock()
        self.tensors: dict[str, TensorInfo] = {}
        for name, info in base.tensors.items():
            if name in hidden:
                continue
            info = extra.tensors[self._replaced[name]] if name in self._replaced else info
            self.tensors[name] = TensorInfo(info.shape, DTYPES["float32"]) if name in self._adapters else info

    def read(self, name: str, index: Index = ()) -> np.ndarray:
        """See `Reader`."""
        if name in self._replaced:
            return self._extra.read(self._replaced[name], index)
        values = self._base.read(name, index)
        if name not in self._adapters:
            return values
        a, b = self._factor(name)
        change = a[index] @ b[index[: b.ndim - (3 if self._adapters[name].summed else 2)]]
        return values.astype(np.float32) + np.float32(self._adapters[name].scale) * change

    def _factor(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """(a, b) in float32."""
        with self._lock:
            if name not in self._factors:
                adapter = self._adapters[name]
                a, b = (self._extra.read(part).astype(np.float32) for part in (adapter.a, adapter.b))
                self._factors[name] = (a, b.sum(axis=-3, keepdims=True) if adapter.summed else b)
            return self._factors[name]

    def close(self) -> None:
        self._base.close()
        self._extra.close()


def openpi_adapters(shapes: Mapping[str, tuple[int, ...]], alpha: float | None) -> tuple[dict[str, Adapter], list[str]]:
    """(weight -> its adapter, the adapters' names) of openpi's arrays, by their names.

    lora.Einsum adds alpha / rank times the product, FeedForward the product itself. In attn_vec_einsum, whose output
    sums over the heads, the low-rank part is summed too before b is applied, and b over the heads.

    Raises:
        FormatError: half of an adapter is missing, its weight is unknown, or `--lora-alpha` is needed for its rank.
    """
    found, names = {}, [name for name in shapes if "lora" in name]
    for name in names:
        weight = name.removesuffix("/lora_a") + "/w" if name.endswith("/lora_a") else name.removesuffix("_lora_a")
        if not name.endswith("lora_a"):
            continue
        other = name.removesuffix("a") + "b"
        if other not in shapes or weight not in shapes:
            raise FormatError(f"{name} is half of an adapter: {other if other not in shapes else weight} is missing")
        rank = shapes[name][-1]
        scale = _openpi_alpha(name, rank, alpha) / rank if name.endswith("/lora_a") else 1.0
        found[weight] = Adapter(name, other, scale, summed="attn_vec_einsum" in name)
    if left := set(names) - {part for adapter in found.values() for part in (adapter.a, adapter.b)}:
        raise FormatError(f"{min(left)} is no adapter that is known; expected pairs lora_a and lora_b")
    return found, names


def _openpi_alpha(name: str, rank: int, alpha: float | None) -> float:
    if alpha is not None:
        return alpha
    known_rank, known = _OPENPI_ALPHA["expert" if "einsum_1/" in name else "language"]
    if rank != known_rank:
        raise FormatError(
            f"{name} has rank {rank}; openpi's own sizes have 16 (gemma_2b_lora) and 32 (gemma_300m_lora), and its "
            "checkpoints do not hold the alpha: give --lora-alpha=N of your LoRAConfig"
        )
    return known


@dataclasses.dataclass(frozen=True)
class PeftAdapters:
    """What a PEFT folder changes: adapters and replaced weights, by the weight's name in PEFT's file."""

    adapters: Mapping[str, Adapter]
    replaced: Mapping[str, str]


def peft_adapters(folder: pathlib.Path, shapes: Mapping[str, tuple[int, ...]]) -> PeftAdapters:
    """From adapter_config.json and the arrays' names and shapes.

    Raises:
        FormatError: a setting does not merge as W + scale·B·A, or the arrays are not those of a LoRA.
    """
    path = folder / PEFT_CONFIG
    config = read_json(path)
    for key, values in _PEFT_FIXED.items():
        if key in config and config[key] not in values:
            raise FormatError(f"{path} has {key}={config[key]!r}, which is not supported; expected {values[0]!r}")
    adapters: dict[str, Adapter] = {}
    replaced: dict[str, str] = {}
    for name, shape in shapes.items():
        plain = (
            name.removeprefix(_PEFT_PREFIX).replace(".modules_to_save.default.", ".").replace(".modules_to_save.", ".")
        )
        module, adapter, rest = plain.partition(".lora_A.")
        if ".lora_B." in plain and name.replace(".lora_B.", ".lora_A.") in shapes:
            continue
        if not adapter:
            if "lora" in plain:
                raise FormatError(
                    f"{folder / PEFT_WEIGHTS}: {name} is no adapter that is known; expected lora_A, lora_B"
                )
            replaced[plain] = name
            continue
        other = name.replace(".lora_A.", ".lora_B.")
        if other not in shapes or len(shape) != 2 or rest not in ("weight", "default.weight"):
            raise FormatError(
                f"{folder / PEFT_WEIGHTS}: {name} {list(shape)} is no adapter of a linear layer, or its lora_B "
                "is missing"
            )
        rank = shape[0]
        # PEFT's A [rank, in] and B [out, rank] stand the other way round: W is [out, in].
        adapters[f"{module}.weight"] = Adapter(other, name, _peft_scale(path, config, module, rank))
    return PeftAdapters(adapters, replaced)


def _peft_scale(path: pathlib.Path, config: Mapping[str, Any], module: str, rank: int) -> float:
    patterns = (config.get("rank_pattern") or {}, config.get("alpha_pattern") or {})
    told = patterns[0].get(_pattern(patterns[0], module), read_count(path, config, "r"))
    if told != rank:
        raise FormatError(f"{path} says that {module} has rank {told}, its lora_A has {rank}; fetch the folder anew")
    alpha = patterns[1].get(_pattern(patterns[1], module), config.get("lora_alpha"))
    if not isinstance(alpha, (int, float)) or isinstance(alpha, bool):
        raise FormatError(f"{path}: lora_alpha is {alpha!r}; expected a number")
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _pattern(patterns: Mapping[str, Any], module: str) -> str:
    """The value of the first pattern that matches a module: the end of its name, or after a ^ all of it, as in PEFT."""
    for pattern in patterns:
        if re.match(pattern if pattern.startswith("^") else rf"(.*\.)?({pattern})$", module):
            return pattern
    return module
