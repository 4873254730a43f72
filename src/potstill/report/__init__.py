"""The report: one self-contained HTML page that shows why a student became better.

It needs no network, no torch and, but for tooltips and choosing, no JavaScript. Everything that a model wrote is
escaped, and a content security policy forbids every script but the page's own.
"""

import json
from base64 import b64encode
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from potstill.report import numbers
from potstill.report.charts import Chart, line_chart
from potstill.report.inside import look_inside
from potstill.report.results import (
    DECODING,
    accuracy_series,
    behind_curves,
    evaluations,
    from_runs,
    from_summary,
)
from potstill.report.training import method_of, side_by_side, training_charts
from potstill.run import Row, Run, write_whole

__all__ = ["render", "write"]

TITLE = "What the student learned"


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("potstill.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for name in ("short", "percent", "points", "count"):
        environment.filters[name] = getattr(numbers, name)
    return environment


def _script(environment: Environment) -> tuple[str, str]:
    """The page's script, and the hash by which the security policy allows it."""
    text = environment.get_template("script.js").render()
    return text, b64encode(sha256(text.encode()).digest()).decode()


def _accuracy_chart(title: str, runs: Sequence[Run], across: str, x_label: str) -> Chart | None:
    return line_chart(
        title,
        [s for s in accuracy_series(runs, across) if s.points],
        x_label=x_label,
        size=(520, 320),
        y_range=(0.0, 1.0),
        show=numbers.percent,
        tick=lambda value: f"{100 * value:.0f} %",
        dots=True,
    )


def _env(run: Run) -> Row:
    path = run.path / "env.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def render(runs: Sequence[Run], summary: Mapping[str, Any] | None = None, title: str = TITLE) -> str:
    """The page as HTML, below 3 MB for as many as twenty runs of any length.

    Args:
        runs: What to show, at least one. Runs that are still going are shown as far as they are.
        summary: The demo's summary.json: start, end and gain of each method with intervals. Without it the table
            is made from the first and last evaluation of each run, and gains have no interval.
        title: The heading.

    Raises:
        CheckpointError: A row of a run cannot be read.
    """
    environment = _environment()
    script, script_hash = _script(environment)
    charts = [
        _accuracy_chart("Accuracy against steps", runs, "step", "training steps"),
        _accuracy_chart("Accuracy against computing time", runs, "cpu_s", "CPU seconds"),
    ]
    training, more_training = training_charts(runs)
    splits = {str(row.get("split", "")) for run in runs for how in DECODING for row in evaluations(run, how)}
    return environment.get_template("page.html").render(
        title=title,
        runs=runs,
        methods=[method_of(run) for run in runs],
        decoding=DECODING,
        summary=summary,
        results=from_summary(summary, runs) if summary else from_runs(runs),
        charts=[chart for chart in charts if chart],
        splits=sorted(splits),
        measures=behind_curves(runs),
        training=training,
        more_training=more_training,
        inside=look_inside(runs),
        settings=side_by_side([run.resolved for run in runs]),
        environment=side_by_side([_env(run) for run in runs]),
        script=script,
        script_hash=script_hash,
    )


def write(path: str | Path, runs: Sequence[Run], summary: Mapping[str, Any] | None = None, title: str = TITLE) -> Path:
    """Write the page (see `render`) to `path`, whole or not at all. Raises TrainingError when the disk is full."""
    path = Path(path)
    write_whole(path, render(runs, summary, title))
    return path
