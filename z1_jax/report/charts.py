"""Small charts as inline SVG, without dependencies.

Colours are CSS variables (--s0 ... --s4) of the page around them.
"""

from __future__ import annotations

import dataclasses
import html
import math
from collections.abc import Callable, Sequence

WIDTH, HEIGHT = 440, 220
LEFT, RIGHT, TOP, BOTTOM = 58, 26, 10, 40  # LEFT at least: more where the labels of the y axis are wider
FONT = 14  # pixels, as in the style sheet
MAX_POINTS = 160  # more than the eye resolves in this width; longer curves are averaged in bins

Format = Callable[[float], str]


@dataclasses.dataclass(frozen=True)
class Series:
    """One curve. A y of None is a gap."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float | None]
    style: str = "line"  # "line", "faint" or "dots"
    colour: int = 0  # 0..4


@dataclasses.dataclass(frozen=True)
class _Axes:
    x: tuple[float, float]
    y: tuple[float, float]  # log10 of the values when `log`
    log: bool = False
    left: float = LEFT

    def px(self, x: float) -> float:
        return self.left + (x - self.x[0]) / (self.x[1] - self.x[0]) * (WIDTH - self.left - RIGHT)

    def py(self, y: float) -> float:
        y = math.log10(y) if self.log else y
        return HEIGHT - BOTTOM - (y - self.y[0]) / (self.y[1] - self.y[0]) * (HEIGHT - TOP - BOTTOM)


def line_chart(
    series: Sequence[Series],
    x_label: str,
    y_format: Format,
    y_range: tuple[float, float] | None = None,
    log: bool = False,
) -> str:
    """Curves over a common x axis.

    Args:
      y_range: fixed ends of the y axis; by default from the values, including 0.
      log: a logarithmic y axis; values <= 0 become gaps.

    Raises:
      ValueError: when no series has a point.
    """
    series = [_binned(_positive(one) if log else one) for one in series]
    values = [y for one in series for y in one.ys if y is not None]
    if not values:
        raise ValueError("a chart without points")
    if log:
        low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
        axes = _Axes(_x_range(series), (low, max(high, low + 1)), log=True)
    else:
        axes = _Axes(_x_range(series), y_range or _nice_range(min(0.0, *values), max(values)))
    axes = _with_room(axes, y_format)
    marks = [_polyline(one, axes) if one.style != "dots" else _dots(one, axes) for one in series]
    return _frame(axes, x_label, y_format, marks, _hits(series, axes, x_label, y_format))


def stacked_chart(series: Sequence[Series], x_label: str, y_format: Format) -> str:
    """Areas on top of each other, the first at the bottom. All series share their xs; None counts as 0."""
    series = [_binned(one) for one in series]
    if not series or not series[0].xs:
        raise ValueError("a chart without points")
    floor = [0.0] * len(series[0].xs)
    layers = []
    for one in series:
        ceiling = [low + (y or 0.0) for low, y in zip(floor, one.ys, strict=True)]
        layers.append((one, floor, ceiling))
        floor = ceiling
    axes = _with_room(_Axes(_x_range(series), _nice_range(0.0, max(floor))), y_format)
    marks = [_area(one, low, high, axes) for one, low, high in layers]
    return _frame(axes, x_label, y_format, marks, _hits(series, axes, x_label, y_format))


def interval_chart(rows: Sequence[tuple[str, float, tuple[float, float]]]) -> str:
    """Rates in [0, 1] with their intervals, one row each: (label, rate, (low, high))."""
    step = 46  # the label of a row stands above its interval, as wide as the chart
    height = 30 + step * len(rows)
    left, right = 26, 26
    parts = [f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="Success rates with intervals">']

    def px(rate: float) -> float:
        return left + rate * (WIDTH - left - right)

    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        parts.append(f'<line class="grid" x1="{px(tick):.1f}" x2="{px(tick):.1f}" y1="4" y2="{height - 22}"/>')
        parts.append(f'<text x="{px(tick):.1f}" y="{height - 6}" text-anchor="middle">{tick:.0%}</text>')
    for row, (label, rate, (low, high)) in enumerate(rows):
        y = 34 + row * step
        title = html.escape(f"{label}: {rate:.1%} [{low:.1%}, {high:.1%}]")
        shown = html.escape(_fitting(label, WIDTH - 8))
        parts.append(f'<text class="label" x="4" y="{y - 14}">{shown}<title>{html.escape(label)}</title></text>')
        parts.append(
            f'<g class="c{row}"><title>{title}</title><line class="whisker" x1="{px(low):.1f}" x2="{px(high):.1f}" '
            f'y1="{y}" y2="{y}"/><circle cx="{px(rate):.1f}" cy="{y}" r="6"/></g>'
        )
    return "".join([*parts, "</svg>"])


def _frame(axes: _Axes, x_label: str, y_format: Format, marks: list[str], hits: str) -> str:
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">']
    for tick in _y_ticks(axes):
        y = axes.py(tick)
        parts.append(f'<line class="grid" x1="{axes.left:.1f}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        label = html.escape(y_format(tick))
        parts.append(f'<text x="{axes.left - 6:.1f}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
    for tick in _ticks(*axes.x, count=6):
        if tick == int(tick):
            x = axes.px(tick)
            parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 17}" text-anchor="middle">{short(tick)}</text>')
    middle = (axes.left + WIDTH - RIGHT) / 2
    parts.append(f'<text class="axis" x="{middle}" y="{HEIGHT - 4}" text-anchor="middle">{html.escape(x_label)}</text>')
    return "".join([*parts, *marks, hits, "</svg>"])


def _y_ticks(axes: _Axes) -> list[float]:
    if not axes.log:
        return _ticks(*axes.y)
    decades = max(1, math.ceil((axes.y[1] - axes.y[0]) / 5))
    return [10.0**e for e in range(int(axes.y[0]), int(axes.y[1]) + 1, decades)]


def _with_room(axes: _Axes, y_format: Format) -> _Axes:
    """The axes with as much room on the left as the labels of the y axis need."""
    widest = max(text_width(y_format(tick)) for tick in _y_ticks(axes))
    return dataclasses.replace(axes, left=max(float(LEFT), widest + 10))


def text_width(text: str) -> float:
    """Pixels that a text takes at most in the fonts of the page: their glyphs differ, so that this is generous."""
    narrow, wide = "iljtfrI.,:;|!'()[]/- ", "mwMW%@—…✓"
    ems = sum(0.4 if c in narrow else 1.0 if c in wide else 0.75 if c.isupper() else 0.62 for c in text)
    return ems * FONT


def _fitting(text: str, width: float) -> str:
    """The text, with its middle left out where it is too wide: both ends tell policies apart."""
    keep = len(text)
    shown = text
    while text_width(shown) > width:
        keep -= 1
        shown = f"{text[: keep // 2]}…{text[len(text) - (keep - keep // 2) :]}"
    return shown


def _polyline(series: Series, axes: _Axes) -> str:
    commands, pen_down = [], False
    for x, y in zip(series.xs, series.ys, strict=True):
        if y is not None:
            commands.append(f"{'L' if pen_down else 'M'}{axes.px(x):.1f} {axes.py(y):.1f}")
        pen_down = y is not None
    dots = _dots(series, axes) if sum(y is not None for y in series.ys) == 1 else ""  # a lone point draws no line
    return f'<path class="{series.style} c{series.colour}" d="{"".join(commands)}"/>{dots}'


def _dots(series: Series, axes: _Axes) -> str:
    points = [(x, y) for x, y in zip(series.xs, series.ys, strict=True) if y is not None]
    circles = "".join(f'<circle cx="{axes.px(x):.1f}" cy="{axes.py(y):.1f}" r="4"/>' for x, y in points)
    return f'<g class="c{series.colour}">{circles}</g>'


def _area(series: Series, low: list[float], high: list[float], axes: _Axes) -> str:
    xs = [axes.px(x) for x in series.xs]
    if len(xs) == 1:  # one iteration: a bar
        xs, low, high = [xs[0] - 12, xs[0] + 12], low * 2, high * 2
    top = [f"{x:.1f} {axes.py(y):.1f}" for x, y in zip(xs, high, strict=True)]
    bottom = [f"{x:.1f} {axes.py(y):.1f}" for x, y in zip(xs, low, strict=True)]
    return f'<path class="area c{series.colour}" d="M{"L".join(top + bottom[::-1])}Z"/>'


def _hits(series: Sequence[Series], axes: _Axes, x_label: str, y_format: Format) -> str:
    """Invisible bands that show the values at one x when pointed at."""
    texts: dict[float, list[str]] = {}
    for one in series:
        for x, y in zip(one.xs, one.ys, strict=True):
            texts.setdefault(x, []).append(f"{one.name}: {'not finite' if y is None else y_format(y)}")
    width, height = max(3.0, (WIDTH - axes.left - RIGHT) / len(texts)), HEIGHT - TOP - BOTTOM
    return "".join(
        f'<rect class="hit" x="{axes.px(x) - width / 2:.1f}" y="{TOP}" width="{width:.1f}" height="{height}">'
        f"<title>{html.escape(chr(10).join([f'{x_label} {x:.6g}', *lines]))}</title></rect>"
        for x, lines in sorted(texts.items())
    )


def _positive(series: Series) -> Series:
    return dataclasses.replace(series, ys=[y if y is not None and y > 0 else None for y in series.ys])


def _binned(series: Series) -> Series:
    """At most MAX_POINTS points: means over runs of neighbours. A bin without numbers is a gap."""
    if len(series.xs) <= MAX_POINTS or series.style == "dots":
        return series
    size = math.ceil(len(series.xs) / MAX_POINTS)
    xs, ys = [], []
    for start in range(0, len(series.xs), size):
        known = [y for y in series.ys[start : start + size] if y is not None]
        xs.append(series.xs[min(start + size // 2, len(series.xs) - 1)])
        ys.append(sum(known) / len(known) if known else None)
    return dataclasses.replace(series, xs=xs, ys=ys)


def _x_range(series: Sequence[Series]) -> tuple[float, float]:
    xs = [x for one in series for x in one.xs]
    low, high = min(xs), max(xs)
    return (low, high) if high > low else (low - 1, high + 1)


def _nice_range(low: float, high: float) -> tuple[float, float]:
    if high <= low:
        high = low + 1
    step = _step(high - low, 4)
    return math.floor(low / step) * step, math.ceil(high / step) * step


def _ticks(low: float, high: float, count: int = 4) -> list[float]:
    step = _step(high - low, count)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _step(span: float, count: int) -> float:
    """A step of 1, 2 or 5 times a power of ten that cuts `span` in at most about `count` parts."""
    raw = span / count
    power = 10.0 ** math.floor(math.log10(raw))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)


def short(value: float) -> str:
    """A number in few characters: 0.25, 64, 12k, 3.4M, 2e-05."""
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if suffix == 'k' else size):.3g}{suffix}"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
