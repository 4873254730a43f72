"""Line charts as inline SVG: here the geometry, in `templates/macros.html` the drawing."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from potstill.report.numbers import short, ticks

MOST_POINTS = 240
"""A longer series is averaged in stretches: its chart is about 300 pixels wide, and the page must stay small."""
MOST_IN_CHART = 720
"""Points of all series of a chart together, for the same reason."""


@dataclass(frozen=True, slots=True)
class Point:
    """One measurement; `low` and `high` bound its interval where it has one."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None

    def told(self, show: Callable[[float], str]) -> str:
        """The value in words, with its interval."""
        if self.low is None or self.high is None:
            return show(self.y)
        return f"{show(self.y)} [{show(self.low)} \N{EN DASH} {show(self.high)}]"


@dataclass(frozen=True, slots=True)
class Series:
    """What one line shows. `colour` numbers the page's series colours; greedy decoding is drawn dashed."""

    name: str
    colour: int
    points: Sequence[Point]
    dashed: bool = False


@dataclass(frozen=True, slots=True)
class Tick:
    """A label on an axis, at a pixel."""

    at: float
    label: str


@dataclass(frozen=True, slots=True)
class Line:
    """A series in pixels: SVG path data, and for each point what the tooltip says."""

    series: Series
    path: str
    band: str
    dots: list[tuple[float, float]]
    hover: list[tuple[float, float, str, str]]


@dataclass(frozen=True, slots=True)
class Chart:
    """Everything the template needs to draw one chart."""

    title: str
    unit: str
    x_label: str
    width: int
    height: int
    left: int
    right: float
    top: int
    bottom: float
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    lines: list[Line]
    note: str
    summary: str
    """For those who cannot see it."""


def thin(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """At most `most` points: means over equal stretches of the series. Short series stay as they are."""
    if len(points) <= most:
        return list(points)
    cuts = [round(i * len(points) / most) for i in range(most + 1)]
    stretches = [points[a:b] for a, b in pairwise(cuts)]
    return [Point(sum(p.x for p in s) / len(s), sum(p.y for p in s) / len(s)) for s in stretches]


def spread(values: Sequence[float]) -> tuple[float, float]:
    """The range of an axis: from 0 if that wastes less than half of the height; never empty."""
    low, high = min(values), max(values)
    if 0 < low <= 0.5 * high:
        low = 0.0
    if high - low <= 1e-9 * max(abs(high), abs(low)):
        margin = 0.1 * abs(high) or 1.0
        return (0.0, high + margin) if high >= 0 else (low - margin, 0.0)
    return low, high


def _path(pixels: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in pixels) if pixels else ""


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    x_label: str,
    unit: str = "",
    note: str = "",
    size: tuple[int, int] = (330, 190),
    y_range: tuple[float, float] | None = None,
    show: Callable[[float], str] = short,
    tick: Callable[[float], str] = short,
    dots: bool = False,
) -> Chart | None:
    """Lay out a chart of `series` in a box of `size` pixels; None if no series has a point.

    `show` writes a value in the tooltip, `tick` on the axis. Intervals become bands.
    """
    most = min(MOST_POINTS, max(10, MOST_IN_CHART // max(1, len(series))))
    drawn = [Series(s.name, s.colour, thin(s.points, most), s.dashed) for s in series if s.points]
    if not drawn:
        return None
    every = [p for s in drawn for p in s.points]
    bounds = [v for p in every for v in (p.y, p.low, p.high) if v is not None]
    y_at = ticks(*(y_range or spread(bounds)), about=5)
    x_low, x_high = min(p.x for p in every), max(p.x for p in every)
    if x_high == x_low:
        x_low, x_high = x_low - 1, x_high + 1
    width, height = size
    left, top = 14 + 8 * max(len(tick(t)) for t in y_at), 10
    right, bottom = width - 14.0, height - 40.0

    def place(x: float, y: float) -> tuple[float, float]:
        across = left + (x - x_low) / (x_high - x_low) * (right - left)
        return across, bottom - (y - y_at[0]) / (y_at[-1] - y_at[0]) * (bottom - top)

    def line(s: Series) -> Line:
        middle = [place(p.x, p.y) for p in s.points]
        whole = [p for p in s.points if p.low is not None and p.high is not None]
        up = [place(p.x, p.high) for p in whole if p.high is not None]
        down = [place(p.x, p.low) for p in reversed(whole) if p.low is not None]
        hover = [
            (round(x, 1), round(y, 1), short(p.x), p.told(show)) for (x, y), p in zip(middle, s.points, strict=True)
        ]
        return Line(s, _path(middle), _path(up + down) + "Z" if len(whole) > 1 else "", middle if dots else [], hover)

    lines = [line(s) for s in drawn]
    told = "; ".join(f"{s.name} goes from {show(s.points[0].y)} to {show(s.points[-1].y)}" for s in drawn)
    inside = [t for t in ticks(x_low, x_high, about=5) if x_low <= t <= x_high]
    return Chart(
        title, unit, x_label, width, height, left, right, top, bottom,
        [Tick(place(t, 0.0)[0], short(t)) for t in inside],
        [Tick(place(x_low, t)[1], tick(t)) for t in y_at],
        lines, note, f"{title} against {x_label}: {told}.",
    )  # fmt: skip
