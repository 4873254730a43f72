"""`potstill lab claims`: the claims of "On the Geometry of On-Policy Distillation" (arXiv:2606.07082), tried in the lab.

    runs/compare-lab-geometry             five methods from one start
    runs/compare-lab-geometry-controls    fewer tokens, the teacher's answers, objectives mixed
    runs/compare-lab-geometry-projected   gradients in a subspace
    OUT/claims.csv .md .html              a row for each claim: paper, ours, null, verdict (`rules`)
    OUT/geometry/METHOD-seed-N            what `potstill geometry` says of each run of the five

Runs that are there already are not repeated. Torch is needed only for those that are not.
"""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from potstill.comparison import compare
from potstill.lab.claims.evidence import METHODS, Evidence
from potstill.lab.claims.paper import claims as claims_of
from potstill.lab.claims.rules import Claim, interval, verdict
from potstill.lab.claims.tables import Table, tables
from potstill.recipes import tables as recipe_tables
from potstill.run import Run, write_whole

RECIPES = ("lab-geometry", "lab-geometry-controls", "lab-geometry-projected")
"""In the order in which they need each other."""
ANGLES, RANK, NULLS = 12, 2, 4
"""Of 96, as the paper's 512 directions and rank 64 of 4096; draws of each null."""


@dataclass(frozen=True, slots=True)
class Result:
    """What came out."""

    claims: list[Claim]
    tables: list[Table]
    folder: Path

    @property
    def rows(self) -> list[dict[str, str]]:
        """As claims.csv has them."""
        return [
            {"claim": c.name, "paper": c.paper, "ours": c.ours, "null": c.null, "verdict": verdict(c)}
            for c in self.claims
        ]


def claims(
    seeds: Sequence[int] = range(5),
    control_seeds: Sequence[int] = range(3),
    *,
    out: str | Path = "runs/lab-claims",
    jobs: int | None = None,
    console: Console | None = None,
) -> Result:
    """Run what is missing, measure it, and judge.

    Args:
        seeds: Of the five methods.
        control_seeds: Of the controls and projected runs; the first of `seeds`.
        out: Folder of the tables and geometries.
        jobs: Runs at a time; None: one for each core.
        console: Shows where the runs are.

    Raises:
        ConfigError, TrainingError, Interrupted: as `comparison.compare`.
    """
    folder, root = Path(out), Path("runs")
    (folder / "geometry").mkdir(parents=True, exist_ok=True)
    runs: dict[str, list[Run]] = {}
    for recipe, asked in zip(RECIPES, (seeds, control_seeds, control_seeds), strict=True):
        compare(recipe, seeds=asked, jobs=jobs, console=console)
        for variant in recipe_tables(recipe)[1]:
            runs[variant] = [Run(root / f"compare-{recipe}" / variant / f"seed-{seed}") for seed in asked]
    measured = {
        method: [_measured(run, folder / "geometry" / f"{method}-{run.path.name}") for run in runs[method]]
        for method in METHODS
    }
    evidence = Evidence(runs, measured)
    done = Result(claims_of(evidence), tables(evidence), folder)
    _write(done)
    return done


def _measured(run: Run, folder: Path) -> dict[str, Any]:
    """What `potstill geometry` says of a run, measured unless it was."""
    if not (folder / "geometry.json").is_file():
        from potstill.geometry import measure

        measure(run.path, out=folder, k=ANGLES, rank=RANK, nulls=NULLS)
    figures: dict[str, Any] = json.loads((folder / "geometry.json").read_text(encoding="utf-8"))
    return figures


def _write(done: Result) -> None:
    from potstill.report import claims as page

    text = io.StringIO()
    table = csv.DictWriter(text, ["claim", "paper", "ours", "null", "verdict", "effect", "low", "high"])
    table.writeheader()
    for claim, row in zip(done.claims, done.rows, strict=True):
        for effect in claim.effects:
            i = interval(effect)
            table.writerow(row | {"effect": i.mean, "low": i.low, "high": i.high})
    write_whole(done.folder / "claims.csv", text.getvalue())
    write_whole(done.folder / "claims.md", markdown(done))
    page.write(done.folder / "claims.html", done.rows, done.tables)


def markdown(done: Result) -> str:
    """All tables, for a document."""
    parts = [_markdown(list(done.rows[0]), [list(row.values()) for row in done.rows])]
    parts += [f"{t.title}\n\n{_markdown(t.columns, t.rows)}\n{t.note}\n" for t in done.tables]
    return "\n".join(parts)


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
