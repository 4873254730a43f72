"""Training within a subspace, and recording where the weights go."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests import tiny
from tests.contract.test_learner import METHODS, STUDENT, targets, weights
from tests.e2e.small import Command, command, parsed, recipe, refused

from potstill import loop
from potstill.config import Learner, Projection
from potstill.learners.local import LocalLearner
from potstill.learners.subspace import linear_weights, second_moments

OPD = METHODS["opd"]
K = 3


def learner(**projection: Any) -> LocalLearner:
    projection = {"from": "random", "k": K, "at": 0.0} | projection
    config = Learner(lr=0.01, weight_decay=0.1, clip=0.0)
    confine = Projection.model_validate(projection)
    return LocalLearner(tiny.loaded(), config, steps=9, seed=0, reference=False, lora=None, projection=confine)


def trained(steps: int = 4, **projection: Any) -> LocalLearner:
    by = learner(**projection)
    for step in range(1, steps + 1):
        by.step(targets(OPD), OPD, step, (step - 1) / steps)
    return by


def outside(by: LocalLearner, name: str, moved: torch.Tensor) -> float:
    """Share of `moved` that does not come from the basis of a matrix."""
    assert by.subspace is not None
    v = by.subspace.bases[name]
    return ((moved - moved @ v @ v.T).norm() / moved.norm()).item()


def test_bases_are_orthonormal_and_depend_on_the_seed_alone():
    one, two = trained(1).subspace, trained(1).subspace
    assert one is not None
    assert two is not None
    for name, v in one.bases.items():
        torch.testing.assert_close(v.T @ v, torch.eye(K), atol=1e-5, rtol=0)
        assert torch.equal(v, two.bases[name])


def test_the_papers_rule_confines_the_gradient_and_not_the_step():
    by = trained(1, mode="grad")
    assert by.subspace is not None
    for name, w in by.subspace.weights.items():
        assert w.grad is not None
        assert outside(by, name, w.grad) < 1e-5
    assert 0.05 < by.subspace.inside_share() < 0.999  # Adam divides entry by entry, and that leaves the subspace


@pytest.mark.parametrize("mode", ["step", "coord"])
def test_the_strict_modes_confine_the_update_with_its_weight_decay(mode: str):
    by = trained(mode=mode)
    assert by.subspace is not None
    for name, w in by.subspace.weights.items():
        moved = w.detach() - by.subspace.since[name]
        assert outside(by, name, moved) < 1e-4
        assert torch.linalg.matrix_rank(moved, atol=1e-5) <= K
    assert by.subspace.inside_share() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("mode", ["step", "coord"])
def test_in_double_precision_nothing_is_left_outside(mode: str):
    loaded = tiny.loaded()
    loaded.model.double()
    confine = Projection.model_validate({"from": "random", "k": K, "at": 0.0, "mode": mode})
    config = Learner(lr=0.01, weight_decay=0.1, clip=0.0)
    by = LocalLearner(loaded, config, steps=9, seed=0, reference=False, lora=None, projection=confine)
    for step in (1, 2, 3):
        by.step(targets(OPD), OPD, step, (step - 1) / 3)
    assert by.subspace is not None
    for name, w in by.subspace.weights.items():
        assert outside(by, name, w.detach() - by.subspace.since[name]) < 1e-6


def test_no_direction_at_all_stops_the_matrices_and_nothing_else():
    before = weights(learner())
    by = trained(2, k=0, mode="step", matrices="attention", **{"from": "self", "at": 0.5})
    first = weights(trained(1, at=0.9))
    attention = set(linear_weights(by.model, "attention"))
    for name, w in weights(by).items():
        assert torch.equal(w, first[name]) == (name in attention), name
        assert not torch.equal(w, before[name]), name
    assert by.step(targets(OPD), OPD, 3, 0.9)["projection/inside"] == 1


def test_coordinates_are_adam_on_the_projected_gradient():
    """One step by hand: B = -lr sign(G V) at the first step of Adam, without decay; W = W_at + B V^T."""
    by = learner(mode="coord")
    before = weights(by)
    free = learner(at=0.9)
    free._gradient(targets(OPD), OPD, 1, 0)
    by.step(targets(OPD), OPD, 1, 0.0)
    assert by.subspace is not None
    assert free.subspace is not None
    for name, v in by.subspace.bases.items():
        g = free.subspace.weights[name].grad
        assert g is not None
        r = g @ v
        b = -0.01 * r / (r.abs() + 1e-8)
        torch.testing.assert_close(weights(by)[name], before[name] + b @ v.T, atol=1e-5, rtol=1e-4)


def test_other_weights_train_freely():
    by, free = trained(1, matrices="attention"), trained(1, at=0.9)
    attention = set(linear_weights(by.model, "attention"))
    assert attention < set(linear_weights(by.model, "linear"))
    assert "lm_head.weight" not in linear_weights(by.model, "linear")
    for name, w in weights(by).items():
        assert torch.equal(w, weights(free)[name]) == (name not in attention), name


def test_the_own_subspace_is_that_of_the_update_so_far():
    by = learner(**{"from": "self", "at": 0.5})
    start = weights(by)
    for step in (1, 2):
        by.step(targets(OPD), OPD, step, 0.0)
    before = weights(by)
    by.step(targets(OPD), OPD, 3, 0.5)
    assert by.subspace is not None
    for name, v in by.subspace.bases.items():
        top = torch.linalg.svd(before[name] - start[name]).Vh[:K].T
        assert (v.T @ top).square().sum().item() / K == pytest.approx(1, abs=1e-3)
        assert torch.equal(by.subspace.since[name], before[name])


def test_second_moments_of_the_inputs_by_hand():
    by = learner()
    layer = linear_weights(by.model, "attention")["model.layers.0.self_attn.q_proj.weight"]
    texts = [torch.tensor([[5, 6, 7]]), torch.tensor([[8, 9]])]

    def forward() -> Any:
        for ids in texts:
            by.model(input_ids=ids)
            yield

    got = second_moments({"q": layer}, forward())["q"]
    block = by.model.model.layers[0]
    x = torch.cat([block.input_layernorm(by.model.model.embed_tokens(ids))[0] for ids in texts]).double()
    torch.testing.assert_close(got, x.T @ x / 5)
    inputs = trained(1, **{"from": "inputs"})
    assert inputs.subspace is not None
    assert {v.shape[1] for v in inputs.subspace.bases.values()} == {K}


def test_a_restored_projection_goes_on_bit_for_bit(tmp_path: Path):
    for mode in ("grad", "step", "coord"):
        folder = tmp_path / mode
        folder.mkdir()
        straight = trained(4, mode=mode, at=0.3)
        first = learner(mode=mode, at=0.3)
        for step in (1, 2, 3):
            first.step(targets(OPD), OPD, step, (step - 1) / 4)
        first.save(folder)
        second = learner(mode=mode, at=0.3)
        second.restore(folder)
        second.step(targets(OPD), OPD, 4, 0.75)
        for name, w in weights(straight).items():
            assert torch.equal(w, weights(second)[name]), (mode, name)


# --- recordings -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    recorded = ("steps=4", "eval.questions=0", "save={every=1, keep=9}", "geometry={every=2, k=8, most=9.0}")
    return loop.train(parsed(*recorded), tmp_path_factory.mktemp("recorded"))


def state(run: Any, step: int) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(run.path / "checkpoints" / f"step_{step:06d}" / "model.safetensors")


def test_what_is_recorded_is_the_svd_of_the_update(run: Any):
    from potstill.models import load

    start = load("lab/student").model.state_dict()
    assert sorted({row["step"] for row in run.trajectory}) == [1, 2, 4]
    for row in run.trajectory:
        moved = (state(run, row["step"])[row["matrix"]] - start[row["matrix"]]).double()
        u, s, vh = torch.linalg.svd(moved)
        assert row["frobenius"] == pytest.approx(moved.norm().item())
        assert row["stable_rank"] == pytest.approx((s.square().sum() / s[0] ** 2).item())
        assert row["energy_4"] == pytest.approx((s[:4].square().sum() / s.square().sum()).item())
        with np.load(run.path / "geometry" / f"step_{row['step']:06d}.npz") as file:
            np.testing.assert_allclose(file[f"{row['matrix']}/s"], s[:8], rtol=1e-5)
            first = (
                np.abs(file[f"{row['matrix']}/v"][:, 0] @ vh[0].numpy()),
                np.abs(file[f"{row['matrix']}/u"][:, 0] @ u[:, 0].numpy()),
            )
        assert first == pytest.approx((1, 1), abs=1e-4)
    assert all("time/geometry" in row for row in run.metrics if row["step"] != 3)


def test_a_recording_is_the_basis_of_another_run(run: Any, tmp_path: Path):
    file = run.path / "geometry" / "step_000004.npz"
    of = f"projection={{from='{file}', k=2, mode='step', matrices='attention', at=0.0}}"
    other = loop.train(parsed("eval.questions=0", of), tmp_path)
    assert other.metrics[-1]["projection/inside"] == pytest.approx(1, abs=1e-5)


def test_a_dear_recording_is_left_out(tmp_path: Path):
    cheap = loop.train(parsed("steps=4", "eval.questions=0", "geometry={every=1, most=1e-9}"), tmp_path)
    assert sorted({row["step"] for row in cheap.trajectory}) == [1, 4]


def test_recordings_after_the_last_checkpoint_are_made_again(tmp_path: Path):
    config = parsed("steps=4", "eval.questions=0", "geometry={every=1, most=9.0}", "save={every=2}")
    straight = loop.train(config, tmp_path / "straight")
    stopped = loop.train(config, tmp_path / "stopped")
    stopped.rewind(2)
    assert {row["step"] for row in stopped.trajectory} == {1, 2}
    (stopped.path / "checkpoints" / "latest").write_text("step_000002\n")
    # step_000004 went with the rewind; the run goes on from step 2
    again = loop.train(config, tmp_path / "stopped", resume=True)
    assert [json.dumps(r) for r in again.trajectory] == [json.dumps(r) for r in straight.trajectory]


# --- faults ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["projection={at=0.0}"], ["projection.at = 0", "Set at = 0.2"]),
        (["projection={k=2}", "student.lora.rank=2"], ["[projection]", "[student.lora]"]),
        (["geometry.every=1", "student.lora.rank=2"], ["[geometry]", "[student.lora]"]),
        (
            ["projection={from='nowhere.npz', at=0.0}"],
            ["projection.from = 'nowhere.npz' is neither", "geometry/step_N.npz"],
        ),
        (["projection={mode='adam'}"], ["projection.mode = 'adam'"]),
        (["projection={k=0}"], ["k = 0 stops the weights", 'Set mode = "step"']),
        (["projection={form='self'}"], ["projection.form", "did you mean 'from'"]),
    ],
)
def test_faults(
    overrides: list[str],
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    potstill: Command = command(capsys)
    monkeypatch.chdir(tmp_path)
    recipe(tmp_path)
    refused(potstill("train", "tiny.toml", *overrides), *words)
    assert not (tmp_path / "runs").exists()


assert STUDENT is not None
