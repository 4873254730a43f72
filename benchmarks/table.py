"""Measurements -> rows with medians, spreads and verdicts."""

from dataclasses import dataclass
from statistics import median
from typing import Any

from benchmarks.case import NAMES, UNITS, Case, Goal
from benchmarks.running import Found

CAUTIONS = (
    "One thread on a CPU; CPU seconds of the process, all of its threads together. Nothing here is about GPUs, where TRL "
    "uses kernels of its own and skips padding.",
    "Medians of fresh processes, ours and the peer in turn; in brackets the smallest and the largest. A ratio is that of the "
    "medians; its brackets hold the ratios of single pairs.",
    "Both sides do the same work: the peer's `generate` is made to write the tokens that ours wrote, and the time this "
    "takes is not counted. Losses and gradients, for rollouts log-probs, were compared in every repeat.",
    "Random weights measure speed, memory and equality, not quality.",
    "Our steps also compute the overlap and entropy numbers of docs/metrics.md, and our sampler the log-prob and entropy of "
    "every token; TRL's steps compute an entropy.",
    "Peak memory is that of the whole process, imported libraries included.",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Numbers of several repeats."""

    values: tuple[float, ...]

    @property
    def middle(self) -> float:
        """The median."""
        return median(self.values)

    def text(self, digits: int = 3) -> str:
        """Median, smallest and largest."""
        low, high = min(self.values), max(self.values)
        return f"{_round(self.middle, digits)} [{_round(low, digits)}, {_round(high, digits)}]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A line of the table."""

    case: Case
    goal: Goal
    ours: Spread
    theirs: Spread | None
    ratio: Spread | None

    @property
    def reached(self) -> str:
        """Whether the goal was."""
        if self.goal.limit is not None:
            return _verdict([v <= self.goal.limit for v in self.ours.values], self.ours.middle <= self.goal.limit)
        if self.goal.at_least is None or self.ratio is None or self.theirs is None:
            return ""
        least = self.goal.at_least
        return _verdict([v >= least for v in self.ratio.values], self.theirs.middle / self.ours.middle >= least)

    def cells(self) -> list[str]:
        """What is printed."""
        what, unit = UNITS[self.goal.measure]
        ratio = ""
        if self.ratio and self.theirs:
            low, high = min(self.ratio.values), max(self.ratio.values)
            ratio = f"{self.theirs.middle / self.ours.middle:.2f} [{low:.2f}, {high:.2f}]"
        goal = "" if self.goal.at_least is None else f"{self.goal.at_least:g} x"
        goal = goal if self.goal.limit is None else f"<= {self.goal.limit:g} {unit}"
        note = f" ({self.goal.note})" if self.goal.note else ""
        return [
            f"{self.case.title}: {what}{note}",
            NAMES[self.goal.peer] if self.goal.peer else "",
            f"{self.ours.text()} {unit}",
            f"{self.theirs.text()} {unit}" if self.theirs else "",
            ratio,
            goal,
            self.reached,
        ]


HEAD = ("what", "peer", "potstill", "peer's", "ratio", "at least", "reached")


def rows(case: Case, found: Found) -> list[Row]:
    """One for each goal whose sides were measured."""
    out: list[Row] = []
    for goal in case.goals:
        ours = _spread(found["ours"], goal.measure)
        if goal.peer is None:
            out.append(Row(case=case, goal=goal, ours=ours, theirs=None, ratio=None))
        elif goal.peer in found:
            theirs = _spread(found[goal.peer], goal.measure)
            pairs = tuple(t / max(o, 1e-9) for o, t in zip(ours.values, theirs.values, strict=True))
            out.append(Row(case=case, goal=goal, ours=ours, theirs=theirs, ratio=Spread(values=pairs)))
    return out


def _spread(repeats: list[dict[str, Any]], measure: str) -> Spread:
    return Spread(values=tuple(float({**r["value"], **r}[measure]) for r in repeats))


def _verdict(each: list[bool], middle: bool) -> str:
    if all(each):
        return "yes"
    return "yes, not in every repeat" if middle else "no"


def _round(value: float, digits: int) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.{digits}g}"


def markdown(found: list[Row], machine: str, repeats: int) -> str:
    """The table, with its cautions."""
    lines = [f"{machine}; {repeats} repeats.", "", "| " + " | ".join(HEAD) + " |", "|---|---|---:|---:|---:|---:|---|"]
    lines += ["| " + " | ".join(row.cells()) + " |" for row in found]
    return "\n".join([*lines, "", *(f"- {caution}" for caution in CAUTIONS)]) + "\n"
