"""The page of a comparison: table, differences, winner or none, curves, and what the variants are."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from potstill.report import _environment, _script, numbers
from potstill.report.charts import Chart, Point, Series, line_chart
from potstill.report.results import Change, Estimate
from potstill.report.training import side_by_side
from potstill.run import write_whole

AXES = {"steps": "training steps", "rollout_tokens": "rollout tokens", "cpu_seconds": "CPU seconds"}
COLOURS = 6
"""Of the page; further variants get them again, dashed."""
Changes = Mapping[str, Sequence[tuple[str, Any, Any]]]


def render(figures: Mapping[str, Any], changes: Changes, settings: Mapping[str, Any], caption: str) -> str:
    """The page as HTML.

    Args:
        figures: What comparison.json holds.
        changes: Label -> (field, in the recipe, in the variant) wherever they differ.
        settings: Label -> every field of one of its runs.
        caption: What the numbers are.
    """
    environment = _environment()
    script, script_hash = _script(environment)
    main, labels = figures["main"], list(figures["variants"])
    marks = {label: (i, i >= COLOURS) for i, label in enumerate(labels)}
    start = Estimate.read(figures["start"][main])
    bars = [
        {"name": label, "colour": marks[label][0], "changes": [Change("", start, Estimate.read(row[main]), None)]}
        for label, row in figures["variants"].items()
    ]
    return environment.get_template("comparison.html").render(
        figures=figures,
        labels=labels,
        marks=marks,
        bars=bars,
        read=Estimate.read,
        charts=[chart for chart in (_chart(figures, axis, marks) for axis in AXES) if chart],
        changes=changes,
        settings=[row for row in side_by_side(list(settings.values())) if row[0] not in ("name", "seed")],
        caption=caption,
        script=script,
        script_hash=script_hash,
    )


def write(path: Path, figures: Mapping[str, Any], changes: Changes, settings: Mapping[str, Any], caption: str) -> None:
    """Write the page (see `render`) to `path`, whole or not at all. Raises TrainingError when the disk is full."""
    write_whole(path, render(figures, changes, settings, caption))


def _chart(figures: Mapping[str, Any], axis: str, marks: Mapping[str, tuple[int, bool]]) -> Chart | None:
    series = [
        Series(label, colour, [Point(p["x"], p["y"], p["low"], p["high"]) for p in curve[axis]], dashed)
        for (label, curve), (colour, dashed) in zip(figures["curves"].items(), marks.values(), strict=True)
    ]
    return line_chart(
        f"Against {AXES[axis]}",
        series,
        x_label=AXES[axis],
        show=numbers.percent,
        tick=lambda value: f"{100 * value:.0f} %",
        dots=True,
    )
