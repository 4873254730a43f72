"""The page of a geometry: the figures of arXiv:2606.07082 for one row of checkpoints, nulls drawn in.

Reads what geometry.json holds. Needs no torch.
"""

import struct
import zlib
from base64 import b64encode
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from potstill.report import _environment, _script, geometry_scores, numbers
from potstill.report.charts import Chart, Point, Series, line_chart
from potstill.report.geometry_numbers import GROUPS, NUMBERS, Figures, cell
from potstill.run import write_whole

OWN, OTHER, THIRD, NULL = 0, 1, 2, 5
"""Colours of the page: the update, its other side, a third line; what is random is grey-blue and dashed."""


@dataclass(frozen=True, slots=True)
class Curve:
    """A line over the checkpoints."""

    column: str
    name: str
    colour: int
    dashed: bool = False


def render(figures: Figures) -> str:
    """The page as HTML: one file, no network."""
    environment = _environment()
    script, script_hash = _script(environment)
    group = next(iter(figures["aggregate"]))
    return environment.get_template("geometry.html").render(
        figures=figures,
        group=GROUPS[group],
        points=figures["aggregate"][group],
        summary=[(n, [cell(figures, g, n) for g in figures["aggregate"]]) for n in NUMBERS],
        groups=[GROUPS[g] for g in figures["aggregate"]],
        weights_moved={GROUPS[g]: p[-1]["sparsity"] for g, p in figures["aggregate"].items()},
        one=_one_matrix(figures),
        every=_every_matrix(figures),
        maps=_maps(figures),
        shape=_shape(figures, group),
        locking=_locking(figures, group),
        overlaps=_overlaps(figures, group),
        similar={side: figures["similarity"][group][s].get("16") for s, side in (("V", "right"), ("U", "left"))},
        recorded=len(_recorded(figures, group)),
        scores=_scores(figures),
        keys=KEYS,
        script=script,
        script_hash=script_hash,
    )


def write(path: Path, figures: Figures) -> None:
    """Write the page (see `render`) to `path`, whole or not at all. Raises TrainingError when the disk is full."""
    write_whole(path, render(figures))


KEYS = {
    "one": (
        ("left (output side), or both", OWN, False),
        ("right (input side)", OTHER, False),
        ("update rotated", NULL, True),
    ),
    "every": (
        ("left (output side), or both", OWN, False),
        ("right (input side)", OTHER, False),
        ("update rotated", NULL, True),
        ("Gaussian, by formula", THIRD, True),
    ),
    "shape": (
        ("this run", OWN, False),
        ("noise gradients", OTHER, True),
        ("entries permuted", NULL, True),
        ("Gaussian, by formula", THIRD, True),
    ),
    "locking": (("this run", OWN, False), ("noise gradients", NULL, True), ("chance", THIRD, True)),
}
"""Legends: name, colour, dashed."""


# --- figure 2: rotation and spectral shift ---------------------------------------------------------------------------


def _one_matrix(figures: Figures) -> list[Chart]:
    shown = figures["example"]
    if not shown:
        return []
    angles = [
        Series("left", OWN, _ranked(shown["angles"]["U"])),
        Series("right", OTHER, _ranked(shown["angles"]["V"])),
        Series("rotated, left", NULL, _ranked(shown["angles_null"]["U"]), dashed=True),
    ]
    change = [
        Series("this run", OWN, _ranked([b - a for a, b in zip(shown["s0"], shown["s1"], strict=True)])),
        Series("rotated", NULL, _ranked([b - a for a, b in zip(shown["s0"], shown["s_null"], strict=True)]), True),
    ]
    return _charts(
        line_chart("Principal angles", angles, x_label="rank of the angle", unit="degrees"),
        line_chart("Singular values of W0", [Series("W0", OWN, _ranked(shown["s0"]))], x_label="rank"),
        line_chart("Change of the singular values", change, x_label="rank"),
    )


def _ranked(values: Sequence[float]) -> list[Point]:
    return [Point(float(i), value) for i, value in enumerate(values, 1)]


