"""Normalisation statistics of states and actions, in openpi's `norm_stats.json` format.

Knows arrays and one JSON file; nothing of images, prompts or environments. The statistics of a policy travel with its
checkpoint: a policy under other statistics is another policy.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import pathlib
import typing
from collections.abc import Mapping
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Float

NormMode = Literal["quantile", "z_score"]
NORM_MODES: tuple[str, ...] = get_args(NormMode)
# The largest spread that counts as none. guard: NEGLIGIBLE, or ROUNDING of the value, whatever the unit. millimetre: of
# data whose units are known, and of policies that were made when this was the only rule. openpi: of policies that were
# trained elsewhere, EPSILON and nothing widened, for that is how they act there. A policy keeps the rule that it was
# trained under.
Rule = Literal["guard", "millimetre", "openpi"]

EPSILON = 1e-6  # openpi's guard against division by zero
NEGLIGIBLE = 100 * EPSILON  # raw units: of a spread up to this the guard is 1 % or more
ROUNDING = 16 * float(np.finfo(np.float32).eps)  # of a value: what differs by less may be float32's rounding alone
MILLIMETRE = 1e-3  # raw units of metres, radians, shares of an action: less than this carries no information
WIDENED_STDS = 3.0  # half-width, in standard deviations, given to a dimension whose quantiles coincide
MAX_ROWS = 1 << 20  # rows kept for the quantiles; above it a sample of them

_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class NormStats:
    """Statistics of one quantity with D dimensions, in raw units.

    A dimension is *constant* when both its spread q99 - q01 and its std are at most what `rule` says: it is normalised
    to what openpi's formula gives its mean (-1 where the quantiles are equal) and un-normalised to its mean, whatever
    the value. A dimension whose quantiles coincide although its std does not vanish (a gripper that closes once in 200
    steps) is *widened* to mean ± 3 std, which is logged once.
    """

    mean: np.ndarray  # float64 [D]
    std: np.ndarray  # float64 [D], population standard deviation
    q01: np.ndarray  # float64 [D], 1 % quantile
    q99: np.ndarray  # float64 [D], 99 % quantile
    rule: Rule = "guard"

    def __post_init__(self) -> None:
        if self.rule not in typing.get_args(Rule):
            known = ", ".join(typing.get_args(Rule))
            raise ValueError(f"normalisation statistics: rule is {self.rule!r}, expected one of {known}")
        for name in _FIELDS:
            value = np.asarray(getattr(self, name), dtype=np.float64)
            if value.ndim != 1 or value.shape != np.shape(self.mean):
                raise ValueError(
                    f"normalisation statistics: {name} has shape {value.shape}, expected one value for each of "
                    f"the {np.size(self.mean)} dimensions of mean; compute the statistics anew"
                )
            if not np.isfinite(value).all():
                raise ValueError(
                    f"normalisation statistics: {name} holds a value that is not finite at dimension "
                    f"{int(np.argmin(np.isfinite(value)))}; compute the statistics anew from clean data"
                )
            object.__setattr__(self, name, value)
        for wrong, what in ((self.q01 > self.q99, "q01 is above q99"), (self.std < 0, "std is negative")):
            if wrong.any():
                raise ValueError(
                    f"normalisation statistics: {what} at dimension {int(np.argmax(wrong))}: fields were swapped or "
                    "edited; compute the statistics anew"
                )

    @property
    def dim(self) -> int:
        return self.mean.shape[0]

    @property
    def span(self) -> np.ndarray:
        """float64 [D]: q99 - q01."""
        return self.q99 - self.q01

    @functools.cached_property
    def negligible(self) -> np.ndarray:
        """float64 [D]: the largest spread that counts as none."""
        if self.rule == "guard":
            return np.maximum(NEGLIGIBLE, ROUNDING * np.maximum(np.abs(self.q01), np.abs(self.q99)))
        return np.full(self.dim, MILLIMETRE if self.rule == "millimetre" else EPSILON)

    @functools.cached_property
    def constant(self) -> np.ndarray:
        """bool [D]: dimensions that never move in the data."""
        return (self.span <= self.negligible) & (self.std <= self.negligible)

    @functools.cached_property
    def _bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """(low, high) of the quantile map, with coinciding dimensions widened."""
        widened = (self.span <= self.negligible) & ~self.constant & (self.rule != "openpi")
        if widened.any():
            _logger.warning(
                "dimensions %s have equal 1%% and 99%% quantiles: normalised over mean ± %g std instead",
                np.flatnonzero(widened).tolist(),
                WIDENED_STDS,
            )
        low = np.where(widened, self.mean - WIDENED_STDS * self.std, self.q01)
        return low, np.where(widened, self.mean + WIDENED_STDS * self.std, self.q99)

    @functools.cached_property
    def _mean_in_quantiles(self) -> np.ndarray:
        """The mean by openpi's quantile formula, in [-1, 1]: where a constant dimension is held for the model."""
        return np.clip((self.mean - self.q01) / (self.q99 - self.q01 + EPSILON) * 2.0 - 1.0, -1.0, 1.0)

    def normalise(self, values: Float[np.ndarray, "... d"], mode: NormMode = "quantile") -> np.ndarray:
        """Raw values [..., d], d <= D, to normalised ones (not clipped; constant dimensions are held).

        Quantile: (x - q01) / (q99 - q01 + 1e-6) * 2 - 1; z_score: (x - mean) / (std + 1e-6), as in openpi.

        Raises:
            ValueError: the values are wider than the statistics, or the mode is unknown.
        """
        width = values.shape[-1]
        if width > self.dim:
            raise ValueError(
                f"cannot normalise values of width {width} with statistics of {self.dim} dimensions; "
                "the dataset and the statistics do not belong together"
            )
        constant = self.constant[:width]
        if _checked(mode) == "quantile":
            low, high = (bound[:width] for bound in self._bounds)
            out = (values - low) / (high - low + EPSILON) * 2.0 - 1.0
            return np.where(constant, self._mean_in_quantiles[:width], out)
        return np.where(constant, 0.0, (values - self.mean[:width]) / (self.std[:width] + EPSILON))

    def unnormalise(self, values: Float[np.ndarray, "... d"], mode: NormMode = "quantile") -> np.ndarray:
        """The inverse of `normalise` for values [..., d]; constant dimensions become their constant.

        Dimensions beyond D are the model's padding. As in openpi, the quantile map leaves them as they are and the
        z-score map takes them as mean 0, std 1.
        """
        width = min(values.shape[-1], self.dim)
        real, padding = values[..., :width], values[..., width:]
        if _checked(mode) == "quantile":
            low, high = (bound[:width] for bound in self._bounds)
            out = (real + 1.0) / 2.0 * (high - low + EPSILON) + low
        else:
            out = real * (self.std[:width] + EPSILON) + self.mean[:width]
            padding = padding * (1.0 + EPSILON)
        return np.concatenate([np.where(self.constant[:width], self.mean[:width], out), padding], axis=-1)


