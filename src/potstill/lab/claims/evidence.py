"""What the claims are judged by: numbers of finished runs, one for each seed. Needs no torch."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from potstill.progress import accuracy
from potstill.run import Run

METHODS = ("sft", "opd", "grpo", "omniopd", "sgopd")
"""Those of the paper first: SFT, OPD, RLVR."""
K = 4
"""Of subspaces, a little below the stable rank of dW after a fifth of the run, as the paper's 16."""

Values = list[float]
"""One number for each seed."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """Every run of the three comparisons, and the geometries of the methods'."""

    runs: Mapping[str, Sequence[Run]]
    """Variant -> its runs, by seed. Controls may have fewer; they are paired with the first ones."""
    measured: Mapping[str, Sequence[Mapping[str, Any]]]
    """Method -> what geometry.json holds, by seed."""

    def column(self, method: str, column: str, *, group: str = "all", at: int = -1) -> Values:
        """Mean of a column over the matrices of a checkpoint; at = 0: the first."""
        points = [figures["aggregate"][group][at]["columns"] for figures in self.measured[method]]
        return [point[column]["mean"] for point in points]

    def sparsity(self, method: str) -> tuple[Values, Values]:
        """Share of unchanged weights at the end, and that of the rotated updates, over all linear weights."""
        own = [figures["aggregate"]["all"][-1]["sparsity"] for figures in self.measured[method]]
        return own, [1 - _weighted(figures, "density_null") for figures in self.measured[method]]

    def ranks(self, variant: str) -> list[Values]:
        """Stable rank of dW over the checkpoints, mean over attention matrices, for each seed."""
        return [_course(run, "stable_rank") for run in self.runs[variant]]

    def norm(self, variant: str) -> Values:
        """Norm of dW at the end, mean over attention matrices."""
        return [_course(run, "frobenius")[-1] for run in self.runs[variant]]

    def distance(self, variant: str, to: str) -> Values:
        """Mean over the checkpoints of |log ratio| of two stable-rank curves, seed by seed."""
        pairs = zip(self.ranks(variant), self.ranks(to), strict=False)
        return [fmean(abs(x) for x in logs(a, b)) for a, b in pairs]

    def between_seeds(self, variant: str) -> Values:
        """The same distance between each run and that of the next seed."""
        ranks = self.ranks(variant)
        return [fmean(abs(x) for x in logs(a, b)) for a, b in zip(ranks, [*ranks[1:], ranks[0]], strict=True)]

    def score(self, variant: str, share: float = 1.0) -> Values:
        """Sampled accuracy after this share of the run."""
        return [_score(run, share) for run in self.runs[variant]]

    def logged(self, variant: str, key: str) -> Values:
        """Mean of a logged number over the steps that have it."""
        return [fmean(row[key] for row in run.metrics if key in row) for run in self.runs[variant]]

    def last(self, variant: str, key: str) -> Values:
        """The last value of a logged number."""
        return [next(row[key] for row in reversed(run.metrics) if key in row) for run in self.runs[variant]]


def logs(a: Sequence[float], b: Sequence[float]) -> Values:
    """log(a / b), place by place."""
    return [math.log(x / y) for x, y in zip(a, b, strict=True)]


def minus(a: Sequence[float], b: Sequence[float]) -> Values:
    """a - b, seed by seed, as far as both have them."""
    return [x - y for x, y in zip(a, b, strict=False)]


def _weighted(figures: Mapping[str, Any], column: str) -> float:
    """A share at the last checkpoint, every weight counting once."""
    step = figures["checkpoints"][-1]["step"]
    rows = [row for row in figures["rows"] if row["step"] == step]
    return sum(row[column] * row["numel"] for row in rows) / sum(row["numel"] for row in rows)


def _course(run: Run, key: str) -> Values:
    """A recorded number over the checkpoints."""
    every = run.resolved["geometry"]["every"]
    rows = [r for r in run.trajectory if r["step"] % every == 0 and "attn" in r["matrix"]]
    steps = sorted({row["step"] for row in rows})
    return [fmean(r[key] for r in rows if r["step"] == step) for step in steps]


def _score(run: Run, share: float) -> float:
    rows = [row for row in run.evals if row["name"] == "sampled"]
    wanted = share * run.resolved["steps"]
    return accuracy(min(rows, key=lambda row: abs(row["step"] - wanted)))["value"]
