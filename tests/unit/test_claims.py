"""Verdicts by rule, and the claims read off made-up runs in which the answer is known."""

import json
import math
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from potstill.lab.claims import RECIPES, Result, markdown
from potstill.lab.claims.evidence import METHODS, Evidence, K
from potstill.lab.claims.paper import claims
from potstill.lab.claims.rules import EQUAL, Claim, interval, verdict
from potstill.lab.claims.tables import tables
from potstill.recipes import tables as recipe
from potstill.report import claims as page
from potstill.run import Run

SEEDS = (0, 1, 2)


def claim(kind: str, effects: list[list[float]], nulls: list[list[float]] | None = None, bar: float = 0.0) -> Claim:
    return Claim(name="", paper="", ours="", kind=kind, effects=effects, nulls=nulls or [], bar=bar)  # type: ignore[arg-type]


def test_students_interval_by_hand():
    got = interval([1.0, 2.0, 3.0])
    assert (got.mean, got.high - 2, 2 - got.low) == pytest.approx((2, 4.303 / math.sqrt(3), 4.303 / math.sqrt(3)))
    assert interval([1.0]).high == math.inf


CLEAR, WIDE = [0.9, 1.0, 1.1], [-1.0, 1.0, 3.0]


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (claim("above", [CLEAR]), "reproduced"),
        (claim("above", [CLEAR], [[0.1, 0.0, -0.1]]), "reproduced"),
        (claim("above", [CLEAR], [[0.8, 0.9, 0.95]]), "explained by the null"),  # 88 % of it
        (claim("above", [CLEAR], [[-0.5, 0.5, 1.0]]), "explained by the null"),  # what is left is not above 0
        (claim("above", [CLEAR, CLEAR], [[0.0, 0.0, 0.0], CLEAR]), "reproduced"),  # one part is more than the null
        (claim("above", [CLEAR, WIDE]), "not reproduced (open)"),
        (claim("above", [CLEAR, [-1.0, -1.1, -0.9]]), "not reproduced"),
        (claim("above", [CLEAR], bar=2.0), "not reproduced"),
        (claim("same", [[0.01, 0.0, -0.01]], bar=0.2), "reproduced"),
        (claim("same", [[0.01, 0.0, -0.01]], [[0.02, 0.02, 0.03]], bar=0.2), "explained by the null"),
        (claim("same", [[0.01, 0.0, -0.01]], [CLEAR], bar=0.2), "reproduced"),
        (claim("same", [CLEAR], bar=0.2), "not reproduced"),
        (claim("same", [WIDE], bar=0.2), "not reproduced (open)"),
    ],
)
def test_verdicts(made: Claim, expected: str):
    assert verdict(made) == expected


# --- made-up runs ---------------------------------------------------------------------------------------------------


