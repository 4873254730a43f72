"""What the geometry of a run needs, kept while it trains: no dense checkpoint is stored.

geometry/step_000020.npz     MATRIX/u [m, K], MATRIX/s [K], MATRIX/v [n, K]: leading singular triplets of W_t - W_0
geometry/trajectory.jsonl    one row for each matrix and step: norm, stable rank, energy, Hill estimates, gaps
"""

import math
import time
from typing import Any

import numpy as np
import torch

from potstill.config import Geometry
from potstill.geometry.update import summarise_update
from potstill.learners.subspace import linear_weights
from potstill.run import Run

Row = dict[str, Any]
Arrays = dict[str, np.ndarray]


class Recorder:
    """Holds the initial weights of the matrices it watches: one more copy of them."""

    def __init__(self, config: Geometry, model: Any):
        self.config = config
        self.layers = linear_weights(model, config.matrices)
        self.start = {n: m.weight.detach().clone() for n, m in self.layers.items()}
        self.spent = self.longest = 0.0
        """CPU seconds: of all recordings, and of the longest."""

    def keep(self, run: Run, step: int, *, last: bool, cpu_s: float) -> Row:
        """Record into the run if it is time and not too dear; what to add to the step's metrics."""
        due = last or step == 1 or step % self.config.every == 0
        dear = self.spent + self.longest > self.config.most * cpu_s and not (last or step == 1)
        if not due or dear:
            return {}
        began = time.process_time()
        rows, arrays = self.record(step)
        run.keep_geometry(step, rows, arrays)
        took = time.process_time() - began
        self.spent, self.longest = self.spent + took, max(self.longest, took)
        return {"time/geometry": round(took, 4)}

    @torch.no_grad()
    def record(self, step: int) -> tuple[list[Row], Arrays]:
        """Rows and arrays of a step; a matrix that has not moved has a row and no vectors."""
        rows: list[Row] = []
        arrays: Arrays = {}
        for name, layer in self.layers.items():
            moved = layer.weight.detach() - self.start[name]
            row: Row = {"step": step, "matrix": name, "m": moved.shape[0], "n": moved.shape[1]}
            if not moved.any():
                rows.append(row | {"frobenius": 0.0})
                continue
            k = min(self.config.k, *moved.shape)
            seen = summarise_update(moved, sorted({min(n, k) for n in (4, 8, 16, 32, 64)} | {k}))
            whole = {
                "frobenius": seen.frobenius,
                "relative": seen.frobenius / self.start[name].double().norm().item(),
                "spectral": seen.spectral,
                "stable_rank": seen.stable_rank,
                "participation_ratio": seen.participation_ratio,
            }
            by_k = {"energy": seen.energy, "hill": seen.hill, "gap": seen.gap_ratio}
            row |= whole | {f"{what}_{n}": v for what, values in by_k.items() for n, v in values.items()}
            rows.append({key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in row.items()})
            for part in ("u", "s", "v"):
                arrays[f"{name}/{part}"] = getattr(seen.top, part)[..., :k].float().cpu().numpy()
        return rows, arrays
