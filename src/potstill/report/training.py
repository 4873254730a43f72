"""The training curves: one small chart for each number in metrics.jsonl."""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

from potstill.report.charts import Chart, Point, Series, line_chart
from potstill.report.numbers import finite
from potstill.run import Row, Run

FIRST = ("verdict", "loss", "entropy", "length", "consensus", "teacher/written", "teacher/read")
"""Shown at once, in this order; the rest is folded away."""
ADDED_UP = ("teacher/read", "teacher/cached", "teacher/written", "tokens")
"""Logged for each step, drawn as totals since the start: what was spent so far."""
OWN_SCALE = ("loss", "grad_norm")
"""Mean different things for different methods, so only runs of one method share a chart."""
AXES = ("step", "cpu_s")


def method_of(run: Run) -> str:
    """The name of the run's method, from its resolved recipe; the run's own name where that has none."""
    method = run.resolved.get("method")
    name = method.get("name") if isinstance(method, Mapping) else method
    return str(name) if name else run.path.name


def logged_curve(rows: Sequence[Row], name: str) -> list[Point]:
    """One number of metrics.jsonl against the step; steps where it is missing are left out."""
    found = [(float(row["step"]), value) for row in rows if (value := finite(row.get(name))) is not None]
    values = [value for _, value in found]
    if name in ADDED_UP:
        values = list(accumulate(values))
    return [Point(step, value) for (step, _), value in zip(found, values, strict=True)]


def _chart(name: str, runs: Sequence[tuple[int, Run]], metrics: Mapping[int, list[Row]], title: str) -> Chart | None:
    from potstill.logged import LOGGED  # here, because only a page that is being made needs the table

    unit, definition = LOGGED.get(name, ("", ""))
    total = name in ADDED_UP
    series = [Series(run.path.name, colour, logged_curve(metrics[colour], name)) for colour, run in runs]
    if total and not any(p.y for s in series for p in s.points):
        return None  # a teacher that was never asked to write, say
    note = f"{definition} Drawn: the sum of all steps so far." if total else definition
    return line_chart(title, series, x_label="step", unit=unit, note=note.strip())


def training_charts(runs: Sequence[Run]) -> tuple[list[Chart], list[Chart]]:
    """The charts to show at once, and the others; runs share a chart where their numbers mean the same."""
    metrics: dict[int, list[Row]] = {colour: run.metrics for colour, run in enumerate(runs)}
    names: list[str] = list(FIRST)
    for rows in metrics.values():
        names += sorted({key for row in rows for key in row} - set(names) - set(AXES))
    main: list[Chart] = []
    others: list[Chart] = []
    for name in names:
        for title, group in _groups(name, runs):
            if chart := _chart(name, group, metrics, title):
                (main if name in FIRST else others).append(chart)
    return main, others


def _groups(name: str, runs: Sequence[Run]) -> list[tuple[str, list[tuple[int, Run]]]]:
    """Which runs share the chart of `name`, and its title."""
    numbered = list(enumerate(runs))
    methods = list(dict.fromkeys(method_of(run) for run in runs))
    if name not in OWN_SCALE or len(methods) == 1:
        return [(name, numbered)]
    return [(f"{name} of {m}", [(c, r) for c, r in numbered if method_of(r) == m]) for m in methods]


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as dotted names with their values as text: {"a": {"b": 1}} -> {"a.b": "1"}."""
    flat: dict[str, str] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = "none" if value is None else str(value)
    return flat


def side_by_side(trees: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str], bool]]:
    """Rows (name, a value for each tree, whether they differ); those that differ come first."""
    flat = [flatten(tree) for tree in trees]
    names = list(dict.fromkeys(name for tree in flat for name in tree))
    rows = [(name, [tree.get(name, "") for tree in flat]) for name in names]
    marked = [(name, values, len(set(values)) > 1) for name, values in rows]
    return sorted(marked, key=lambda row: not row[2])
