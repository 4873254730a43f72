"""What the numbers of a geometry are called, what stands beside each, and how both are printed."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from potstill.report.numbers import percent, short

Figures = Mapping[str, Any]
GROUPS = {"attention": "attention", "all": "all linears"}


@dataclass(frozen=True, slots=True)
class Number:
    """One number of the summary."""

    label: str
    column: str
    """In geometry.csv."""
    percent: bool = False
    beside: tuple[tuple[str, str], ...] = ()
    """(column, what it is), the most telling first."""
    early: bool = False
    """Of the first checkpoint, compared with the last one."""

    def show(self, value: float) -> str:
        """In words."""
        if self.percent and 0 < value < 1e-3:  # one digit behind the point would say none
            return f"{100 * value:.2g}\N{NO-BREAK SPACE}%"
        return percent(value) if self.percent else short(value)

    def spread(self, mean: float, sd: float) -> str:
        """0.31 ± 0.02, or 97.5 ± 0.6 %."""
        if self.percent:
            return f"{100 * mean:.1f} ± {100 * sd:.1f}\N{NO-BREAK SPACE}%"
        return f"{short(mean)} ± {short(float(f'{sd:.2g}'))}"


PERMUTED, ROTATED, MATCHED = "entries permuted", "update rotated", "random, same density"
NOISE, CHANCE = "noise through the inputs", "chance"


def _overlap(label: str, name: str) -> Number:
    beside = ((f"{name}_null", MATCHED), (f"{name}_perm", PERMUTED), (f"{name}_chance", CHANCE))
    return Number(label, name, True, beside)


def _similar(label: str, name: str) -> Number:
    return Number(label, name, beside=((f"{name}_null", NOISE), (f"sim_{name[-1]}_chance", CHANCE)), early=True)


NUMBERS = (
    Number("changed in bf16", "density", True, (("density_null", ROTATED),)),
    Number("norm of dW", "fro"),
    Number("  relative to W0", "rel_fro"),
    Number(
        "stable rank of dW",
        "srank",
        False,
        (("srank_null", PERMUTED), ("srank_noise", NOISE), ("srank_chance", "Gaussian")),
    ),
    Number("Hill, k = 16", "hill_k16", False, (("hill_k16_null", PERMUTED),)),
    Number("energy of the top 16", "e16", True, (("e16_null", PERMUTED),)),
    Number("participation ratio", "part_ratio", False, (("part_ratio_null", PERMUTED),)),
    Number(
        "spectral shift",
        "nss",
        False,
        (("nss_null", ROTATED), ("nss_chance", "Gaussian"), ("wd_floor", "weight decay")),
    ),
    Number("  without its scale", "nss_shape", False, (("nss_shape_null", ROTATED),)),
    Number("angle, left, median", "angU_med", False, (("angU_med_null", ROTATED),)),
    Number("angle, left, largest", "angU_max", False, (("angU_max_null", ROTATED),)),
    Number("angle, right, median", "angV_med", False, (("angV_med_null", ROTATED),)),
    Number("angle, right, largest", "angV_max", False, (("angV_max_null", ROTATED),)),
    _overlap("on principal weights", "ov_princ"),
    _overlap("on small weights", "ov_low"),
    Number("energy, W0's subspace", "proj", True, (("proj_chance", CHANCE),)),
    _similar("first dW ~ last, right", "sim_V"),
    _similar("first dW ~ last, left", "sim_U"),
    _similar("first dW ~ rest, right", "later_V"),
    _similar("first dW ~ rest, left", "later_U"),
)


@dataclass(frozen=True, slots=True)
class Cell:
    """A number in one group of matrices, in words."""

    own: str
    """Mean and standard deviation."""
    beside: list[tuple[str, str]]
    """(what it is, its mean)."""


def cell(figures: Figures, group: str, number: Number) -> Cell | None:
    """The number at the last checkpoint, or at the first one for a comparison with the last; None where there is none."""
    point = figures["aggregate"][group][0 if number.early else -1]
    columns = point["columns"]
    if number.column not in columns or (number.early and len(figures["aggregate"][group]) < 2):
        return None
    own = columns[number.column]
    beside = [(what, number.show(columns[name]["mean"])) for name, what in number.beside if name in columns]
    return Cell(number.spread(own["mean"], own["sd"]), [(_noise(figures, w), v) for w, v in beside])


def _noise(figures: Figures, what: str) -> str:
    return "noise, white inputs" if what == NOISE and not figures["inputs"] else what


def table(figures: Figures) -> Table:
    """The summary for a terminal of 80 columns: means over matrices, each beside the most telling of its nulls."""
    points = next(iter(figures["aggregate"].values()))
    title = f"{figures['run']}: step {points[-1]['step']}, {figures['matrices']} matrices"
    shown = Table(title=escape(title), box=SIMPLE_HEAD, padding=(0, 1, 0, 0), caption=CAPTION)
    shown.add_column("", no_wrap=True)
    for group in figures["aggregate"]:
        shown.add_column(GROUPS[group], justify="right", no_wrap=True)
        shown.add_column("null", justify="right", no_wrap=True, style="dim")
    for number in NUMBERS:
        found = [cell(figures, group, number) for group in figures["aggregate"]]
        if any(found):
            cells = [(c.own, c.beside[0][1] if c.beside else "") if c else ("", "") for c in found]
            shown.add_row(number.label, *[text for pair in cells for text in pair])
    return shown


CAPTION = (
    "means ± standard deviation over matrices; angles in degrees; null: a random update that shares what the number must "
    "not depend on (docs/geometry.md)"
)