def _every_matrix(figures: Figures) -> list[Chart]:
    last = figures["checkpoints"][-1]["step"]
    rows = [row for row in figures["rows"] if row["step"] == last]

    def series(name: str, column: str, colour: int, dashed: bool = False) -> Series:
        found = [(i, numbers.finite(row.get(column))) for i, row in enumerate(rows, 1)]
        return Series(name, colour, [Point(float(i), y) for i, y in found if y is not None], dashed)

    across = "matrix, by layer"
    return _charts(
        line_chart(
            "Largest angle",
            [
                series("left", "angU_max", OWN),
                series("right", "angV_max", OTHER),
                series("rotated, left", "angU_max_null", NULL, True),
            ],
            x_label=across,
            unit="degrees",
        ),
        line_chart(
            "Median angle",
            [
                series("left", "angU_med", OWN),
                series("right", "angV_med", OTHER),
                series("rotated, left", "angU_med_null", NULL, True),
            ],
            x_label=across,
            unit="degrees",
        ),
        line_chart(
            "Spectral shift",
            [
                series("this run", "nss", OWN),
                series("rotated", "nss_null", NULL, True),
                series("Gaussian", "nss_chance", THIRD, True),
            ],
            x_label=across,
            note=_decay(rows),
        ),
    )


def _decay(rows: Sequence[Any]) -> str:
    floor = next((row["wd_floor"] for row in rows if row.get("wd_floor") is not None), None)
    return "" if floor is None else f"Weight decay alone: {numbers.short(floor)}."


# --- figure 3: where the weights changed -----------------------------------------------------------------------------


def _maps(figures: Figures) -> list[tuple[str, str, str]]:
    """(title, image, mean) of the local density of changed weights, of those on principal and on small weights."""
    if not figures["example"]:
        return []
    titles = {"changed": "changed", "principal": "changed and principal", "low": "changed and small"}
    out: list[tuple[str, str, str]] = []
    for name, title in titles.items():
        grid = figures["example"]["maps"][name]
        mean = sum(map(sum, grid)) / sum(map(len, grid))
        out.append((title, image(grid), numbers.percent(mean)))
    return out


def image(grid: Sequence[Sequence[float]], colour: tuple[int, int, int] = (179, 84, 26)) -> str:
    """A grid of shares 0 .. 1 as a PNG for a `src` attribute: nothing is transparent, everything opaque."""
    lines = b"".join(b"\0" + b"".join(bytes((*colour, round(255 * share))) for share in row) for row in grid)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", len(grid[0]), len(grid), 8, 6, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(lines, 9)) + chunk(b"IEND", b"")
    return f"data:image/png;base64,{b64encode(png).decode()}"


OVERLAPS = {"princ": "principal weights", "low": "small weights", "princ_notlow": "principal, not small"}


def _overlaps(figures: Figures, group: str) -> list[tuple[str, list[str]]]:
    """(mask, cells): overlap, its three nulls, its ceiling, lift, recall, its null, share of energy, chance."""
    columns = figures["aggregate"][group][-1]["columns"]

    def told(name: str, show: Callable[[float], str] = numbers.percent) -> str:
        return show(columns[name]["mean"]) if name in columns else ""

    out: list[tuple[str, list[str]]] = []
    for mask, title in OVERLAPS.items():
        shares = [f"ov_{mask}{of}" for of in ("", "_null", "_perm", "_chance")] + [f"ceiling_{mask}"]
        more = [f"recall_{mask}", f"recall_{mask}_null", f"energy_{mask}"]
        out.append((title, [*map(told, shares), told(f"lift_{mask}", numbers.short), *map(told, more)]))
    return out if f"ov_{mask}" in columns else []


# --- figures 4 and 5: over the checkpoints ---------------------------------------------------------------------------


def over_checkpoints(
    title: str,
    points: Sequence[Any],
    curves: Sequence[Curve],
    *,
    recorded: Sequence[Any] = (),
    unit: str = "",
    note: str = "",
) -> Chart | None:
    """Means over the matrices at each checkpoint, or at each recorded step, where these are more.

    The band of an undashed line is their standard deviation.
    """
    series: list[Series] = []
    for curve in curves:
        among = max((points, recorded), key=lambda row: sum(curve.column in p["columns"] for p in row))
        known = [(p["progress"], p["columns"][curve.column]) for p in among if curve.column in p["columns"]]
        drawn = [
            Point(100 * x, c["mean"])
            if curve.dashed
            else Point(100 * x, c["mean"], c["mean"] - c["sd"], c["mean"] + c["sd"])
            for x, c in known
        ]
        series.append(Series(curve.name, curve.colour, drawn, curve.dashed))
    return line_chart(title, series, x_label="% of training", unit=unit, note=note, dots=True)


