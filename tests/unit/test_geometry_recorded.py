"""Trajectories that a run recorded without keeping checkpoints, and the clock of noise."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from potstill.geometry import noise_trajectory, stable_rank, subspace_similarity
from potstill.geometry.matrices import Name
from potstill.geometry.recorded import noise_times, recorded
from potstill.run import Run

NAME = Name(matrix="layers.0.self_attn.q_proj.weight", layer=0, module="q_proj", kind="attention", m=60, n=80)
STEPS = (1, 20, 40)


@pytest.fixture
def walk() -> list[torch.Tensor]:
    covariance = torch.diag(torch.arange(1, 81, dtype=torch.float64) ** -1.0)
    return list(noise_trajectory(covariance, 60, STEPS, seed=3))


def written(folder: Path, walk: list[torch.Tensor], rates: list[float]) -> Run:
    """What a run leaves: vectors, a row for each step, and the learning rates."""
    (folder / "geometry").mkdir(parents=True)
    rows = []
    for step, dw in zip(STEPS, walk, strict=True):
        u, s, vh = torch.linalg.svd(dw, full_matrices=False)
        parts = {"u": u[:, :32], "s": s[:32], "v": vh[:32].T}
        arrays = {f"{NAME.matrix}/{k}": t.float().numpy() for k, t in parts.items()}
        np.savez(folder / "geometry" / f"step_{step:06d}.npz", **arrays)
        shape = {"stable_rank": stable_rank(dw), "energy_16": 0.5, "hill_16": 2.0, "spectral": s[0].item()}
        rows.append({"step": step, "matrix": NAME.matrix, "m": 60, "n": 80, "frobenius": dw.norm().item()} | shape)
    (folder / "geometry" / "trajectory.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    logged = [json.dumps({"step": i + 1, "lr": lr}) + "\n" for i, lr in enumerate(rates)]
    (folder / "metrics.jsonl").write_text("".join(logged))
    return Run(folder)


def test_a_recording_gives_the_course_without_checkpoints(tmp_path: Path, walk: list[torch.Tensor]):
    run = written(tmp_path, walk, [1e-4] * 40)
    found = recorded(run, [NAME], 40, None, 0)
    assert found
    assert [row["step"] for row in found["rows"]] == list(STEPS)
    for row, dw in zip(found["rows"], walk, strict=True):
        assert row["sim_V"] == pytest.approx(subspace_similarity(dw, walk[-1]), abs=1e-5)
        assert row["sim8_U"] == pytest.approx(subspace_similarity(dw, walk[-1], 8, "left"), abs=1e-5)
        assert (row["srank"], row["hill_k16"], row["progress"]) == (stable_rank(dw), 2.0, row["step"] / 40)
        assert 0 < row["sim_V_null"] <= 1 + 1e-9
        assert row["fro_noise"] == pytest.approx(walk[-1].norm().item() * math.sqrt(row["step"] / 40))
    [first, *_] = found["aggregate"]["attention"]
    assert first["columns"]["sim_V"]["mean"] == found["rows"][0]["sim_V"]
    assert found["growth"]["attention"] == pytest.approx(0.5, abs=0.05), "it is noise"


def test_a_run_without_recordings_has_no_course(tmp_path: Path, walk: list[torch.Tensor]):
    (tmp_path / "bare").mkdir()
    assert recorded(Run(tmp_path / "bare"), [NAME], 40, None, 0) is None
    other = Name(matrix="other", layer=0, module="other", kind="other", m=60, n=80)
    assert recorded(written(tmp_path / "run", walk, [1e-4] * 40), [other], 40, None, 0) is None


def test_noise_goes_as_far_as_its_learning_rates(tmp_path: Path, walk: list[torch.Tensor]):
    steady = written(tmp_path / "steady", walk, [1e-4] * 40)
    assert noise_times(steady, STEPS) == pytest.approx(STEPS)
    halved = written(tmp_path / "halved", walk, [1e-4] * 20 + [0.5e-4] * 20)
    assert noise_times(halved, STEPS) == pytest.approx([1, 20, 25])
    for silent in (None, written(tmp_path / "still", walk, [1e-4] * 20 + [0.0] * 20)):
        assert noise_times(silent, STEPS) == list(STEPS), "no log, or one that says that nothing moved"
