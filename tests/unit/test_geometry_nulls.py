"""Every null reproduces its closed form, or keeps what it promises to keep."""

import math

import pytest
import torch

from potstill.errors import ConfigError
from potstill.geometry import (
    against,
    basis,
    decompose,
    density_matched_update,
    growth_exponent,
    half_spacing,
    input_alignment,
    isotropic_shift,
    isotropic_update,
    noise_trajectory,
    overlap_null,
    overlap_with,
    permuted_update,
    projection_energy,
    rotation_matched_update,
    shift_between,
    singular_values,
    spectral_shift,
    stable_rank,
    storage,
    subspace_similarity,
    update_sparsity,
    weight_decay_floor,
    weight_masks,
    window_similarity,
)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("density", [0.2776, 0.4628, 0.9273])
def test_density_matched_update_changes_exactly_that_share_in_bf16(stored, density):
    w0 = (0.02 * torch.randn(300, 400)).to(stored)
    dw = density_matched_update(w0, density, seed=3)
    assert 1 - update_sparsity(w0, w0.float() + dw) == pytest.approx(density, abs=3e-5)
    assert torch.equal(dw, density_matched_update(w0, density, seed=3))
    assert not torch.equal(dw, density_matched_update(w0, density, seed=4))
    assert (dw / dw.std()).pow(4).mean().item() == pytest.approx(3, rel=0.05)  # Gaussian, wherever it landed


def test_density_matched_update_gives_the_overlaps_of_section_9_1():
    # Synthetic Gaussian W0 and alpha = 0.3. The band was found for rank 64 of 2048; 32 of 1024 holds as much energy.
    w0 = (0.02 * torch.randn(1024, 1024)).bfloat16()
    masks = weight_masks(w0, 32, 0.3)
    for density, low in ((0.9273, (0.318, 0.3235)), (0.4628, (0.519, 0.544)), (0.2776, (0.687, 0.757))):
        got = overlap_null(w0, masks, density, seed=0)
        assert got.density == pytest.approx(density, abs=1e-5)
        assert low[0] <= got.low.overlap <= low[1]
        assert 0.264 <= got.principal.overlap <= 0.3


@pytest.mark.parametrize("density", [0.0, 1.0, -1.0])
def test_density_out_of_reach(density):
    with pytest.raises(ConfigError, match="cannot be matched"):
        density_matched_update(torch.ones(3, 3), density, 0)


def test_permuted_update_keeps_the_entries():
    dw = torch.outer(torch.arange(1.0, 41), torch.arange(1.0, 31))
    got = permuted_update(dw, 0)
    assert torch.equal(got.view(-1).sort().values, dw.view(-1).sort().values)
    assert stable_rank(dw) == pytest.approx(1, abs=1e-5)
    assert stable_rank(got - got.mean()) > 5
    assert not torch.equal(got, permuted_update(dw, 1))


def test_rotation_matched_update_keeps_the_values_and_forgets_the_directions():
    s = torch.arange(30, 0, -1, dtype=torch.float64)
    got = rotation_matched_update(s, 40, 30, 0)
    torch.testing.assert_close(torch.linalg.svdvals(got), s)
    d0 = decompose(torch.randn(40, 30), 10)
    energies = [projection_energy(rotation_matched_update(s, 40, 30, seed), d0, 10) for seed in range(60)]
    assert sum(energies) / 60 == pytest.approx(10 * 10 / (40 * 30), rel=0.1)  # Haar: k^2 / (m n)
    with pytest.raises(ConfigError, match="30 singular values"):
        rotation_matched_update(s, 40, 29, 0)


def test_haar_vectors_have_no_preferred_sign():
    first = [rotation_matched_update(torch.ones(1).double(), 1, 1, seed).item() for seed in range(200)]
    assert abs(sum(first)) < 40


@pytest.mark.parametrize("shape", [(256, 256), (200, 500)])
def test_isotropic_shift_is_that_of_a_random_update_of_the_same_norm(shape):
    w0 = 0.02 * torch.randn(*shape, dtype=torch.float64)
    dw = isotropic_update(*shape, frobenius=1e-5, seed=0).double()
    assert torch.linalg.norm(dw).item() == pytest.approx(1e-5)
    floor = isotropic_shift(1e-5, torch.linalg.norm(w0).item(), *shape)
    assert spectral_shift(w0, w0 + dw) == pytest.approx(floor, rel=0.12)


