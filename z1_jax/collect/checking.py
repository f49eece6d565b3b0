"""What is in a dataset: lengths, words, spans, and what looks wrong in numbers and frames. Touches no files."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
from jaxtyping import Float, Shaped
from PIL import Image

from z1_jax.collect.importers.base import BadData
from z1_jax.collect.importers.duplicates import Duplicates
from z1_jax.data.journal import JournaledEpisode
from z1_jax.data.normalize import NormStats, Rule, StatsAccumulator

OUTLYING = 2.0  # spans of the 1 % … 99 % beyond them: quantile normalisation makes ±5 of it
_SHORT, _LONG = 0.1, 10.0  # of the median length
_BLACK = 8  # of 255: the brightest pixel of a black frame
_SAME = 0.1  # of 255 on average: what is shown twice in a video differs by less
_MOVES = 1e-2  # of a dimension's span, from one decision to the next
_FROZEN = 5  # decisions in a row that show one frame while the state moves
_FILMED, _SIDE = 4, 128  # episodes, and pixels, of the strips


@dataclasses.dataclass(frozen=True)
class Finding:
    """Something that looks wrong, in one line that says what to do."""

    kind: str  # broken, copy, length, constant, nearly constant, outlier, black, frozen
    line: str


@dataclasses.dataclass(frozen=True)
class Quantity:
    """States or actions of all decisions."""

    stats: NormStats
    low: np.ndarray  # [D], the least value
    high: np.ndarray  # [D], the greatest
    outliers: np.ndarray  # int [D]


@dataclasses.dataclass(frozen=True)
class Checked:
    """What `check_episodes` found."""

    names: tuple[str, ...]  # of the episodes
    lengths: np.ndarray  # int [episodes], control steps
    decisions: int
    tasks: Mapping[str, int]  # -> episodes
    words: Mapping[str, int]
    cameras: Mapping[str, tuple[int, int]]  # -> height, width
    quantities: Mapping[str, Quantity]  # of "state" and "actions"
    strips: Mapping[str, tuple[np.ndarray, ...]]  # "episode, camera" -> its first, middle and last frame, small
    findings: tuple[Finding, ...]


def check_episodes(
    stream: Iterable[tuple[str, JournaledEpisode | BadData]], stride: int, rules: Mapping[str, Rule] | None = None
) -> Checked:
    """Looks at every episode once.

    Args:
        stream: name of each episode, and the episode or the reason why it cannot be read.
        stride: control steps from one decision to the next; a chunk's actions beyond them count with the next one.
        rules: the rule by which dimensions of "state" and "actions" count as constant; `guard` where absent.

    Raises:
        BadData: not one episode can be read.
    """
    findings: list[Finding] = []
    names: list[str] = []
    lengths: list[int] = []
    tasks: collections.Counter[str] = collections.Counter()
    words: collections.Counter[str] = collections.Counter()
    numbers: dict[str, list[np.ndarray]] = {"state": [], "actions": []}
    pictures, duplicates = _Pictures(), Duplicates()
    strips: dict[str, tuple[np.ndarray, ...]] = {}
    sizes: dict[str, tuple[int, int]] = {}
    for name, episode in stream:
        if isinstance(episode, BadData):
            findings.append(Finding("broken", str(episode)))
            continue
        try:
            duplicates.check(episode, name)
        except BadData as copy:
            line = str(copy).partition(", expected another")[0]
            findings.append(Finding("copy", f"{line}; leave one of them out, or it counts twice"))
        duplicates.add(episode, name)
        names.append(name)
        lengths.append(episode.control_steps)
        tasks[episode.task] += 1
        words[episode.instruction] += 1
        numbers["state"].append(episode.state)
        numbers["actions"].append(episode.actions[:, :stride].reshape(-1, episode.actions.shape[-1]))
        pictures.add(name, episode)
        for camera, frames in episode.images.items():
            sizes.setdefault(camera, (frames.shape[1], frames.shape[2]))
            if len(names) <= _FILMED:
                strips[f"{name}, {camera}"] = _strip(frames)
    if not names:
        raise BadData(f"no episode can be read, the first: {findings[0].line}" if findings else "there are no episodes")
    quantities = {}
    for key, parts in numbers.items():
        quantities[key], told = _quantity(key, parts, names, (rules or {}).get(key, NormStats.rule))
        findings += told
    findings += _lengths(names, lengths) + pictures.findings()
    decisions = sum(len(part) for part in numbers["state"])
    return Checked(tuple(names), np.array(lengths), decisions, tasks, words, sizes, quantities, strips, tuple(findings))


def _lengths(names: Sequence[str], lengths: Sequence[int]) -> list[Finding]:
    median = float(np.median(lengths))
    odd = [
        (n, steps) for n, steps in zip(names, lengths, strict=True) if not _SHORT * median <= steps <= _LONG * median
    ]
    if not odd:
        return []
    name, steps = odd[0]
    others = f" and {len(odd) - 1} more" * (len(odd) > 1)
    return [
        Finding(
            "length", f"{name} has {steps} control steps{others}, the median is {median:g}: look whether it is whole"
        )
    ]


def _quantity(
    key: str, parts: Sequence[Float[np.ndarray, "n d"]], names: Sequence[str], rule: Rule
) -> tuple[Quantity, list[Finding]]:
    found: list[Finding] = []
    accumulator = StatsAccumulator()
    for part in parts:
        accumulator.update(part)
    stats = dataclasses.replace(accumulator.result(), rule=rule)
    values = np.concatenate(parts)
    reach = OUTLYING * np.maximum(stats.span, stats.negligible)
    beyond = np.maximum(stats.q01 - values, values - stats.q99)
    outlying = (beyond > reach) & ~_nearly_constant(stats) & ~stats.constant
    starts = np.cumsum([0, *(len(part) for part in parts)])
    for dim in range(stats.dim):
        if stats.constant[dim]:
            whole = np.ptp(values[:, dim])
            moves = f"moves by {whole:.2g} in all" if whole else "never moves"
            line = f"{key} dimension {dim} {moves} ({stats.mean[dim]:.4g}): it is held constant in labels and actions"
            found.append(Finding("constant", line))
        elif _nearly_constant(stats)[dim]:
            usual = np.median(values[:, dim])
            share = float(np.mean(np.abs(values[:, dim] - usual) <= stats.negligible[dim]))
            found.append(
                Finding(
                    "nearly constant",
                    f"{key} dimension {dim} has one value, {usual:.4g}, in {share:.1%} of the rows: "
                    "its quantiles coincide, and it is normalised over mean ± 3 standard deviations",
                )
            )
        if count := int(outlying[:, dim].sum()):
            row = int(np.argmax(np.where(outlying[:, dim], beyond[:, dim], -np.inf)))
            episode = int(np.searchsorted(starts, row, side="right") - 1)
            found.append(
                Finding(
                    "outlier",
                    f"{key} dimension {dim}: {count} of {len(values)} values lie more than {OUTLYING:g} spans beyond "
                    f"{stats.q01[dim]:.4g} … {stats.q99[dim]:.4g}, the furthest {values[row, dim]:.4g} in "
                    f"{names[episode]}, row {row - starts[episode]}: a label far beyond -1 … 1; look at that episode",
                )
            )
    return Quantity(stats, values.min(axis=0), values.max(axis=0), outlying.sum(axis=0)), found


def _nearly_constant(stats: NormStats) -> np.ndarray:
    return (stats.span <= stats.negligible) & ~stats.constant


class _Pictures:
    """Black frames, and cameras that stand still while the state moves."""

    def __init__(self) -> None:
        self._frames: collections.Counter[str] = collections.Counter()
        self._black: dict[str, list[tuple[str, int]]] = {}
        self._frozen: dict[str, list[tuple[int, str, int]]] = {}  # camera -> (decisions, episode, first)

    def add(self, name: str, episode: JournaledEpisode) -> None:
        """Looks at the frames of an episode."""
        span = np.ptp(episode.state, axis=0)
        moves = (np.abs(np.diff(episode.state, axis=0)) > _MOVES * span + 1e-9).any(axis=1)
        for camera, frames in episode.images.items():
            self._frames[camera] += len(frames)
            black = [number for number, frame in enumerate(frames) if frame.max() <= _BLACK]
            self._black.setdefault(camera, []).extend((name, number) for number in black)
            same = np.array([_difference(a, b) <= _SAME for a, b in zip(frames[:-1], frames[1:], strict=True)], bool)
            self._frozen.setdefault(camera, []).extend(
                (stop - start + 1, name, start) for start, stop in _runs(same & moves) if stop - start + 1 >= _FROZEN
            )

    def findings(self) -> list[Finding]:
        found = []
        for camera, black in self._black.items():
            if black:
                name, number = black[0]
                line = (
                    f"camera {camera}: {len(black)} of {self._frames[camera]} frames are black, the first in {name}, "
                    f"decision {number}: leave the camera or those episodes out"
                )
                found.append(Finding("black", line))
        for camera, frozen in self._frozen.items():
            if frozen:
                longest, name, start = max(frozen)
                line = (
                    f"camera {camera} shows one frame while the state moves, in {len({n for _, n, _ in frozen})} "
                    f"episodes; longest in {name}, decisions {start} to {start + longest - 1}: the recording hung, or "
                    "frames were repeated"
                )
                found.append(Finding("frozen", line))
        return found


def _difference(one: Shaped[np.ndarray, "h w 3"], other: Shaped[np.ndarray, "h w 3"]) -> float:
    """Grey levels on average."""
    return float(np.abs(one.astype(np.int16) - other).mean())


def _runs(flags: Shaped[np.ndarray, " n"]) -> Iterator[tuple[int, int]]:
    """(start, stop) of each stretch of true ones."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], flags, [False]]).astype(int)))
    yield from zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)


def _strip(frames: Shaped[np.ndarray, "n h w 3"]) -> tuple[np.ndarray, ...]:
    chosen = dict.fromkeys((0, len(frames) // 2, len(frames) - 1))
    side = max(frames.shape[1:3])
    size = [max(1, round(n * min(1.0, _SIDE / side))) for n in (frames.shape[2], frames.shape[1])]
    return tuple(np.asarray(Image.fromarray(frames[i]).resize((size[0], size[1]))) for i in chosen)