def held_line(stats: Mapping[str, NormStats]) -> str:
    """Names the dimensions that are held constant, and their spans; empty where all move."""
    held = [
        f"{key} " + ", ".join(f"{dim} ({value.span[dim]:.2g})" for dim in np.flatnonzero(value.constant))
        for key, value in stats.items()
        if value.constant.any()
    ]
    return f"held constant at their mean (span): {'; '.join(held)}" * bool(held)


class StatsAccumulator:
    """One pass over the data: exact mean and std (Chan's update), quantiles of the rows kept.

    All rows are kept up to `max_rows`, so the quantiles are exact (NumPy's linear interpolation). Beyond, a row is kept
    when a fixed hash of its number is small: a sample of max_rows / 2 rows or more that no period in the data can
    bias, and the same whatever the parts that the data come in. Of n kept rows, the "1 % quantile" is a quantile of the
    whole between 1 % ± 4·sqrt(0.01·0.99 / n): for the half million rows of the default, 0.94 … 1.06 %.
    """

    def __init__(self, max_rows: int = MAX_ROWS):
        self._max_rows = max_rows
        self._count = 0
        self._mean: np.ndarray | None = None
        self._m2: np.ndarray | None = None
        self._rows: list[np.ndarray] = []
        self._hashes: list[np.ndarray] = []  # of the rows kept
        self._kept = 0
        self._bound = np.uint64(2**64 - 1)  # hashes up to this one are kept

    def update(self, values: Float[np.ndarray, "... D"]) -> None:
        """Adds values [..., D].

        Raises:
            ValueError: the width differs from that of earlier values, or a value is not finite.
        """
        rows = np.asarray(values, dtype=np.float64).reshape(-1, np.shape(values)[-1])
        if not np.isfinite(rows).all():
            raise ValueError("statistics: the data hold NaN or infinite values; expected finite numbers")
        if self._mean is None or self._m2 is None:
            self._mean, self._m2 = np.zeros(rows.shape[1]), np.zeros(rows.shape[1])
        if rows.shape[1] != self._mean.shape[0]:
            raise ValueError(f"statistics: got values of width {rows.shape[1]} after width {self._mean.shape[0]}")
        if not len(rows):
            return
        self._keep(rows)
        total = self._count + len(rows)
        batch_mean = rows.mean(axis=0)
        delta = batch_mean - self._mean
        self._m2 += ((rows - batch_mean) ** 2).sum(axis=0) + delta**2 * (self._count * len(rows) / total)
        self._mean = self._mean + delta * (len(rows) / total)
        self._count = total

    def _keep(self, rows: np.ndarray) -> None:
        """Keeps the rows with small hashes; halves the bound when full."""
        hashes = _hashed(np.arange(self._count, self._count + len(rows), dtype=np.uint64))
        self._add(rows, hashes)
        while self._kept > self._max_rows:
            self._bound //= np.uint64(2)
            rows, hashes = np.concatenate(self._rows), np.concatenate(self._hashes)
            self._rows, self._hashes, self._kept = [], [], 0
            self._add(rows, hashes)

    def _add(self, rows: np.ndarray, hashes: np.ndarray) -> None:
        kept = hashes <= self._bound
        self._rows.append(rows[kept])
        self._hashes.append(hashes[kept])
        self._kept += int(kept.sum())

    def result(self) -> NormStats:
        """The statistics so far.

        Raises:
            ValueError: no values were added.
        """
        if self._mean is None or self._m2 is None or not self._count:
            raise ValueError("statistics: no data; expected at least one record")
        low, high = np.quantile(np.concatenate(self._rows), [0.01, 0.99], axis=0)
        return NormStats(mean=self._mean, std=np.sqrt(self._m2 / self._count), q01=low, q99=high)


