"""From rows to what is printed: plain means over matrices, as the paper's, and their spread.

Every matrix counts the same, large or small; only the sparsity is also given over all weights together.
"""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from potstill.geometry.rows import Row
from potstill.geometry.update import growth_exponent

NOT_MEASURED = {
    "run",
    "step",
    "progress",
    "matrix",
    "layer",
    "module",
    "kind",
    "m",
    "n",
    "stored_w0",
    "stored",
    "warning",
}


def groups(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """`attention` (the paper's) and `all` linear matrices, each if there are any and they differ."""
    attention = [row for row in rows if row["kind"] == "attention"]
    found = {"attention": attention} if attention else {}
    return found if len(attention) == len(rows) else found | {"all": list(rows)}


def aggregate(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Group -> for each checkpoint step, progress and {column: mean, sd, min, max, n} over the group's matrices."""
    steps = sorted({row["step"] for row in rows})
    return {
        name: [_point([row for row in of if row["step"] == step]) for step in steps]
        for name, of in groups(rows).items()
    }


def _point(rows: Sequence[Row]) -> Row:
    names = dict.fromkeys(name for row in rows for name in row if name not in NOT_MEASURED)
    found = {name: spread([row.get(name) for row in rows]) for name in names}
    return {
        "step": rows[0]["step"],
        "progress": rows[0]["progress"],
        "matrices": len(rows),
        "still": sum(row["fro"] == 0 for row in rows),
        "sparsity": weighted_sparsity(rows) if "changed" in rows[0] else None,
        "columns": {name: value for name, value in found.items() if value},
    }


def spread(values: Sequence[Any]) -> dict[str, float] | None:
    """Mean, standard deviation (n - 1), range and number of the finite values; None where there are none."""
    known = [v for v in values if isinstance(v, int | float) and math.isfinite(v)]
    if not known:
        return None
    sd = stdev(known) if len(known) > 1 else 0.0
    return {"mean": fmean(known), "sd": sd, "min": min(known), "max": max(known), "n": len(known)}


def weighted_sparsity(rows: Sequence[Row]) -> float:
    """Unchanged weights over all weights: what the paper's table 1 prints."""
    return 1 - sum(row["changed"] for row in rows) / sum(row["numel"] for row in rows)


def by_module(rows: Sequence[Row]) -> dict[str, Row]:
    """Module -> sparsity, that of its null, and the number of matrices, in one checkpoint."""
    out: dict[str, Row] = {}
    for module in dict.fromkeys(row["module"] for row in rows):
        own = [row for row in rows if row["module"] == module]
        null = spread([row.get("density_null") for row in own])
        out[module] = {
            "matrices": len(own),
            "sparsity": weighted_sparsity(own),
            "sparsity_null": 1 - null["mean"] if null else None,
        }
    return out


def growth(points: Mapping[str, Sequence[Row]], column: str = "fro") -> dict[str, float | None]:
    """Group -> slope of log mean ||dW_t||_F over log t; None for fewer than two checkpoints that moved."""
    out: dict[str, float | None] = {}
    for name, row in points.items():
        moved = [p for p in row if p["columns"].get(column, {"mean": 0})["mean"] > 0]
        norms = [p["columns"][column]["mean"] for p in moved]
        out[name] = growth_exponent([p["step"] for p in moved], norms) if len(moved) > 1 else None
    return out
