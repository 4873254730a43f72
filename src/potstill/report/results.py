"""How good the student was before and after: the table of methods, in numbers and in one sentence each."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from potstill.report.charts import Point, Series
from potstill.report.numbers import count, finite, percent, points, short
from potstill.run import Row, Run

DECODING = {"sampled": "sampled at temperature 1", "greedy": "greedy (always the likeliest token)"}
MOST_ROWS = 300
"""Of the table of evaluations: a long one would make the page large, and nobody reads it."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number and its 95 % interval, where it has one."""

    value: float
    low: float | None = None
    high: float | None = None

    @classmethod
    def read(cls, record: Any) -> "Estimate | None":
        """From {"value", "low", "high"}; None if there is no number in it."""
        if not isinstance(record, Mapping):
            return None
        value = finite(record.get("value"))
        return None if value is None else cls(value, finite(record.get("low")), finite(record.get("high")))

    @property
    def interval(self) -> tuple[float, float] | None:
        """(low, high), or None."""
        return None if self.low is None or self.high is None else (self.low, self.high)

    @property
    def clear(self) -> bool:
        """Of a gain: whether the interval leaves out zero."""
        return self.interval is not None and (self.interval[0] > 0 or self.interval[1] < 0)


@dataclass(frozen=True, slots=True)
class Change:
    """Start, end and gain of one method under one way of decoding."""

    how: str
    start: Estimate | None
    end: Estimate | None
    gain: Estimate | None


@dataclass(frozen=True, slots=True)
class Result:
    """One row of the table of methods."""

    name: str
    colour: int
    changes: tuple[Change, ...]
    cpu_seconds: float | None
    teacher_read: float | None
    teacher_written: float | None
    sentence: str


def metric(row: Row, prefix: str = "avg@") -> str | None:
    """The key of an evaluation's accuracy: avg@k, whatever k is."""
    return next((key for key in row if key.startswith(prefix)), None)


def accuracy(row: Row) -> Estimate | None:
    """The share of right answers of one evaluation, averaged over samples and questions."""
    key = metric(row)
    return Estimate.read(row[key]) if key else None


def evaluations(run: Run, how: str, *, steps: int = 1) -> list[Row]:
    """A run's evaluations under one way of decoding, on one split, by step.

    Of the splits that were evaluated at `steps` different steps at least, the one with most; test before validation.
    """
    splits: dict[str, dict[int, Row]] = {}
    for row in run.evals:
        if row.get("name") == how and accuracy(row):
            splits.setdefault(str(row.get("split", "")), {})[row["step"]] = row
    fit = {name: rows for name, rows in splits.items() if len(rows) >= steps}
    if not fit:
        return []
    best = max(fit, key=lambda name: (len(fit[name]), name == "test"))
    return [row for _, row in sorted(fit[best].items())]


def curve(run: Run, how: str, across: str) -> list[Point]:
    """Accuracy against `across` ("step" or "cpu_s"), with intervals."""
    found: list[Point] = []
    for row in evaluations(run, how):
        x, y = finite(row.get(across)), accuracy(row)
        if x is not None and y is not None:
            found.append(Point(x, y.value, y.low, y.high))
    return found


def accuracy_series(runs: Sequence[Run], across: str) -> list[Series]:
    """Both curves of every run: sampled solid, greedy dashed."""
    return [
        Series(f"{run.path.name}, {how}", colour, curve(run, how, across), dashed=how == "greedy")
        for colour, run in enumerate(runs)
        for how in DECODING
    ]