def test_weight_decay_floor_is_the_shift_of_decay_alone():
    lrs = [1e-5 * step / 10 for step in range(1, 11)] + [1e-5] * 50
    w = torch.randn(20, 30, dtype=torch.float64)
    decayed = w.clone()
    for lr in lrs:
        decayed *= 1 - lr * 0.1
    floor = weight_decay_floor(lrs, 0.1)
    assert floor == pytest.approx(0.1 * sum(lrs), rel=1e-4)
    got = shift_between(singular_values(w), singular_values(decayed))
    assert got.shift == pytest.approx(floor, rel=1e-7)
    assert got.scale == pytest.approx(-floor, rel=1e-7)
    stored = w.bfloat16()
    assert update_sparsity(stored, (1 - floor) * stored.float()) == 1
    with pytest.raises(ConfigError, match="no decay"):
        weight_decay_floor([1.0, -1.0], 0.1)


def test_the_paper_sft_schedule_has_a_decay_floor_of_0_29_percent():
    warm = 537
    lrs = [1e-5 * (t + 1) / warm for t in range(warm)]
    lrs += [1e-6 + 4.5e-6 * (1 + math.cos(math.pi * t / (5375 - warm))) for t in range(5375 - warm)]
    assert 0.1 * sum(lrs) == pytest.approx(2.93e-3, rel=0.005)
    assert weight_decay_floor(lrs, 0.1) == pytest.approx(2.93e-3, rel=0.005)


def test_half_spacing_and_storage_warning():
    w = torch.tensor([[1.0, -1.5, 0.02, 0.0]])
    assert half_spacing(w)[0, :2].tolist() == [2**-8, 2**-8]
    assert half_spacing(w)[0, 2].item() == 2**-14  # 0.02 lies in [2^-6, 2^-5), spacing 2^-13
    w0 = torch.full((30, 30), 0.02)
    fine, coarse = storage(w0, torch.full((30, 30), 2e-4)), storage(w0, torch.full((30, 30), 1e-4))
    assert fine.warning is None
    assert fine.ratio == pytest.approx(2e-4 * 2**14)
    assert "fp32 masters" in (coarse.warning or "")


def test_noise_with_steep_inputs_locks_without_learning():
    n, m = 128, 512
    steep, flat = torch.diag(torch.arange(1, n + 1) ** -1.0), torch.eye(n)
    steps = [20, 40, 60, 80, 100]
    locked, loose = (list(noise_trajectory(c, m, steps, seed=0)) for c in (steep, flat))
    assert growth_exponent(steps, [dw.norm().item() for dw in loose]) == pytest.approx(0.5, abs=0.02)
    assert input_alignment(basis(decompose(locked[-1], 8), 8), steep) > 0.8
    assert subspace_similarity(locked[0], locked[-1], 8) > 0.75 > 0.5 > subspace_similarity(loose[0], loose[-1], 8)
    assert window_similarity(locked[0], locked[-1], 8) > 0.7
    assert window_similarity(locked[0], locked[-1], 8, "left") < 0.2
    assert stable_rank(locked[-1]) == pytest.approx(stable_rank(locked[0]), rel=0.25)


def test_noise_has_the_second_moment_it_was_asked_for():
    root = torch.randn(6, 6, dtype=torch.float64)
    c = root @ root.T
    [dw] = noise_trajectory(c, 20000, [9], seed=0)
    torch.testing.assert_close(dw.T @ dw / 20000 / 9, c, rtol=0, atol=0.03 * c.diagonal().max().item())
    with pytest.raises(ConfigError, match="increase"):
        noise_trajectory(c, 3, [5, 5], 0)
    with pytest.raises(ConfigError, match="n x n"):
        noise_trajectory(root[:4], 3, [5], 0)


def test_density_null_explains_a_random_update_and_not_a_steered_one():
    w0 = (0.02 * torch.randn(200, 200)).bfloat16().float()
    masks = weight_masks(w0, 16, 0.3)
    steered = overlap_with(masks, w0, torch.where(masks.principal, 1.02 * w0, w0))
    draws = [overlap_null(w0, masks, steered.density, seed).principal.overlap for seed in range(5)]
    assert against(steered.principal.overlap, draws).z > 50
    random = overlap_null(w0, masks, steered.density, 99).principal.overlap
    assert abs(against(random, draws).z) < 4
    assert against(3.0, [1.0, 3.0]).ratio == 1.5
    with pytest.raises(ConfigError, match="1 draw"):
        against(1.0, [1.0])
