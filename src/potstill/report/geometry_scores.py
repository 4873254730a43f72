"""Figures 6 and 8: what runs score while they train, with projected gradients and without. Needs no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from potstill.report.charts import Chart, Point, Series, line_chart
from potstill.report.numbers import percent

Marks = Mapping[str, tuple[int, bool]]
"""Label -> colour, dashed."""


@dataclass(frozen=True, slots=True)
class Projected:
    """A run within a subspace, beside the run of the same method without."""

    label: str
    plain: str | None
    basis: str
    k: int
    mode: str
    at: float
    start: float | None
    """The plain run's score when the projection starts: at the nearest evaluation."""
    end: Mapping[str, float]
    """Value, low, high."""
    plain_end: Mapping[str, float] | None

    @property
    def kept(self) -> float | None:
        """Share of the plain run's gain since then; None where it gained nothing."""
        if self.start is None or self.plain_end is None or self.plain_end["value"] <= self.start:
            return None
        return (self.end["value"] - self.start) / (self.plain_end["value"] - self.start)


def projected(found: Mapping[str, Any]) -> list[Projected]:
    """Of all runs among these geometries that were confined."""
    trained = {label: f["training"] for label, f in found.items() if (f.get("training") or {}).get("scores")}
    free = {label: t for label, t in trained.items() if not t["projection"]}
    return [_beside(label, t, free) for label, t in trained.items() if t["projection"]]


def _beside(label: str, t: Mapping[str, Any], free: Mapping[str, Any]) -> Projected:
    p, end = t["projection"], t["scores"][-1]
    plain = next((name for name, other in free.items() if other["method"] == t["method"]), None)
    scores = free[plain]["scores"] if plain else []
    start = min(scores, key=lambda s: abs(s["progress"] - p["at"]))["value"] if scores else None
    basis = "stopped" if p["k"] == 0 else p["from"]
    return Projected(label, plain, basis, p["k"], p["mode"], p["at"], start, end, scores[-1] if scores else None)


def charts(found: Mapping[str, Any], marks: Marks) -> list[Chart]:
    """Scores against time; against K where projected runs differ in it."""
    series = [
        Series(label, colour, [Point(100 * s["progress"], s["value"], s["low"], s["high"]) for s in scores], dashed)
        for label, (colour, dashed) in marks.items()
        if (scores := (found[label].get("training") or {}).get("scores"))
    ]
    runs = projected(found)
    ranked = [
        Series(f"{plain or '?'}, {mode}, {basis}", i, _by_k(runs, plain, mode, basis))
        for i, (plain, mode, basis) in enumerate(dict.fromkeys((r.plain, r.mode, r.basis) for r in runs))
    ]
    drawn = [
        line_chart("Right answers", series, x_label="% of training", show=percent, tick=_whole, dots=True),
        line_chart("Right answers at the end", ranked, x_label="K", show=percent, tick=_whole, dots=True)
        if len({r.k for r in runs if r.k}) > 1
        else None,
    ]
    return [chart for chart in drawn if chart]


def _by_k(runs: Sequence[Projected], plain: str | None, mode: str, basis: str) -> list[Point]:
    mine = [r for r in runs if (r.plain, r.mode, r.basis) == (plain, mode, basis)]
    return [
        Point(float(r.k), r.end["value"], r.end["low"], r.end["high"]) for r in sorted(mine, key=lambda r: r.k) if r.k
    ]


def _whole(value: float) -> str:
    return f"{100 * value:.0f} %"
