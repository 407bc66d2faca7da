"""Numbers as people read them: three digits, and the unit that fits."""

from __future__ import annotations

NOTHING = "–"  # noqa: RUF001  an en dash, as in printed tables
_TIMES = ((1.0, 1.0, "s"), (1e-3, 1e3, "ms"), (0.0, 1e6, "µs"))
_SIZES = ((1e9, "G"), (1e6, "M"), (1e3, "k"))


def duration(value_s: float | None) -> str:
    """Return seconds with the unit that leaves 1 to 1000 before it."""
    if value_s is None:
        return NOTHING
    if value_s == 0:
        return "0 s"
    _, factor, unit = next(each for each in _TIMES if abs(value_s) >= each[0])
    return f"{digits(value_s * factor)} {unit}"


def digits(value: float | None) -> str:
    """Return three significant digits, and all of those before the point."""
    if value is None:
        return NOTHING
    if abs(value) >= 99.95:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 9.995 else f"{value:.2f}" if abs(value) >= 0.9995 else f"{value:.3g}"


def short(value: float) -> str:
    """Return a tick's label: k, M or G in place of noughts."""
    for size, letter in _SIZES:
        if abs(value) >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


def percent(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.1f} %" if value < 99.95 else "100 %"


def count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")
