"""What the claims leave out: the two other methods, every projected run, and how large the mixed terms are."""

from collections.abc import Sequence
from dataclasses import dataclass

from potstill.lab.claims.evidence import METHODS, Evidence, K, Values, minus
from potstill.lab.claims.paper import apart, factor, number, percent, points
from potstill.lab.claims.rules import interval


@dataclass(frozen=True, slots=True)
class Table:
    """Cells in words; the first column names the rows."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str


def tables(e: Evidence) -> list[Table]:
    """All three."""
    return [methods(e), projections(e), mixing(e)]


def methods(e: Evidence) -> Table:
    """Every number of the five methods, the null in brackets."""

    def beside(values: Values, null: Values, scale: float = 1.0) -> str:
        own, other = interval([scale * x for x in values]), interval([scale * x for x in null])
        return f"{own.mean:.3g} [{own.low:.3g}, {own.high:.3g}] ({other.mean:.3g})"

    def row(label: str, column: str, null: str, *, scale: float = 1.0, group: str = "all", at: int = -1) -> list[str]:
        found = [
            beside(e.column(m, column, group=group, at=at), e.column(m, null, group=group, at=at), scale)
            for m in METHODS
        ]
        return [label, *found]

    rows = [
        ["right answers, %", *[number([100 * x for x in e.score(m)]) for m in METHODS]],
        ["norm of dW / norm of W0", *[number(e.column(m, "rel_fro")) for m in METHODS]],
        ["unchanged in bf16, %", *[beside(*e.sparsity(m), 100.0) for m in METHODS]],
        row("largest angle, left", "angU_max", "angU_max_null"),
        row("largest angle, right", "angV_max", "angV_max_null"),
        row("spectral shift, 1e-3", "nss", "nss_null", scale=1e3),
        row("changes on principal weights, %", "ov_princ", "ov_princ_null", scale=100.0),
        row("changes on small weights, %", "ov_low", "ov_low_null", scale=100.0),
        row("stable rank, 20 %", "srank", "srank_noise", group="attention", at=0),
        row("stable rank, end", "srank", "srank_noise", group="attention"),
        row(f"Sim {K}, right, 20 % and end", f"sim{K}_V", f"sim{K}_V_null", group="attention", at=0),
        row(f"Sim {K}, left, 20 % and end", f"sim{K}_U", f"sim{K}_U_null", group="attention", at=0),
        row("Sim 16, right, 20 % and rest", "later_V", "later_V_null", group="attention", at=0),
    ]
    note = (
        "Means over seeds with 95 % intervals; in brackets the null: the update rotated, a random one of the same density "
        "(changes), noise through the inputs (stable rank, Sim)."
    )
    return Table("The five methods", ["", *METHODS], rows, note)


def projections(e: Evidence) -> Table:
    """Scores within a subspace, and what of the way from its start they kept."""
    rows: list[list[str]] = []
    for method in ("opd", "sft"):
        rows.append([method, percent(e.score(method, 0.2)), percent(e.score(method)), *[""] * 4])
        for basis in ("self", "random", "inputs", "other", "stop"):
            variant = f"{method}-{basis}"
            end, plain, start = e.score(variant), e.score(method), e.score(method, 0.2)
            kept = [(x - z) / (y - z) for x, y, z in zip(end, plain, start, strict=False)]
            inside = percent(e.last(variant, "projection/inside")) if basis != "stop" else ""
            better = points(minus(e.score(f"{method}-self"), end)) if basis != "self" else ""
            rows.append([variant, "", percent(end), points(minus(end, plain)), better, number(kept), inside])
    note = (
        f"Right answers; {K} directions of each matrix's inputs from a fifth of the run on. `other`: SFT's for OPD and the "
        "reverse, of seed 0; `stop`: the matrices stay, all else trains on. Kept: the share of the gain since then. "
        "Inside: the share of the update since then that lies in the subspace; Adam leads out of it."
    )
    return Table(
        "Training within a subspace",
        ["", "at 20 %", "at the end", "against without", "self is better by", "kept", "inside"],
        rows,
        note,
    )


def mixing(e: Evidence) -> Table:
    """The two terms of the mix, by alpha."""
    rows: list[list[str]] = []
    for variant in ("mix-75", "mix-50", "mix-25", "mix-05", "mix-01"):
        teacher, verifier = e.logged(variant, "term/teacher_rms"), e.logged(variant, "term/verifier_rms")
        rows.append(
            [
                f"0.{variant[-2:]}",
                number(teacher),
                number(verifier),
                number(e.logged(variant, "term/cosine")),
                factor(e.distance(variant, "opd")),
                factor(e.distance(variant, "grpo")),
                percent(e.score(variant)),
            ]
        )
    columns = ["alpha", "RMS teacher", "RMS verifier", "cosine", "from opd", "from grpo", "right answers"]
    note = (
        "RMS of alpha d and of (1 - alpha) A over tokens, cosine of their gradients, distance of the stable-rank curves to "
        f"those of the ends (opd and grpo are {apart(e.distance('grpo', 'opd'))})."
    )
    return Table("Objectives mixed", columns, rows, note)