def _sentence(name: str, change: Change, cpu_seconds: float | None, written: float | None) -> str:
    """What happened, in words that claim no more than the interval allows."""
    if change.start is None or change.end is None or change.gain is None:
        return f"{name} has no evaluation at the start and at the end, so nothing can be said about its gain."
    gain, start, end = change.gain, change.start.interval, change.end.interval
    overlap = gain.interval is None and start and end and start[0] <= end[1] and end[0] <= start[1]
    if gain.interval and not gain.clear:
        verb = "did not change clearly"
    elif overlap:
        verb = "went"
    else:
        verb = "rose" if gain.value > 0 else "fell" if gain.value < 0 else "stayed the same"
    text = f"{verb} from {percent(change.start.value)} to {percent(change.end.value)} ({points(gain.value)} points"
    if gain.interval:
        text += f", 95 % interval {points(gain.interval[0])} to {points(gain.interval[1])}"
    if overlap:
        text += "; the intervals before and after overlap, so this may be chance"
    text += ")"
    if cpu_seconds is not None:
        text += f", for {short(cpu_seconds)} CPU seconds"
    if written:
        text += f" and {count(written)} tokens written by the teacher"
    return f"With {name}, the share of right answers {text}."


def _result(name: str, colour: int, changes: Sequence[Change], cpu: Any, read: Any, written: Any) -> Result:
    cpu_seconds, teacher_read, teacher_written = finite(cpu), finite(read), finite(written)
    sentence = _sentence(name, changes[0], cpu_seconds, teacher_written)
    return Result(name, colour, tuple(changes), cpu_seconds, teacher_read, teacher_written, sentence)


def from_summary(summary: Mapping[str, Any], runs: Sequence[Run]) -> list[Result]:
    """The demo's summary, a row a method; a method takes the colour of its run."""
    colours = {run.path.name: number for number, run in enumerate(runs)}
    rows: list[Result] = []
    for name, record in summary.get("methods", {}).items():
        changes = [
            Change(how, *(Estimate.read((record.get(part) or {}).get(how)) for part in ("start", "end", "gain")))
            for how in DECODING
        ]
        teacher = record.get("teacher_tokens") or {}
        colour = colours.get(record.get("run", name), len(colours) + len(rows))
        spent = (record.get("cpu_seconds"), teacher.get("read"), teacher.get("written"))
        rows.append(_result(name, colour, changes, *spent))
    return rows


def from_runs(runs: Sequence[Run]) -> list[Result]:
    """The same table from first and last evaluations. Gains have no interval: those need paired answers."""
    rows: list[Result] = []
    for colour, run in enumerate(runs):
        changes: list[Change] = []
        for how in DECODING:
            found = [accuracy(row) for row in evaluations(run, how, steps=2)]
            start, end = (found[0], found[-1]) if found else (None, None)
            gain = Estimate(end.value - start.value) if start and end else None
            changes.append(Change(how, start, end, gain))
        metrics = run.metrics
        cpu = finite(metrics[-1].get("cpu_s")) if metrics else None
        used = [sum(finite(row.get(key)) or 0.0 for row in metrics) for key in ("teacher/read", "teacher/written")]
        rows.append(_result(run.path.name, colour, changes, cpu, *used))
    return rows


def behind_curves(runs: Sequence[Run]) -> tuple[list[str], list[dict[str, Any]], bool]:
    """The evaluations as a table: the names of the measures, and a row an evaluation, whether it was shortened.

    Above MOST_ROWS it holds only the first and the last step of each run.
    """
    rows = [(run, row) for run in runs for row in run.evals]
    shortened = len(rows) > MOST_ROWS
    if shortened:
        ends = {run.path: {found[0]["step"], found[-1]["step"]} for run in runs if (found := run.evals)}
        rows = [(run, row) for run, row in rows if row["step"] in ends[run.path]]
    names: list[str] = []
    for _, row in rows:
        names += [key for key, value in row.items() if Estimate.read(value) and key not in names]
    table = [
        {
            "run": run.path.name,
            "row": row,
            "cells": [_cell(name, Estimate.read(row.get(name))) for name in names],
        }
        for run, row in rows
    ]
    return names, table, shortened


def _cell(name: str, estimate: Estimate | None) -> str:
    if estimate is None:
        return ""
    show = short if name == "length" else percent
    if estimate.interval is None:
        return show(estimate.value)
    return f"{show(estimate.value)} [{show(estimate.interval[0])} \N{EN DASH} {show(estimate.interval[1])}]"
