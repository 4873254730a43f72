"""The files of a measurement, and what has to be said beside its numbers."""

import csv
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from potstill.geometry.floors import weight_decay_floor
from potstill.geometry.inputs import Inputs
from potstill.geometry.rows import Row, Settings
from potstill.progress import accuracy


def decay_floors(inputs: Inputs) -> dict[int, float]:
    """Checkpoint -> spectral shift by weight decay alone; empty without a run's log, or with an adapter, where W0 stays."""
    run = inputs.run
    if run is None or run.resolved["student"].get("lora"):
        return {}
    learner, logged = run.resolved["learner"], run.metrics
    return {
        p.step: weight_decay_floor(
            [row["lr"] for row in logged if row["step"] <= p.step for _ in range(learner["updates"])],
            learner["weight_decay"],
        )
        for p in inputs.checkpoints
    }


def training(inputs: Inputs) -> Row | None:
    """Of a run: its method, its projection, and its scores over time; None for folders."""
    run = inputs.run
    if run is None:
        return None
    scores = [
        {"step": row["step"], "progress": row["step"] / inputs.total} | accuracy(row)
        for row in run.evals
        if row["name"] == "sampled"
    ]
    resolved = run.resolved
    return {"method": resolved["method"], "projection": resolved.get("projection"), "scores": scores}


def warnings(rows: Sequence[Row], inputs: Inputs, settings: Settings, failed: Mapping[str, str]) -> list[str]:
    """What a reader must know before any number."""
    out: list[str] = []
    coarse = [row for row in rows if row.get("warning")]
    if coarse:
        first = min(coarse, key=lambda row: row["storage_ratio"])
        out.append(
            f"bf16 files are too coarse for {len(coarse)} of {len(rows)} updates (worst: {first['matrix']} at step "
            f"{first['step']}): {first['warning']}"
        )
    still = sum(row["fro"] == 0 for row in rows)
    if still:
        out.append(
            f"{still} of {len(rows)} updates are exactly zero: those matrices did not move, and only count in sparsity"
        )
    small = [row["k"] for row in rows if row.get("k", settings.k) < settings.k]
    if small:
        out.append(
            f"k = {settings.k} was cut to half of the smaller side of {len({r['matrix'] for r in rows if r.get('k') in small})} "
            f"matrices ({min(small)} .. {max(small)}): of larger subspaces a part cannot turn"
        )
    if inputs.clock == "order" and len(inputs.checkpoints) > 1:
        out.append(
            "the folders do not say their steps, so checkpoints count as 1, 2, ...: growth and noise take them as even"
        )
    if failed:
        out.append(f"{len(failed)} matrices could not be measured: {', '.join(failed)}")
    return out


def write(folder: Path, figures: Row) -> None:
    """geometry.json, geometry.csv and the page, from figures without nan."""
    from potstill.report import geometry as page

    (folder / "geometry.json").write_text(json.dumps(figures, allow_nan=False) + "\n", encoding="utf-8")
    columns = list(dict.fromkeys(name for row in figures["rows"] for name in row))
    with (folder / "geometry.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, columns, restval="")
        table.writeheader()
        table.writerows(figures["rows"])
    page.write(folder / "geometry.html", figures)


def clean(value: Any) -> Any:
    """The same with None for nan and infinity, and lists for tuples: what JSON can hold."""
    if isinstance(value, dict):
        return {key: clean(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [clean(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
