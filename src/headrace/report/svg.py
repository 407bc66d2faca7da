"""Charts as SVG text: scales, axes and marks, coloured by classes of the page's style sheet.

Written by hand and not drawn by a plotting library: so colours follow the reader's light or dark theme, text stays text
that can be searched and scales with the page, a chart is a few kilobytes, and nothing optional must be installed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape

from headrace.report.words import duration, short

WIDTH = 480.0
HEIGHT = 300.0
LETTER = 7.0  # width of a letter of the charts' 12 px text in wide fonts
LINE = 15.0
GAP = 6.0


@dataclass(frozen=True, slots=True)
class Scale:
    """Maps values to pixels between `first` and `last`. `low` < `high`; above 0 where logarithmic."""

    low: float
    high: float
    first: float
    last: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        at = math.log(max(value, self.low * 1e-3)) if self.log else value
        return self.first + (at - low) / (high - low) * (self.last - self.first)


@dataclass(frozen=True, slots=True)
class Tick:
    at: float
    label: str


@dataclass(frozen=True, slots=True)
class Label:
    """A text that wants to be at `y` and may be moved up or down."""

    y: float
    text: str
    style: str


def linear_ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Return round numbers within the bounds: multiples of 1, 2 or 5 times a power of ten."""
    step = 10 ** math.floor(math.log10((high - low) / wanted))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= wanted)
    return [step * number for number in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Return powers of ten within the bounds, with multiples between them where there would be fewer than three."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1,), (1, 3), (1, 2, 5)):
        found = [factor * 10.0**exponent for exponent in exponents for factor in factors]
        within = [each for each in found if low * 0.999 <= each <= high * 1.001]
        if len(within) >= 3:
            return within
    return linear_ticks(low, high)  # less than a decade


def time_ticks(values: Sequence[float]) -> list[Tick]:
    return [Tick(value, duration(value).replace(".00 ", " ").replace(".0 ", " ")) for value in values]


def number_ticks(values: Sequence[float]) -> list[Tick]:
    return [Tick(value, short(round(value, 9))) for value in values]


def padded_log(values: Sequence[float], below: float = 1.3, above: float = 1.3) -> tuple[float, float]:
    """Return bounds around positive values with room at both ends. At least one value is positive."""
    positive = [value for value in values if value > 0]
    return min(positive) / below, max(positive) * above


def spread_labels(labels: Sequence[Label], top: float, bottom: float, height: float = LINE) -> list[Label]:
    """Move labels apart, so that none covers another and all lie between `top` and `bottom` if they fit there."""
    placed = sorted(labels, key=lambda label: label.y)
    ys: list[float] = []
    for label in placed:
        ys.append(max(label.y, ys[-1] + height) if ys else max(label.y, top))
    limit = bottom
    for at in reversed(range(len(ys))):
        ys[at] = min(ys[at], limit)
        limit = ys[at] - height
    return [Label(y, label.text, label.style) for y, label in zip(ys, placed, strict=True)]


def shorten(text: str, width: float) -> str:
    """Return the text, cut with an ellipsis where it is wider than so many pixels."""
    letters = max(4, int(width / LETTER))
    return text if len(text) <= letters else text[: letters - 1] + "…"


def number(value: float) -> str:
    """Return a coordinate, to a tenth of a pixel."""
    text = f"{value:.1f}"
    return text.removesuffix(".0")


@dataclass(slots=True)
class Chart:
    """A picture under construction, in pixels from the upper left corner."""

    title: str  # for those who cannot see it
    width: float = WIDTH
    height: float = HEIGHT
    left: float = 52.0
    right: float = 16.0
    top: float = 12.0
    bottom: float = 40.0
    parts: list[str] = field(default_factory=list)

    @property
    def inner_right(self) -> float:
        return self.width - self.right

    @property
    def inner_bottom(self) -> float:
        return self.height - self.bottom

    def x(self, low: float, high: float, *, log: bool = False) -> Scale:
        return Scale(low, high, self.left, self.inner_right, log)

    def y(self, low: float, high: float, *, log: bool = False) -> Scale:
        return Scale(low, high, self.inner_bottom, self.top, log)

    def x_axis(self, scale: Scale, ticks: Sequence[Tick], name: str, *, grid: bool = False) -> None:
        bottom = self.inner_bottom
        last_end = -math.inf
        for tick in ticks:
            at, half = scale(tick.at), len(tick.label) * LETTER / 2
            if grid:
                self.segment(at, self.top, at, bottom, "grid")
            if at - half > last_end:
                self.text(at, bottom + LINE, tick.label, "quiet mid")
                last_end = at + half + GAP
        self.segment(self.left, bottom, self.inner_right, bottom, "axis")
        self.text((self.left + self.inner_right) / 2, self.height - 4, name, "quiet mid")

    def y_axis(self, scale: Scale, ticks: Sequence[Tick]) -> None:
        for tick in ticks:
            at = scale(tick.at)
            self.segment(self.left, at, self.inner_right, at, "grid")
            self.text(self.left - GAP, at + 4, tick.label, "quiet end")

    def segment(self, x1: float, y1: float, x2: float, y2: float, style: str) -> None:
        self.parts.append(f'<path class="{style}" d="M{number(x1)} {number(y1)}L{number(x2)} {number(y2)}"/>')

    def line(self, points: Sequence[tuple[float, float]], style: str, tip: str = "") -> None:
        """Draw a line through points, with a text for a pointer that rests on it."""
        where = "L".join(f"{number(x)} {number(y)}" for x, y in points)
        self.parts.append(f'<path class="line {style}" d="M{where}">{_tip(tip)}</path>')

    def dots(self, points: Sequence[tuple[float, float]], style: str) -> None:
        """Draw many equal dots in one element."""
        where = "".join(f"M{number(x)} {number(y)}h0" for x, y in points)
        self.parts.append(f'<path class="dots {style}" d="{where}"/>')

    def dot(self, x: float, y: float, style: str, tip: str = "") -> None:
        self.parts.append(f'<circle class="{style}" cx="{number(x)}" cy="{number(y)}" r="4">{_tip(tip)}</circle>')

    def bars(self, bars: Sequence[tuple[float, float, float]], width: float, style: str) -> None:
        """Draw upright bars (x, y of one end, y of the other) in one element."""
        where = "".join(f"M{number(x)} {number(low)}V{number(high)}" for x, low, high in bars)
        self.parts.append(f'<path class="bars {style}" stroke-width="{number(width)}" d="{where}"/>')

    def box(self, x: float, y: float, width: float, height: float, style: str, *, tip: str = "") -> None:
        self.parts.append(
            f'<rect class="{style}" x="{number(x)}" y="{number(y)}" width="{number(width)}"'
            f' height="{number(height)}">{_tip(tip)}</rect>'
        )

    def text(self, x: float, y: float, text: str, style: str = "") -> None:
        self.parts.append(f'<text class="{style}" x="{number(x)}" y="{number(y)}">{escape(text)}</text>')

    def end_labels(self, labels: Sequence[Label], x: float) -> None:
        """Write labels to the right of `x`, moved apart."""
        for label in spread_labels(labels, self.top + 4, self.inner_bottom):
            self.text(x, label.y + 4, shorten(label.text, self.width - x), f"name {label.style}")

    def done(self) -> str:
        return (
            f'<svg viewBox="0 0 {number(self.width)} {number(self.height)}" role="img"'
            f' aria-label="{escape(self.title, quote=True)}">{"".join(self.parts)}</svg>'
        )


def label_room(texts: Sequence[str], most: float) -> float:
    """Return how many pixels the longest text needs, up to a bound."""
    return min(most, max((len(text) for text in texts), default=0) * LETTER + 2 * GAP)


def ticks_within(scale: Scale, make: Callable[[Sequence[float]], list[Tick]]) -> list[Tick]:
    values = log_ticks(scale.low, scale.high) if scale.log else linear_ticks(scale.low, scale.high)
    return make(values)


def _tip(text: str) -> str:
    return f"<title>{escape(text)}</title>" if text else ""
