"""Numbers as people read them."""

import math
from collections.abc import Iterable
from typing import Any

MINUS = "\N{MINUS SIGN}"


def finite(value: Any) -> float | None:
    """A number that can be drawn, or None for what is missing, null, nan or infinite."""
    if isinstance(value, int | float) and math.isfinite(value):
        return float(value)
    return None


def short(value: float | int) -> str:
    """Three significant digits: 0.0312, 4.2, 812, 12.4k, 3.1M."""
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            scaled = value / (1e3 if suffix == "k" else size)
            return f"{scaled:.3g}{suffix}".replace("-", MINUS) if abs(scaled) < 999.5 else f"{scaled:,.0f}{suffix}"
    if value == 0:
        return "0"
    if abs(value) < 1e-3:
        return f"{value:.1e}".replace("e-0", "e-").replace("-", MINUS)
    if abs(value) >= 999.5:
        return f"{value:,.0f}".replace("-", MINUS)
    return f"{value:.3g}".replace("-", MINUS)


def percent(value: float | int) -> str:
    """A fraction as a percentage with one decimal, not to be broken over lines: 0.125 -> 12.5 %."""
    return f"{100 * value:.1f}\N{NO-BREAK SPACE}%".replace("-", MINUS)


def points(value: float | int) -> str:
    """A difference of two fractions, signed, in percentage points: 0.775 -> +77.5."""
    return f"{100 * value:+.1f}".replace("-", MINUS)


def count(value: float | int) -> str:
    """A whole number with separators: 1234567 -> 1,234,567."""
    return f"{value:,.0f}".replace("-", MINUS)


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) that cover `low` .. `high`; low < high."""
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(s * power for s in (1, 2, 5, 10) if s * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def quantile(values: Iterable[float], q: float) -> float:
    """The q-quantile (nearest rank below), 0 for none: robust ends of a colour scale."""
    ordered = sorted(values)
    return ordered[int(q * (len(ordered) - 1))] if ordered else 0.0


def round_up(value: float) -> float:
    """The next number whose quarters are short: 1, 1.2, 1.6, 2, 2.4, 3.2, 4, 6 or 8 times a power of ten; 0 for 0."""
    if value <= 0:
        return 0.0
    power = 10.0 ** math.floor(math.log10(value))
    steps = (1.0, 1.2, 1.6, 2.0, 2.4, 3.2, 4.0, 6.0, 8.0, 10.0)
    return float(f"{next(s * power for s in steps if s * power >= value * 0.999):.3g}")