def _recorded(figures: Figures, group: str) -> list[Any]:
    found = figures.get("recorded")
    return found["aggregate"].get(group, []) if found else []


def _shape(figures: Figures, group: str) -> list[Chart]:
    points, recorded = figures["aggregate"][group], _recorded(figures, group)
    if max(len(points), len(recorded)) < 2:
        return []
    course = figures if len(points) > 1 else figures["recorded"]
    exponent, noise = course["growth"][group], course["growth_noise"][group]
    hills = [
        Series("this run", OWN, _hill(points[-1], "")),
        Series("permuted", NULL, _hill(points[-1], "_null"), dashed=True),
    ]
    grows = "" if None in (exponent, noise) else f"Grows as t^{exponent:.2f}; noise as t^{noise:.2f}."
    return _charts(
        over_checkpoints(
            "Norm of dW",
            points,
            [Curve("fro", "this run", OWN), Curve("fro_noise", "noise", OTHER, True)],
            recorded=recorded,
            note=grows,
        ),
        over_checkpoints(
            "Stable rank",
            points,
            [
                Curve("srank", "this run", OWN),
                Curve("srank_noise", "noise", OTHER, True),
                Curve("srank_null", "permuted", NULL, True),
                Curve("srank_chance", "Gaussian", THIRD, True),
            ],
            recorded=recorded,
        ),
        over_checkpoints(
            "Hill estimate",
            points,
            [Curve("hill_k16", "this run", OWN), Curve("hill_k16_null", "permuted", NULL, True)],
            recorded=recorded,
            note="k = 16.",
        ),
        line_chart("Hill against k", hills, x_label="k", note="Last checkpoint: the estimate depends on k.", dots=True),
        over_checkpoints(
            "Share of the top 16",
            points,
            [Curve("e16", "this run", OWN), Curve("e16_null", "permuted", NULL, True)],
            recorded=recorded,
        ),
    )


def _hill(point: Any, suffix: str) -> list[Point]:
    columns = point["columns"]
    return [
        Point(float(k), columns[f"hill_k{k}{suffix}"]["mean"])
        for k in (4, 8, 16, 32, 64)
        if f"hill_k{k}{suffix}" in columns
    ]


def _locking(figures: Figures, group: str) -> list[Chart]:
    points, recorded = figures["aggregate"][group], _recorded(figures, group)
    if max(len(points), len(recorded)) < 2:
        return []

    def chart(title: str, column: str, side: str, among: Sequence[Any]) -> Chart | None:
        curves = [
            Curve(column, "this run", OWN),
            Curve(f"{column}_null", "noise", NULL, True),
            Curve(f"sim_{side}_chance", "chance", THIRD, True),
        ]
        return over_checkpoints(title, among, curves, recorded=recorded if among is points else ())

    return _charts(
        chart("dW with the last dW, right", "sim_V", "V", points),
        chart("dW with the last dW, left", "sim_U", "U", points),
        chart("dW with what comes after, right", "later_V", "V", points[:-1]),
        chart("dW with what comes after, left", "later_U", "U", points[:-1]),
        line_chart(
            "Last dW against K",
            _by_k(points[0] if len(points) > 1 else recorded[0]),
            x_label="K",
            note="First with last; blue: right, copper: left; dashed: noise.",
            dots=True,
        ),
    )


def _by_k(point: Any) -> list[Series]:
    columns, ks = point["columns"], (4, 8, 16, 32, 64)

    def line(column: str) -> list[Point]:
        named = {k: column.format(k) for k in ks}
        return [Point(float(k), columns[name]["mean"]) for k, name in named.items() if name in columns]

    sides = (("V", "right", OTHER), ("U", "left", OWN))
    own = [Series(name, colour, line(f"sim{{}}_{s}")) for s, name, colour in sides]
    return own + [Series(f"noise, {name}", colour, line(f"sim{{}}_{s}_null"), True) for s, name, colour in sides]


# --- figures 6 and 8: what it was worth ------------------------------------------------------------------------------


def _scores(figures: Figures) -> list[Chart]:
    """Of a run that was evaluated while it trained."""
    return geometry_scores.charts({"this run": figures}, {"this run": (OWN, False)})


def _charts(*found: Chart | None) -> list[Chart]:
    return [chart for chart in found if chart]
