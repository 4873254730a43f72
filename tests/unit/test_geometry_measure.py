"""The whole measurement on small matrices: numbers beside their nulls, the cache, what goes wrong in one matrix."""

import csv
import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from potstill.errors import CheckpointError, ConfigError
from potstill.geometry import decompose, mask_jaccard, measure, noise_trajectory, stable_rank, subspace_similarity
from potstill.geometry.aggregate import growth, spread, weighted_sparsity
from potstill.geometry.rows import density_map
from potstill.geometry.trajectory import bases, follow
from potstill.report import geometry as page
from potstill.report import geometry_compare
from potstill.report.geometry_numbers import NUMBERS

Q, D = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight"
SHAPES = {Q: (128, 160), D: (96, 128)}


def folder(path: Path, weights: Mapping[str, torch.Tensor]) -> Path:
    path.mkdir(parents=True)
    save_file({name: w.contiguous() for name, w in weights.items()}, path / "model.safetensors")
    return path


def start(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    made = torch.Generator().manual_seed(99)
    return {name: (0.02 * torch.randn(shape, generator=made)).bfloat16().to(dtype) for name, shape in SHAPES.items()}


def noise(scale: float = 1e-4, seed: int = 0) -> dict[str, torch.Tensor]:
    made = torch.Generator().manual_seed(seed)
    return {name: scale * torch.randn(shape, generator=made) for name, shape in SHAPES.items()}


def plus(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: w.float() + b[name] for name, w in a.items()}


def test_a_gaussian_update_is_like_its_nulls(tmp_path: Path):
    w0 = folder(tmp_path / "w0", start())
    w1 = folder(tmp_path / "w1", plus(start(), noise()))
    for row in measure(w0, [w1], cache=tmp_path / "cache", nulls=4).rows:
        for name in ("density", "srank", "part_ratio", "e16", "nss", "angU_med", "angV_med"):
            assert row[name] == pytest.approx(row[f"{name}_null"], rel=0.25), name
        assert row["hill_k16"] == pytest.approx(row["hill_k16_null"], rel=0.5), "its error is about 1 / sqrt(k)"
        for mask in ("princ", "low"):
            assert row[f"ov_{mask}"] == pytest.approx(row[f"ov_{mask}_null"], abs=0.012)
            assert row[f"ov_{mask}"] == pytest.approx(row[f"ov_{mask}_perm"], abs=0.012)
            assert row[f"energy_{mask}"] == pytest.approx(row[f"energy_{mask}_chance"], abs=0.02)
        assert row["ov_low"] > 1.3 * row["ov_low_chance"], "rounding alone makes small weights move first"
        assert row["srank"] == pytest.approx(row["srank_chance"], rel=0.15)
        assert row["proj"] == pytest.approx(row["proj_chance"], rel=0.1)


def test_an_update_with_structure_is_not(tmp_path: Path):
    one = {n: 1e-3 * torch.outer(torch.randn(s[0]), torch.randn(s[1])) for n, s in SHAPES.items()}
    for row in measure(
        folder(tmp_path / "w0", start()), [folder(tmp_path / "w1", plus(start(), one))], cache=tmp_path / "c"
    ).rows:
        assert row["srank"] == pytest.approx(1, abs=1e-3)
        assert row["srank_null"] > 5
        assert row["e16"] > 0.99 > 0.9 > row["e16_null"]


def test_an_update_of_a_few_entries_has_what_is_defined(tmp_path: Path):
    few = {n: torch.zeros(s) for n, s in SHAPES.items()}
    for dw in few.values():
        dw[3, 5] = dw[4, 6] = 0.01
    w0, w1 = folder(tmp_path / "w0", start()), folder(tmp_path / "w1", plus(start(), few))
    for row in measure(w0, [w1], cache=tmp_path / "c", out=tmp_path / "out").rows:
        assert row["changed"] == 2
        assert row["srank"] == pytest.approx(2, abs=1e-3)
        assert row["hill_k8"] is None
        assert "hill_k8_null" not in row


def test_numbers_are_those_of_the_functions_on_matrices(tmp_path: Path):
    w0, dw = start(), noise(seed=3)
    done = measure(folder(tmp_path / "w0", w0), [folder(tmp_path / "w1", plus(w0, dw))], cache=tmp_path / "c")
    for row in done.rows:
        moved = (w0[row["matrix"]] + dw[row["matrix"]]) - w0[row["matrix"]]
        assert row["fro"] == pytest.approx(moved.norm().item())
        assert row["srank"] == pytest.approx(stable_rank(moved))
        assert row["k"] == min(SHAPES[row["matrix"]]) // 2
        assert row["nss"] <= row["rel_fro"], "Mirsky"
    assert done.figures["left_out"] == {}
    [point] = done.figures["aggregate"]["all"]
    assert point["columns"]["srank"]["mean"] == pytest.approx(fmean(row["srank"] for row in done.rows))
    assert list(done.figures["aggregate"]) == ["attention", "all"]


def test_the_cache_is_used_again_and_changes_nothing(tmp_path: Path):
    w0, w1 = folder(tmp_path / "w0", start()), folder(tmp_path / "w1", plus(start(), noise()))
    first = measure(w0, [w1], cache=tmp_path / "c")
    written = {file: file.stat().st_mtime_ns for file in (tmp_path / "c").iterdir()}
    assert len(written) == 2
    again = measure(w0, [w1], cache=tmp_path / "c")
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "c").iterdir()} == written
    assert (first.figures["cache"], again.figures["cache"]) == ({"hits": 0, "misses": 2}, {"hits": 2, "misses": 0})
    assert again.rows == first.rows
    measure(w0, [w1], cache=tmp_path / "c", k=8)
    assert len(list((tmp_path / "c").iterdir())) == 4, "another k is another decomposition"