def _hashed(numbers: np.ndarray) -> np.ndarray:
    """Spreads numbers evenly over uint64: the finaliser of SplitMix64 (Steele, Lea and Flood 2014)."""
    z = numbers * np.uint64(0x9E3779B97F4A7C15) + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def save_norm_stats(path: str | pathlib.Path, stats: Mapping[str, NormStats]) -> None:
    """Writes openpi's `norm_stats.json` to the file `path`; it has no place for the rule."""
    values = {key: {name: value[name] for name in _FIELDS} for key, value in stats_to_json(stats).items()}
    pathlib.Path(path).write_text(json.dumps({"norm_stats": values}, indent=2) + "\n")


def load_norm_stats(path: str | pathlib.Path, rule: Rule = "guard") -> dict[str, NormStats]:
    """Reads openpi's `norm_stats.json`, or its inner mapping; `rule` says what counts as constant.

    Raises:
        ValueError: the file is missing, is not JSON, or lacks one of the four statistics.
    """
    try:
        content = json.loads(pathlib.Path(path).read_text())
        return stats_from_json(content.get("norm_stats", content), rule)
    except FileNotFoundError:
        raise ValueError(f"normalisation statistics: no file {path}; expected openpi's norm_stats.json") from None
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            f"normalisation statistics: {path} is not a norm_stats.json ({type(error).__name__}: {error}); expected "
            f'{{"norm_stats": {{"state": {{{", ".join(_FIELDS)}}}, "actions": ...}}}}'
        ) from None


def stats_to_json(stats: Mapping[str, NormStats]) -> dict[str, dict[str, Any]]:
    """Statistics as JSON values, with their rules."""
    return {
        key: {**{name: getattr(value, name).tolist() for name in _FIELDS}, "rule": value.rule}
        for key, value in stats.items()
    }


def stats_from_json(values: Mapping[str, Mapping[str, Any]], rule: Rule = "millimetre") -> dict[str, NormStats]:
    """What `stats_to_json` made; `rule` is that of statistics that name none: a policy of ours that is as old.

    Raises AttributeError, KeyError, TypeError or ValueError for anything else.
    """
    return {
        key: NormStats(**{name: value[name] for name in _FIELDS}, rule=value.get("rule", rule))
        for key, value in values.items()
    }


def _checked(mode: str) -> str:
    if mode not in NORM_MODES:
        raise ValueError(f"unknown normalisation {mode!r}; expected {' or '.join(NORM_MODES)}")
    return mode


_FIELDS = ("mean", "std", "q01", "q99")
