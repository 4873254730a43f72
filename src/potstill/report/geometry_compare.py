"""Methods side by side, from finished geometries: at equal progress, and at equal size of the update.

Reads geometry.json and vectors.npz. Nothing is interpolated: each number is of a checkpoint, which is named. Needs no
torch.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from potstill.errors import CheckpointError, ConfigError
from potstill.report import _environment, _script, geometry_scores
from potstill.report.charts import Chart, Point, Series, line_chart
from potstill.report.geometry_numbers import GROUPS, NUMBERS, Figures, Number
from potstill.run import write_whole

NEAR = 1.25
"""Norms within this factor of each other count as equal."""
SHARES = (0.25, 0.5, 0.75, 1.0)
"""Of the training, at which methods are compared."""
COLOURS = 6
LATE = [number for number in NUMBERS if not number.early]
SIMILAR = [number for number in NUMBERS if number.early]


def read(folders: Sequence[Path]) -> dict[str, Figures]:
    """Label -> figures, in the order given.

    Raises:
        ConfigError: fewer than two folders, or two of one name.
        CheckpointError: a folder without a geometry.
    """
    if len(folders) < 2:
        raise ConfigError(
            "one geometry has nothing to be compared with. Give two or more folders of `potstill geometry`"
        )
    found: dict[str, Figures] = {}
    for folder in folders:
        file = folder / "geometry.json"
        if not file.is_file():
            raise CheckpointError(
                f"{folder} has no geometry.json. Give folders that `potstill geometry ... --out FOLDER` has written"
            )
        label = folder.resolve().name
        if label in found:
            raise ConfigError(f"two geometries are called {label!r}, so nobody could tell them apart. Rename a folder")
        try:
            found[label] = json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            raise CheckpointError(f"{file} is no JSON: it was cut short. Measure {label} again") from None
    return found


def compare(folders: Sequence[Path]) -> dict[str, Any]:
    """Everything that the table and the page show, of the group of matrices that all geometries have.

    Raises:
        ConfigError: geometries of different matrices, or as `read`.
        CheckpointError: as `read`.
    """
    found = read(folders)
    group = next((g for g in GROUPS if all(g in f["aggregate"] for f in found.values())), None)
    own = {label: {r["matrix"] for r in f["rows"] if group in ("all", r["kind"])} for label, f in found.items()}
    shared = set.intersection(*own.values())
    if group is None or any(matrices != shared for matrices in own.values()):
        raise ConfigError(
            f"these geometries share {len(shared)} matrices and differ in others "
            f"({', '.join(f'{label} has {len(names - shared)} more' for label, names in own.items())}), so their means are "
            "not of the same things. Compare runs of one model, all of whose matrices could be measured"
        )
    points = {label: f["aggregate"][group] for label, f in found.items()}
    norms = {label: _norm(row[-1]) for label, row in points.items()}
    target = min(norms.values())
    at_norm = {label: nearest(row, [abs(math.log(_norm(p) / target)) for p in row]) for label, row in points.items()}
    return {
        "group": group,
        "labels": list(found),
        "starts": list(dict.fromkeys(f["w0"] for f in found.values())),
        "matrices": len(shared),
        "progress": {
            share: {label: nearest(row, [abs(p["progress"] - share) for p in row]) for label, row in points.items()}
            for share in SHARES
        },
        "norm": target,
        "at_norm": at_norm,
        "far": {
            label: _norm(p) / target
            for label, p in at_norm.items()
            if abs(math.log(_norm(p) / target)) > math.log(NEAR)
        },
        "first": {label: row[0] for label, row in points.items()},
        "points": points,
        "recorded": {
            label: (f.get("recorded") or {"aggregate": {}})["aggregate"].get(group, []) for label, f in found.items()
        },
        "growth": {label: (f["growth"][group], f.get("growth_noise", {}).get(group)) for label, f in found.items()},
        "training": {label: {"training": f.get("training")} for label, f in found.items()},
        "between": between(dict(zip(found, folders, strict=True)), found, group),
    }


def _norm(point: Mapping[str, Any]) -> float:
    return point["columns"]["fro"]["mean"] or 1e-300


def nearest(points: Sequence[Any], distances: Sequence[float]) -> Any:
    """The checkpoint with the least distance; of two, the earlier."""
    return points[distances.index(min(distances))]


def between(folders: Mapping[str, Path], found: Mapping[str, Figures], group: str) -> dict[str, Any] | None:
    """Mean Sim of the last updates of every two runs, right side, and its value by chance; None without vectors."""
    if not all((folder / "vectors.npz").is_file() for folder in folders.values()):
        return None
    any_rows = next(iter(found.values()))["rows"]
    wanted = sorted({row["matrix"] for row in any_rows if group == "all" or row["kind"] == group})
    last = {label: f["checkpoints"][-1]["step"] for label, f in found.items()}
    kept: dict[str, dict[str, Any]] = {}
    for label, folder in folders.items():
        with np.load(folder / "vectors.npz") as file:
            names = {m: f"{m}/{last[label]}" for m in wanted}
            kept[label] = {m: file[name].astype(np.float64) for m, name in names.items() if name in file.files}
    both = [m for m in wanted if all(m in vectors for vectors in kept.values())]
    if not both:
        return None
    matrix = [[float(np.mean([_similarity(a[m], b[m]) for m in both])) for b in kept.values()] for a in kept.values()]
    one = next(iter(kept.values()))
    return {
        "masks": masks(folders, both),
        "similarity": matrix,
        "chance": float(np.mean([one[m].shape[1] / one[m].shape[0] for m in both])),
    }


def masks(folders: Mapping[str, Path], matrices: Sequence[str]) -> dict[str, Any] | None:
    """Mean Jaccard overlap of the weights that every two runs changed, that of random updates, and by chance.

    |A and B| / |A or B| of the last updates' masks in bf16; `random`: of updates on W0 that change as many weights each;
    `chance`: p q / (p + q - p q), for masks that know nothing of W0. None without masks.npz.
    """
    if not all((folder / "masks.npz").is_file() for folder in folders.values()):
        return None
    files = [np.load(folder / "masks.npz") for folder in folders.values()]
    out: dict[str, Any] = {"jaccard": [], "random": [], "chance": []}
    for a in files:
        rows = [_agreement(a, b, matrices) for b in files]
        for name, value in zip(out, zip(*rows, strict=True), strict=True):
            out[name].append(list(value))
    for file in files:
        file.close()
    return out


def _agreement(a: Any, b: Any, matrices: Sequence[str]) -> tuple[float, float, float]:
    """Means over the matrices in which anything changed."""
    own, random, chance = [], [], []
    for matrix in matrices:
        left, right, both, either = _counts(a[f"{matrix}/changed"], b[f"{matrix}/changed"])
        size = 8 * len(a[f"{matrix}/changed"])
        p, q = left / size, right / size
        if not either:
            continue
        own.append(both / either)
        chance.append(p * q / (p + q - p * q))
        _, _, both, either = _counts(a[f"{matrix}/random"], b[f"{matrix}/random"])
        random.append(both / either)
    return float(np.mean(own)), float(np.mean(random)), float(np.mean(chance))


def _counts(a: Any, b: Any) -> tuple[int, int, int, int]:
    """Bits in a, in b, in both and in either."""
    left, right, both = (int(np.unpackbits(x).sum()) for x in (a, b, a & b))
    return left, right, both, left + right - both


def _similarity(a: Any, b: Any) -> float:
    k = min(a.shape[1], b.shape[1])
    return float(np.linalg.norm(a[:, :k].T @ b[:, :k]) ** 2 / k)


def told(point: Mapping[str, Any], number: Number) -> str:
    """A number of a checkpoint with its first null: `5.6 (24.9)`; empty where there is none."""
    columns = point["columns"]
    if number.column not in columns:
        return ""
    null = next((columns[name]["mean"] for name, _ in number.beside if name in columns), None)
    own = number.show(columns[number.column]["mean"])
    return own if null is None else f"{own} ({number.show(null)})"


def tables(compared: Mapping[str, Any]) -> list[Table]:
    """For a terminal: at the end, and at equal norm."""
    ends = {label: row[-1] for label, row in compared["points"].items()}
    wide = "in brackets: the null of each number (docs/geometry.md)"
    return [
        _table("at the end", ends, LATE, ""),
        _table(f"at equal norm, {compared['norm']:.3g}: nearest checkpoints", compared["at_norm"], LATE, far(compared)),
        _table("first checkpoint", compared["first"], SIMILAR, wide),
    ]


def far(compared: Mapping[str, Any]) -> str:
    """A sentence on the runs that have no checkpoint near the norm; empty where all have."""
    told = [f"{label} has no checkpoint near it: {factor:.2g} times" for label, factor in compared["far"].items()]
    return "; ".join(told)


def _table(title: str, points: Mapping[str, Any], numbers: Sequence[Number], caption: str) -> Table:
    shown = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0), caption=caption)
    shown.add_column("", no_wrap=True)
    for label, point in points.items():
        shown.add_column(f"{escape(label)}\nstep {point['step']}", justify="right")
    for number in numbers:
        cells = [told(point, number) for point in points.values()]
        if any(cells):
            shown.add_row(number.label, *cells)
    return shown


def render(compared: Mapping[str, Any]) -> str:
    """The page as HTML: one file, no network."""
    environment = _environment()
    script, script_hash = _script(environment)
    marks = {label: (i, i >= COLOURS) for i, label in enumerate(compared["labels"])}
    return environment.get_template("geometry_compare.html").render(
        compared=compared,
        group=GROUPS[compared["group"]],
        marks=marks,
        numbers=LATE,
        similar=SIMILAR,
        far=far(compared),
        told=told,
        charts=_charts(compared["points"], compared["recorded"], marks),
        score_charts=geometry_scores.charts(compared["training"], marks),
        projected=geometry_scores.projected(compared["training"]),
        script=script,
        script_hash=script_hash,
    )


def write(path: Path, compared: Mapping[str, Any]) -> None:
    """Write the page (see `render`) to `path`, whole or not at all. Raises TrainingError when the disk is full."""
    write_whole(path, render(compared))


def _charts(
    points: Mapping[str, Any], recorded: Mapping[str, Any], marks: Mapping[str, tuple[int, bool]]
) -> list[Chart]:
    """Each number at the checkpoints, or where it was recorded, if that is oftener."""

    def chart(title: str, column: str, *, against_norm: bool = False, early: bool = False) -> Chart | None:
        series: list[Series] = []
        for label, row in points.items():
            kept, more = ([p for p in among if column in p["columns"]] for among in (row, recorded[label]))
            known = max(kept[:-1] if early else kept, more, key=len)
            drawn = [
                Point(_norm(p) if against_norm else 100 * p["progress"], p["columns"][column]["mean"]) for p in known
            ]
            series.append(Series(label, *_swap(marks[label], drawn)))
        return line_chart(title, series, x_label="norm of dW" if against_norm else "% of training", dots=True)

    found = [
        chart("Norm of dW", "fro"),
        chart("Stable rank", "srank"),
        chart("Stable rank at equal norm", "srank", against_norm=True),
        chart("Hill estimate, k = 16", "hill_k16"),
        chart("Spectral shift at equal norm", "nss", against_norm=True),
        chart("dW with the last dW, right", "sim_V"),
        chart("dW with the last dW, left", "sim_U"),
        chart("dW with what comes after, right", "later_V", early=True),
    ]
    return [one for one in found if one]


def _swap(mark: tuple[int, bool], points: list[Point]) -> tuple[int, list[Point], bool]:
    return mark[0], points, mark[1]
