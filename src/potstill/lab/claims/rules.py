"""When a claim counts as reproduced, and when a null explains it. Written down before the runs were measured.

Every claim is one or more effects, a number for each seed. An effect's 95 % interval is Student's over the seeds.

    reproduced             each effect's interval lies where the claim says
    explained by the null  it does, but what is random, or another method, shows it as well
    not reproduced         it does not; "(open)" where the interval also holds what the claim says

A null explains an effect if its mean is `EXPLAINS` of the effect's, or if what is left, effect minus null seed by seed,
has an interval that is not above 0. It explains sameness if it is the same by the same rule.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Literal

EQUAL = 1.25
"""Curves and sizes whose ratio stays within this factor, either way, are the same: `flat`, `unchanged`."""
SAME_SCORE = 0.04
"""Scores that differ by less are the same; the paper's 30 questions with 8 answers have a standard error of 4.4 points."""
LOCKED = 0.5
"""A subspace similarity from here on is close: on average the angles are below 45 degrees."""
EXPLAINS = 0.8
"""Share of an effect that the null must show to explain it."""

STUDENT = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""97.5 % quantiles of Student's t with 1, 2, ... degrees of freedom."""

Kind = Literal["above", "same"]
Effect = Sequence[float]
"""A number for each seed."""


@dataclass(frozen=True, slots=True)
class Interval:
    """Mean over seeds with its 95 % interval."""

    mean: float
    low: float
    high: float


def interval(values: Effect) -> Interval:
    """Student's interval of the mean; of one seed it is infinite."""
    mean, n = fmean(values), len(values)
    if n < 2:
        return Interval(mean, -math.inf, math.inf)
    half = (STUDENT[n - 2] if n - 2 < len(STUDENT) else 1.96) * stdev(values) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half)


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """A sentence of the paper, and what stands for it here."""

    name: str
    paper: str
    """The paper's number."""
    kind: Kind
    effects: Sequence[Effect]
    """`above`: each is to lie above `bar`. `same`: each is to lie within plus or minus `bar`."""
    nulls: Sequence[Effect] = ()
    """For each effect what the null gives; none: nothing is known that could explain it."""
    bar: float = 0.0
    ours: str
    """Our numbers in their own units."""
    null: str = ""
    """The null's, and what it is."""


def verdict(claim: Claim) -> str:
    """Reproduced, not reproduced, or explained by the null."""
    found = [interval(e) for e in claim.effects]
    if not all(_holds(claim, i) for i in found):
        open_ = all(i.high > claim.bar if claim.kind == "above" else _may_hold(claim, i) for i in found)
        return "not reproduced (open)" if open_ else "not reproduced"
    explained = bool(claim.nulls) and all(map(lambda e, n: _explains(claim, e, n), claim.effects, claim.nulls))
    return "explained by the null" if explained else "reproduced"


def _holds(claim: Claim, i: Interval) -> bool:
    return i.low > claim.bar if claim.kind == "above" else -claim.bar < i.low and i.high < claim.bar


def _may_hold(claim: Claim, i: Interval) -> bool:
    return i.low < claim.bar and i.high > -claim.bar


def _explains(claim: Claim, effect: Effect, null: Effect) -> bool:
    if claim.kind == "same":
        return _holds(claim, interval(null))
    left = interval([e - n for e, n in zip(effect, null, strict=False)])
    return fmean(null) >= EXPLAINS * fmean(effect) or left.low <= 0
