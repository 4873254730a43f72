"""The trajectory as a run recorded it while it trained ([geometry]): more points than it kept checkpoints.

A recording holds the leading triplets of dW and what they say of its shape, so stable rank, norm, Hill estimates and
similarities need no checkpoint. What needs all of W_t (sparsity, masks, angles, permuted entries) does.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from potstill.geometry.aggregate import aggregate, growth
from potstill.geometry.floors import isotropic_stable_rank
from potstill.geometry.matrices import Name
from potstill.geometry.moments import Moments
from potstill.geometry.rows import Row
from potstill.geometry.trajectory import Bases, follow
from potstill.run import Run
from potstill.seeds import derive

COLUMNS = {
    "fro": "frobenius",
    "rel_fro": "relative",
    "s1": "spectral",
    "srank": "stable_rank",
    "part_ratio": "participation_ratio",
    "e16": "energy_16",
}
"""Of a geometry's rows -> of a recording's."""


def recorded(run: Run, names: Sequence[Name], total: int, moments: Moments | None, seed: int) -> Row | None:
    """`rows`, their `aggregate`, `growth` and `growth_noise`; None without two recorded steps of these matrices.

    Args:
        run: that trained with geometry.every > 0.
        names: matrices to look for; a run may have recorded some of them only.
        total: steps of the whole training.
        moments: of the layers' inputs, for the noise.
        seed: of the nulls.
    """
    kept = {(row["matrix"], row["step"]): row for row in run.trajectory}
    steps = sorted({step for _, step in kept})
    there = [name for name in names if all((name.matrix, step) in kept for step in steps)]
    if len(steps) < 2 or not there:
        return None
    times = noise_times(run, steps)
    rows: list[Row] = []
    for name in there:
        found = [_bases(run, name.matrix, step) for step in steps]
        covariance = moments.of(name.matrix) if moments else None
        key = derive("geometry", name.matrix, "recorded", seed)
        columns = follow(found, [], times, (name.m, name.n), key, covariance).columns
        last = kept[name.matrix, steps[-1]]["frobenius"]
        for step, time, more in zip(steps, times, columns, strict=True):
            row = _row(name, kept[name.matrix, step]) | {"step": step, "progress": step / total}
            rows.append(row | {"fro_noise": last * (time / times[-1]) ** 0.5} | more)
    points = aggregate(rows)
    return {"rows": rows, "aggregate": points, "growth": growth(points), "growth_noise": growth(points, "fro_noise")}


def noise_times(run: Run | None, steps: Sequence[int]) -> list[float]:
    """How far a walk of noise has come at each step: sum over s <= t of (lr_s / max lr)^2, a step counting up to 1.

    A step of noise is as long as its learning rate, so variances add up as squares of it; at a constant rate this is t.
    Without a run's log every step counts the same.
    """
    logged = [(row["step"], row["lr"]) for row in run.metrics if row.get("lr")] if run else []
    largest = max((lr for _, lr in logged), default=0.0)
    times = [sum((lr / largest) ** 2 for step, lr in logged if step <= t) for t in steps]
    increase = all(a < b for a, b in zip([0.0, *times], times, strict=False))
    return times if increase else [float(step) for step in steps]


def _row(name: Name, kept: dict[str, Any]) -> Row:
    row: Row = {"matrix": name.matrix, "layer": name.layer, "module": name.module, "kind": name.kind}
    row |= {new: kept[old] for new, old in COLUMNS.items() if old in kept}
    row |= {f"hill_k{key[5:]}": value for key, value in kept.items() if key.startswith("hill_")}
    return row | {"m": name.m, "n": name.n, "srank_chance": isotropic_stable_rank(name.m, name.n)}


def _bases(run: Run, matrix: str, step: int) -> Bases | None:
    """None where nothing had moved."""
    with np.load(run.path / "geometry" / f"step_{step:06d}.npz") as file:
        if f"{matrix}/v" not in file:
            return None
        found = {side: torch.from_numpy(file[f"{matrix}/{side.lower()}"]).double() for side in "UV"}
        s = file[f"{matrix}/s"]
    rank = int((s > 4 * max(len(v) for v in found.values()) ** 0.5 * np.finfo(np.float32).eps * s[0]).sum())
    return {side: v[:, :rank] for side, v in found.items()}
