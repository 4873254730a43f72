"""What came out: scores with intervals over seeds and questions, paired differences, and a winner or none.

Needs no torch. Shapes: S seeds, Q questions; a row of a matrix is a run, a column a question.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from jaxtyping import Float
from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.markup import escape
from rich.table import Table

from potstill.errors import CheckpointError
from potstill.metrics import Interval, crossed_bootstrap
from potstill.progress import accuracy, percent
from potstill.run import Row, Run

FEW = 5
"""Fewer seeds than this make intervals that are too short."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """A comparison that is done. `figures` is what comparison.json holds."""

    folder: Path
    figures: Row

    @property
    def winner(self) -> str | None:
        """The variant that is better than all others beyond chance; None if nobody can tell."""
        return self.figures["winner"]["name"]

    def tables(self) -> Group:
        """For a terminal: scores, then differences and costs. Each fits into 80 columns."""
        f = self.figures
        scores = Table("", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        costs = Table("", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), caption=caption(f))
        heads = [f"{f['main']} -\n{f['against']}", *[name.replace(" ", "\n") for name in COSTS.values()]]
        for table, columns in ((scores, f["measures"]), (costs, heads)):
            table.columns[0].overflow = "fold"  # a long label; never a number
            for column in columns:
                table.add_column(column, justify="right", no_wrap=True)
        scores.add_row("start", *[percent(f["start"][m]) for m in f["measures"]])
        for label, row in f["variants"].items():
            scores.add_row(escape(label), *[percent(row[m]) for m in f["measures"]])
            costs.add_row(escape(label), self._gain(label), *[f"{row[cost]:,.0f}" for cost in COSTS])
        return Group(scores, costs)

    def _gain(self, label: str) -> str:
        f = self.figures
        return "" if label == f["against"] else points(f["variants"][label]["difference"][f["main"]])

    def markdown(self) -> str:
        """The same for a README."""
        f = self.figures
        head = ["", *f["measures"], f"{f['main']} - {f['against']}", *COSTS.values(), "seeds"]
        lines = [f"| {' | '.join(head)} |", "|---|" + "---:|" * (len(head) - 1)]
        blank = [""] * (len(COSTS) + 1)
        lines.append(_line(["start", *[percent(f["start"][m]) for m in f["measures"]], *blank, ""]))
        for label, row in f["variants"].items():
            costs = [f"{row[cost]:,.0f}" for cost in COSTS]
            scores = [percent(row[m]) for m in f["measures"]]
            lines.append(_line([f"`{label}`", *scores, self._gain(label), *costs, row["seeds"]]))
        return "\n".join(
            [*lines, "", caption(f)[0].upper() + caption(f)[1:] + ".", "", f["winner"]["sentence"] + ".", ""]
        )


def _line(cells: Sequence[Any]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


COSTS = {
    "steps": "steps",
    "cpu_seconds": "CPU s",
    "rollout_tokens": "rollout tokens",
    "teacher_tokens": "teacher tokens",
}
"""Means over the seeds; teacher tokens are those read and written."""


def caption(figures: Mapping[str, Any]) -> str:
    """What the numbers are."""
    seeds, questions = figures["seeds"], f"{figures['questions']} {figures['split']} questions"
    if len(seeds) == 1:
        over = f"{questions}; one seed ({seeds[0]}), so seeds were not varied"
    else:
        over = f"{len(seeds)} seeds and {questions}"
        over += "; with fewer than 5 seeds they are too short" * (len(seeds) < FEW)
    return f"per cent and points, with 95 % intervals over {over}; differences are paired; costs are means per run"


def points(interval: Mapping[str, float]) -> str:
    """`+1.2 [-0.5, +2.9]`: a difference in points."""
    return f"{interval['value'] * 100:+.1f} [{interval['low'] * 100:+.1f}, {interval['high'] * 100:+.1f}]"


def measure(runs: Mapping[str, Mapping[int, Run]], against: str) -> Row:
    """All figures of finished runs: label -> seed -> run. Raises CheckpointError if they cannot be compared."""
    scores = {label: [_scores(run) for run in by_seed.values()] for label, by_seed in runs.items()}
    first = next(iter(scores.values()))[0]
    shape = {(row["questions"], row["samples"]) for each in scores.values() for s in each for row in s.ends.values()}
    measures = [m for m in first.last if all(m in s.last for each in scores.values() for s in each)]
    if len({questions for questions, _ in shape}) > 1:
        raise CheckpointError(
            f"the runs were asked different numbers of questions ({sorted(shape)}), so their answers cannot be paired. "
            "Give another folder with --out"
        )
    main = measures[0]
    last = {label: {m: np.stack([s.last[m] for s in each]) for m in measures} for label, each in scores.items()}
    start = {m: np.stack([s.first[m] for s in next(iter(scores.values()))]) for m in measures}
    return {
        "seeds": list(next(iter(runs.values()))),
        "split": first.ends["sampled"]["split"],
        "questions": first.ends["sampled"]["questions"],
        "samples": first.ends["sampled"]["samples"],
        "measures": measures,
        "main": main,
        "against": against,
        "start": {m: _interval(values) for m, values in start.items()},
        "variants": {
            label: {m: _interval(values) for m, values in last[label].items()}
            | {"difference": {m: _interval(last[label][m] - last[against][m]) for m in measures}}
            | _costs(by_seed.values())
            | {"seeds": len(by_seed)}
            for label, by_seed in runs.items()
        },
        "winner": winner({label: of[main] for label, of in last.items()}, main),
        "curves": {label: curves(list(by_seed.values())) for label, by_seed in runs.items()},
    }


def winner(scores: Mapping[str, Float[np.ndarray, "S Q"]], name: str) -> Row:
    """The best of the variants, if its paired difference to the second has an interval without zero."""
    ranked = sorted(scores, key=lambda label: -scores[label].mean())
    if len(ranked) < 2:
        return {"name": None, "sentence": "no winner: there is one variant, and nothing to compare it with"}
    best, second = ranked[:2]
    difference = _interval(scores[best] - scores[second])
    told = f"{best} - {second} = {points(difference)}"
    clear = difference["low"] > 0
    sentence = f"winner: {best} in {name}: {told} points" if clear else f"no winner: best {best}, but {told} holds 0"
    if len(scores[best]) == 1:
        sentence += "; one seed, so seeds were not varied"
    found = {"best": best, "second": second, "difference": difference}
    return {"name": best if clear else None, **found, "sentence": sentence}


def curves(runs: Sequence[Run]) -> dict[str, list[dict[str, float]]]:
    """Sampled accuracy against steps, rollout tokens and CPU seconds: the mean over runs with its lowest and highest.

    A point for every step at which all runs were asked, and one for their ends, which may be at different steps.
    """
    paths = [_path(run) for run in runs]
    common = set.intersection(*[set(path) for path in paths])
    ends = [max(path) for path in paths]
    groups = [[path[step] for path in paths] for step in sorted(common) if step < min(ends)]
    groups.append([path[end] for path, end in zip(paths, ends, strict=True)])
    out: dict[str, list[dict[str, float]]] = {}
    for axis in ("steps", "rollout_tokens", "cpu_seconds"):
        out[axis] = [
            {
                "x": round(fmean(p[axis] for p in group), 3),
                "y": round(fmean(p["y"] for p in group), 6),
                "low": min(p["y"] for p in group),
                "high": max(p["y"] for p in group),
            }
            for group in groups
        ]
    return out


def _path(run: Run) -> dict[int, dict[str, float]]:
    """Step -> where the run was then, for every evaluation."""
    metrics = run.metrics  # a row for each step, from 1 on
    written = [0, *accumulate(row["tokens"] + row["dropped"] for row in metrics)]
    return {
        row["step"]: {
            "steps": float(row["step"]),
            "rollout_tokens": float(written[row["step"]]),
            "cpu_seconds": row["cpu_s"],
            "y": accuracy(row)["value"],
        }
        for row in run.evals
        if row["name"] == "sampled"
    }


@dataclass(frozen=True, slots=True)
class _Scores:
    """Of one run: [Q] of each measure in its first and last evaluation, and the last rows by name."""

    first: dict[str, Any]
    last: dict[str, Any]
    ends: dict[str, Row]


def _scores(run: Run) -> _Scores:
    rows: dict[str, list[Row]] = {}
    for row in run.evals:
        rows.setdefault(row["name"], []).append(row)
    if "sampled" not in rows or rows["sampled"][0]["step"] != 0:
        raise CheckpointError(f"{run.path} has no sampled evaluation at its start and its end. Set eval.questions > 0")
    first, last = (dict(_measures({n: r[i] for n, r in rows.items()})) for i in (0, -1))
    return _Scores(first, last, {name: found[-1] for name, found in rows.items()})


def _measures(rows: Mapping[str, Row]) -> Iterator[tuple[str, Any]]:
    k = rows["sampled"]["samples"]
    yield f"avg@{k}", np.array(rows["sampled"]["scores"])
    yield f"pass@{k}", np.array(rows["sampled"]["passes"])
    if "greedy" in rows:
        yield "greedy", np.array(rows["greedy"]["scores"])


def _interval(scores: Float[np.ndarray, "S Q"]) -> dict[str, float]:
    interval: Interval = crossed_bootstrap(scores)
    return {name: round(value, 6) for name, value in interval._asdict().items()}


def _costs(runs: Any) -> dict[str, float]:
    """Means over the runs."""
    rows = [run.finished for run in runs]
    names = {
        "steps": "step",
        "cpu_seconds": "cpu_s",
        "rollout_tokens": "rollout_tokens",
        "teacher_tokens": "teacher_tokens",
    }
    return {name: round(fmean(row[key] for row in rows), 3) for name, key in names.items()}