def test_bf16_files_are_warned_of_and_fp32_files_are_not(tmp_path: Path):
    low = {n: 1e-6 * torch.randn(s[0], 2) @ torch.randn(2, s[1]) for n, s in SHAPES.items()}
    w0, w1 = start(torch.bfloat16), plus(start(), low)
    begin = folder(tmp_path / "w0", w0)
    fine = measure(begin, [folder(tmp_path / "fp32", w1)], cache=tmp_path / "c")
    coarse = measure(begin, [folder(tmp_path / "bf16", {n: w.bfloat16() for n, w in w1.items()})], cache=tmp_path / "c")
    assert not any("bf16" in w for w in fine.figures["warnings"])
    assert any("too coarse for 2 of 2 updates" in w for w in coarse.figures["warnings"])
    for a, b in zip(fine.rows, coarse.rows, strict=True):
        assert a["sp_bf16"] == b["sp_bf16"], "sparsity looks at bf16 in both"
        assert a["srank"] < 2.1 < 3 < b["srank"], "rounding inflates the stable rank"


def test_a_matrix_that_stayed_and_one_that_broke_do_not_stop_the_others(tmp_path: Path):
    w0 = folder(tmp_path / "w0", start())
    still = plus(start(), noise()) | {Q: start()[Q]}
    done = measure(w0, [folder(tmp_path / "still", still)], cache=tmp_path / "c", out=tmp_path / "out")
    rows = {row["matrix"]: row for row in done.rows}
    assert (rows[Q]["fro"], rows[Q]["sp_bf16"], "srank" in rows[Q]) == (0, 1.0, False)
    assert "1 of 2 updates are exactly zero" in "".join(done.figures["warnings"])
    broken = plus(start(), noise())
    broken[Q][3, 4] = math.nan
    done = measure(w0, [folder(tmp_path / "nan", broken)], cache=tmp_path / "c")
    assert [row["matrix"] for row in done.rows] == [D]
    assert "1 nan or infinite" in done.figures["failed"][Q]
    broken[D][0, 0] = math.inf
    with pytest.raises(ConfigError, match="none of 2 matrices can be measured"):
        measure(w0, [folder(tmp_path / "worse", broken)], cache=tmp_path / "c")