def write(path: Path, ranks: list[float], end: float, start: float = 0.1, norm: float = 1.0) -> Run:
    """A finished run: stable ranks over five checkpoints, scores at a fifth and at the end."""
    path.mkdir(parents=True)
    (path / "geometry").mkdir()
    (path / "resolved.json").write_text(json.dumps({"steps": 200, "geometry": {"every": 40}}))
    rows = [{"step": 40 * (i + 1), "matrix": "attn", "stable_rank": r, "frobenius": norm} for i, r in enumerate(ranks)]
    other = {"stable_rank": 99.0, "frobenius": 99.0}
    rows += [{"step": 1, "matrix": "attn"} | other, {"step": 40, "matrix": "mlp"} | other]
    (path / "geometry" / "trajectory.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    scores = [(0, 0.1), (40, start), (200, end)]
    evals = [{"step": s, "name": "sampled", "samples": 4, "avg@4": {"value": v}} for s, v in scores]
    (path / "evals.jsonl").write_text("".join(json.dumps(r) + "\n" for r in evals))
    logged = {"term/teacher_rms": 0.5, "term/verifier_rms": 0.3, "projection/inside": 0.7}
    (path / "metrics.jsonl").write_text(
        json.dumps(logged) + "\n" + json.dumps(logged | {"term/cosine": 0.2, "projection/inside": 0.6}) + "\n"
    )
    return Run(path)


def figures(density: float, angle: float, sim: float, noise: float) -> dict[str, Any]:
    """What geometry.json holds; every null is like the update, but for Sim."""
    values = {"nss": angle / 1e3, "ov_princ": 0.28, "ov_low": 0.9 - density / 2, "angU_max": angle, "angV_max": angle}
    columns = {f"{name}{suffix}": {"mean": v} for name, v in values.items() for suffix in ("", "_null")}
    columns |= {name: {"mean": 4.0} for name in ("srank", "srank_noise", "rel_fro", "later_V", "later_V_null")}
    for side in "UV":
        columns |= {f"sim{K}_{side}": {"mean": sim}, f"sim{K}_{side}_null": {"mean": noise}}

    def point(hill: float) -> dict[str, Any]:
        return {
            "columns": columns | {"hill_k16": {"mean": hill}, "hill_k16_null": {"mean": 7.0}},
            "sparsity": 1 - density,
        }

    points = [point(2.0), point(2.0 * (1 + 0.1 * math.log(angle)))]
    return {
        "aggregate": {"all": points, "attention": points},
        "checkpoints": [{"step": 40}, {"step": 200}],
        "rows": [{"step": 200, "density_null": density, "numel": 10}, {"step": 40, "density_null": 0.0, "numel": 10}],
    }


FLAT, RISING, FALLING = [4.0] * 5, [4.0, 5.0, 6.0, 7.0, 8.0], [8.0, 7.0, 6.0, 5.0, 4.0]


@pytest.fixture
def evidence(tmp_path: Path) -> Evidence:
    """As the paper has it, but that random directions serve OPD as well, and nulls explain the weights that changed."""
    variants = [v for name in RECIPES for v in recipe(name)[1]]
    curves = {"sft": RISING, "grpo": FALLING, "mix-05": RISING, "mix-01": FALLING}
    ends = {"sft": 0.8, "sft-self": 0.5, "sft-random": 0.79, "opd-stop": 0.12}
    runs = {
        v: [
            write(
                tmp_path / v / f"seed-{s}",
                [(1 + 0.01 * s) * r for r in curves.get(v, FLAT)],
                ends.get(v, 0.6 if v.startswith("sft") else 0.3) + 0.001 * s,
                norm={"random-25": 0.5, "off-policy": 1.2}.get(v, 1.0) * (1 + 0.001 * s),
            )
            for s in SEEDS
        ]
        for v in variants
    }
    shape = {"sft": (0.9, 10.0, 0.5), "opd": (0.5, 1.0, 0.9), "grpo": (0.3, 0.5, 0.6)}
    measured = {
        m: [figures(*[x * (1 + 0.001 * s) for x in shape.get(m, (0.4, 1.0, 0.7))], noise=0.2) for s in SEEDS]
        for m in METHODS
    }
    return Evidence(runs, measured)


def test_the_claims_are_judged_as_the_runs_were_made(evidence: Evidence):
    found = {c.name: verdict(c) for c in claims(evidence)}
    explained = [name for name, said in found.items() if said == "explained by the null"]
    assert explained == [
        "Weights unchanged in bf16: SFT < OPD < RLVR",
        "In unchanged weights, OPD is nearer to RLVR than to SFT",
        "Largest principal angles: SFT > OPD > RLVR",
        "In largest principal angles, OPD is nearer to RLVR than to SFT",
        "Spectral shift: SFT > OPD > RLVR",
        "In spectral shift, OPD is nearer to RLVR than to SFT",
        "Changes avoid principal weights: OPD and RLVR below 30 %",
        "Changes prefer small weights: SFT < OPD < RLVR",
        "In changes on small weights, OPD is nearer to RLVR than to SFT",
        "Stable rank of dW: opd stays flat",
        f"OPD within its early {K} directions scores as without",
    ]
    assert {said for name, said in found.items() if name not in explained} == {"reproduced"}


def test_curves_are_compared_checkpoint_by_checkpoint(evidence: Evidence):
    by_hand = fmean(abs(math.log(a / b)) for a, b in zip(FALLING, FLAT, strict=True))
    assert evidence.distance("grpo", "opd") == pytest.approx([by_hand] * 3)
    assert by_hand > math.log(EQUAL)
    assert evidence.ranks("opd")[2] == pytest.approx([4.08] * 5), "attention matrices, without the first step"
    assert evidence.between_seeds("opd") == pytest.approx([math.log(1.01), math.log(1.02 / 1.01), math.log(1.02)])
    assert evidence.norm("random-25") == pytest.approx([0.5, 0.5005, 0.501])
    assert evidence.score("opd", 0.2) == [0.1] * 3
    assert evidence.sparsity("grpo")[0] == pytest.approx(evidence.sparsity("grpo")[1])
    assert evidence.logged("mix-50", "term/cosine") == [0.2] * 3
    assert evidence.last("opd-self", "projection/inside") == [0.6] * 3


def test_controls_with_fewer_seeds_are_paired_with_the_first(evidence: Evidence):
    fewer = Evidence({v: r[:2] if "-" in v else r for v, r in evidence.runs.items()}, evidence.measured)
    assert len(fewer.distance("gap-50", "opd")) == 2
    assert len(claims(fewer)) == len(claims(evidence))


def test_what_is_written(evidence: Evidence, tmp_path: Path):
    done = Result(claims(evidence), tables(evidence), tmp_path)
    text = markdown(done)
    widths = {line.count("|") for line in text.split("\n\n")[0].splitlines()}
    assert widths == {6}
    assert "OmniOPD" not in text
    assert "omniopd" in text
    kept = next(row for row in done.tables[1].rows if row[0] == "sft-self")
    assert kept[5].startswith("0.572 [")  # (0.5 - 0.1) / (0.8 - 0.1)
    random = next(row for row in done.tables[1].rows if row[0] == "sft-random")
    assert random[4].startswith("-29.0 ["), "its own directions against random ones: 0.5 - 0.79"
    html = page.render(done.rows, done.tables)
    assert html.count("explained by the null") == 12
    assert "http" not in html.replace("http-equiv", "")