def test_arguments_are_checked_before_anything_is_read(tmp_path: Path):
    for wrong, said in (({"k": 0}, "k = 0"), ({"nulls": 1}, "nulls = 1"), ({"out": tmp_path}, "exists already")):
        with pytest.raises(ConfigError, match=said):
            measure("nowhere", ["nowhere"], **wrong)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def walked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two geometries of three checkpoints each: noise through white inputs, and the same twice as large."""
    root = tmp_path_factory.mktemp("walk")
    w0 = folder(root / "w0", start())
    for label, scale in (("small", 1e-4), ("large", 2e-4)):
        sums, points = {n: torch.zeros(s) for n, s in SHAPES.items()}, []
        for t in (1, 2, 3):
            sums = plus(sums, noise(scale, seed=t))
            points.append(folder(root / label / f"step_{100 * t}", plus(start(), sums)))
        measure(w0, list(points), out=root / f"geometry-{label}", cache=root / "cache")
    return root


def test_files_hold_the_same_numbers(walked: Path):
    out = walked / "geometry-small"
    figures = json.loads((out / "geometry.json").read_text())
    with (out / "geometry.csv").open() as file:
        table = list(csv.DictReader(file))
    assert len(table) == len(figures["rows"]) == 6
    assert [float(row["srank"]) for row in table] == [row["srank"] for row in figures["rows"]]
    with np.load(out / "vectors.npz") as vectors:
        assert len(vectors.files) == 6
        a, b = vectors[f"{Q}/100"], vectors[f"{Q}/300"]
    assert a.shape == (160, 16)
    [first, *_] = [row for row in figures["rows"] if row["matrix"] == Q]
    assert np.linalg.norm(a.T @ b) ** 2 / 16 == pytest.approx(first["sim_V"], abs=1e-5)


def test_a_walk_of_noise_is_like_its_null(walked: Path):
    figures = json.loads((walked / "geometry-small" / "geometry.json").read_text())
    assert (figures["clock"], figures["inputs"]) == ("names", None)
    assert figures["growth"]["all"] == pytest.approx(0.5, abs=0.02)
    assert figures["growth_noise"]["all"] == pytest.approx(0.5), "folders say nothing of learning rates"
    first = figures["aggregate"]["all"][0]["columns"]
    for name in ("sim_V", "sim_U", "later_V", "later_U"):
        assert first[name]["mean"] == pytest.approx(first[f"{name}_null"]["mean"], abs=0.06), name
    assert first["sim_V"]["mean"] > first["later_V"]["mean"] + 0.05, "a sum resembles its beginning"
    square = np.array(figures["similarity"]["all"]["V"]["16"])
    assert np.allclose(square, square.T)
    assert np.allclose(np.diag(square), 1)
    assert square[0, 2] == pytest.approx(first["sim_V"]["mean"])


def test_inputs_with_few_directions_lock_noise():
    covariance = torch.diag(torch.arange(1, 101, dtype=torch.float64) ** -2.0)
    walk = list(noise_trajectory(covariance, 80, [10, 50], seed=5))
    found = [bases(decompose(dw, 16)) for dw in walk]
    after = [bases(decompose(walk[1] - walk[0], 16))]
    own = follow(found, after, [10, 50], (80, 100), key=1, covariance=covariance).columns[0]
    assert own["sim_V"] == pytest.approx(subspace_similarity(walk[0], walk[1]))
    assert own["sim_V_null"] == pytest.approx(own["sim_V"], abs=0.1)
    assert own["sim_V_null"] > 0.7
    assert own["sim4_V_null"] > 0.7
    assert own["inputs"] > 0.7
    ranks = [c["srank_noise"] for c in follow(found, after, [10, 50], (80, 100), key=1, covariance=covariance).columns]
    assert ranks == pytest.approx([stable_rank(dw) for dw in walk], rel=0.2), "flat, and learns nothing"
    white = follow(found, after, [10, 50], (80, 100), key=1).columns[0]
    assert white["sim_V_null"] < 0.5, "white inputs do not lock"


def test_geometries_are_compared_at_equal_progress_and_at_equal_norm(walked: Path):
    folders = [walked / f"geometry-{label}" for label in ("small", "large")]
    compared = geometry_compare.compare(folders)
    assert compared["group"] == "attention"
    assert {label: p["step"] for label, p in compared["progress"][0.5].items()} == dict.fromkeys(
        ("geometry-small", "geometry-large"), 200
    )
    # The large walk has norm 2 c sqrt(t), the small one ends at c sqrt(3): nearest on a log scale is t = 1.
    assert {label: p["step"] for label, p in compared["at_norm"].items()} == {
        "geometry-small": 300,
        "geometry-large": 100,
    }
    assert compared["far"] == {}, "c 2 against c sqrt(3): a factor of 1.15"
    assert "about equally large" in geometry_compare.render(compared)
    assert compared["between"]["similarity"][0][1] == pytest.approx(1, abs=1e-3), "the same directions"
    page = geometry_compare.render(compared)
    assert "geometry-large, step 100" in page
    assert "Do they change the same weights?" in page
    assert "figures 6 and 8" not in page, "folders have no scores"
    shutil.copytree(folders[0], walked / "cut")
    (walked / "cut" / "geometry.json").write_text("{")
    with pytest.raises(CheckpointError, match="is no JSON"):
        geometry_compare.compare([folders[0], walked / "cut"])
    for wrong in (folders[:1], [folders[0], folders[0]]):
        with pytest.raises(ConfigError):
            geometry_compare.compare(wrong)


def test_a_run_without_a_checkpoint_near_the_norm_is_named(walked: Path, tmp_path: Path):
    figures = json.loads((walked / "geometry-large" / "geometry.json").read_text())
    for points in figures["aggregate"].values():
        for point in points:
            point["columns"]["fro"]["mean"] *= 10
    (tmp_path / "huge").mkdir()
    (tmp_path / "huge" / "geometry.json").write_text(json.dumps(figures))
    compared = geometry_compare.compare([walked / "geometry-small", tmp_path / "huge"])
    assert compared["far"] == {"huge": pytest.approx(20 / math.sqrt(3), rel=0.05)}
    assert "huge has no checkpoint near it: 12 times" in geometry_compare.render(compared)


def test_the_page_draws_what_was_recorded_where_that_is_more(walked: Path):
    figures = json.loads((walked / "geometry-small" / "geometry.json").read_text())
    plain = page.render(figures)
    assert plain.count("<circle") > 20
    for said in ("share of changed weights on", "of them changed", "right side, K = 16", "left side, K = 16"):
        assert said in plain
    assert "was recorded while it trained" not in plain
    [first, *_] = figures["aggregate"]["attention"]
    kept = {name: value for name, value in first["columns"].items() if not name.startswith("nss")}
    more = [first | {"progress": x, "columns": kept} for x in (0.1, 0.2, 0.3, 0.6, 1.0)]
    figures["recorded"] = {"aggregate": {"attention": more}, "growth": {}, "growth_noise": {}}
    longer = page.render(figures)
    assert "Lines with 5 points are of what was recorded" in longer
    assert longer.count("<circle") > plain.count("<circle") + 10, "two points more on each line that was recorded"
    both = geometry_compare.compare([walked / "geometry-small", walked / "geometry-large"])
    drawn = geometry_compare.render(both | {"recorded": {"geometry-small": more, "geometry-large": []}})
    assert drawn.count("<circle") > geometry_compare.render(both).count("<circle") + 8
    assert "Spectral shift at equal norm" in drawn, "which no recording has"
    alone = figures | {"aggregate": {"attention": figures["aggregate"]["attention"][-1:]}}
    alone["similarity"] = {"attention": {"U": {}, "V": {}}}
    alone["recorded"]["growth"] = alone["recorded"]["growth_noise"] = {"attention": 0.5}
    drawn = page.render(alone)
    assert "Grows as t^0.50; noise as t^0.50" in drawn
    assert "dW with the last dW, right" in drawn
    assert "dW with what comes after" not in drawn, "it needs checkpoints"


def test_masks_of_two_runs_overlap_as_random_ones_do_unless_they_agree(tmp_path: Path):
    w0, shared = start(), noise(1e-4, seed=7)
    folder(tmp_path / "w0", w0)
    for label, seed in (("a", 1), ("b", 2)):
        own = noise(1e-5, seed=seed)
        apart = folder(tmp_path / f"{label}1", plus(w0, noise(1e-4, seed=seed)))
        alike = folder(tmp_path / f"{label}2", plus(w0, plus(shared, own)))
        for name, path in (("apart", apart), ("alike", alike)):
            measure(tmp_path / "w0", [path], out=tmp_path / f"{name}-{label}", cache=tmp_path / "cache")
    for name in ("apart", "alike"):
        found = geometry_compare.compare([tmp_path / f"{name}-a", tmp_path / f"{name}-b"])["between"]["masks"]
        jaccard, random, chance = (found[what][0][1] for what in ("jaccard", "random", "chance"))
        q0 = w0[Q].bfloat16()
        masks = [load(tmp_path / f"{label}{1 + (name == 'alike')}", Q) != q0 for label in "ab"]
        by_hand = mask_jaccard(masks[0], masks[1])
        assert jaccard == pytest.approx(by_hand.jaccard, abs=1e-6)
        assert chance == pytest.approx(by_hand.chance, abs=1e-3)
        assert random > chance + 0.05, "small weights change in any update"
        assert (jaccard > random + 0.2) if name == "alike" else jaccard == pytest.approx(random, abs=0.02)


def load(path: Path, name: str) -> torch.Tensor:
    return load_file(path / "model.safetensors")[name].bfloat16()


def test_aggregates_by_hand():
    assert spread([1.0, None, 3.0, math.nan]) == {"mean": 2, "sd": math.sqrt(2), "min": 1, "max": 3, "n": 2}
    assert spread([None]) is None
    assert weighted_sparsity([{"changed": 1, "numel": 10}, {"changed": 80, "numel": 90}]) == pytest.approx(0.19)
    points = [{"step": t, "columns": {"fro": {"mean": 3 * t**0.7}}} for t in (2, 8, 20)]
    assert growth({"all": points, "one": points[:1]}) == {"all": pytest.approx(0.7), "one": None}


def test_a_small_share_is_not_said_to_be_none():
    [proj] = [number for number in NUMBERS if number.column == "proj"]
    assert [proj.show(x) for x in (0.0, 4.3e-4, 0.0321)] == ["0.0\xa0%", "0.043\xa0%", "3.2\xa0%"]


def test_density_map_keeps_the_share():
    mask = torch.zeros(128, 256, dtype=torch.bool)
    mask[:64] = True
    grid = density_map(mask)
    assert grid.shape == (64, 64)
    assert (grid[:32].mean().item(), grid[32:].mean().item()) == (1.0, 0.0)
