"""The diagnostics of a weight matrix and its update, against numbers known by hand."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from potstill.errors import ConfigError
from potstill.geometry import (
    chance_similarity,
    changed_mask,
    decompose,
    growth_exponent,
    hill,
    hill_of,
    increments,
    input_alignment,
    isotropic_stable_rank,
    mask_jaccard,
    mask_overlap,
    overlap_with,
    participation_ratio,
    principal_angles,
    projection_energy,
    rotation,
    shift_between,
    similarity,
    similarity_matrix,
    singular_values,
    spectral_shift,
    stable_rank,
    subspace_angles,
    subspace_similarity,
    summarise_product,
    summarise_update,
    update_sparsity,
    weight_masks,
    window_similarity,
)
from potstill.geometry.masks import largest
from potstill.geometry.sparsity import next_bf16

EVERY_CODE = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)


def orthonormal(d: int, k: int) -> Tensor:
    return torch.linalg.qr(torch.randn(d, k, dtype=torch.float64)).Q


# --- sparsity


@pytest.mark.parametrize("eta", [0.0, 1e-3, 3e-3])
def test_every_tolerance_below_two_to_minus_eight_counts_the_same(eta):
    a = EVERY_CODE[torch.isfinite(EVERY_CODE)].view(-1, 2)
    b = a.view(-1)[torch.randint(-1, 2, (a.numel(),)).add(torch.arange(a.numel())).clamp(0, a.numel() - 1)].view(-1, 2)
    by_rule = (b.double() - a.double()).abs() <= eta * torch.maximum(a.double().abs(), b.double().abs())
    assert update_sparsity(a, b) == by_rule.double().mean().item()
    assert torch.equal(changed_mask(a, b), ~by_rule)


def test_sparsity_of_zeros_flips_and_moves_below_half_a_spacing():
    assert update_sparsity(torch.zeros(2, 3), -torch.zeros(2, 3)) == 1
    assert update_sparsity(torch.ones(2, 3), -torch.ones(2, 3)) == 0
    w = torch.randn(50, 60).bfloat16().float()
    assert update_sparsity(w, 1.001 * w) == 1  # half a spacing is 0.195 % or more
    assert update_sparsity(w, 1.004 * w) == 0  # and 0.39 % or less
    assert update_sparsity(w, w + torch.eye(50, 60)) == 1 - 50 / 3000


def test_no_code_that_is_not_a_number_slips_through():
    finite = torch.tensor([0.0, -0.0, 0.02, -0.02, 3.0, -3e38]).bfloat16()
    for bad in EVERY_CODE[~torch.isfinite(EVERY_CODE)]:
        small, among = finite[None, :4], torch.stack([*finite[:5], bad])[None]
        for pair in ((finite[None], among), (small, among[:, 2:]), (bad[None, None], bad[None, None])):
            with pytest.raises(ConfigError, match="has no geometry"):
                update_sparsity(*pair)
            with pytest.raises(ConfigError, match="has no geometry"):
                update_sparsity(*pair[::-1])


def test_sparsity_over_several_chunks_and_of_a_view():
    a = torch.randn(700, 800)
    b = a + 1e-3 * torch.randn(700, 800)
    expected = (a.bfloat16() == b.bfloat16()).double().mean().item()
    assert 0.1 < expected < 0.9
    assert update_sparsity(a, b) == expected == update_sparsity(a.T, b.T)
    assert update_sparsity(torch.nn.Parameter(a).bfloat16(), b) == expected


def test_the_next_bf16_number_is_the_next_code():
    # In numeric order, zero once: neighbours differ by one place.
    numbers = EVERY_CODE[torch.isfinite(EVERY_CODE)].double().unique().bfloat16()[None]
    up, down = next_bf16(numbers, torch.ones_like(numbers)), next_bf16(numbers, -torch.ones_like(numbers))
    assert torch.equal(up[:, :-1], numbers[:, 1:])
    assert torch.equal(down[:, 1:], numbers[:, :-1])
    assert next_bf16(-torch.zeros(1, 1).bfloat16(), torch.ones(1, 1)).item() > 0


def test_jaccard_of_two_runs():
    a = torch.tensor([[True, True, True, False]])
    b = torch.tensor([[True, False, True, False]])
    got = mask_jaccard(a, b)
    assert got.jaccard == 2 / 3
    assert got.chance == pytest.approx(0.375 / (0.75 + 0.5 - 0.375))
    random = mask_jaccard(torch.rand(500, 500) < 0.3, torch.rand(500, 500) < 0.6)
    assert random.jaccard == pytest.approx(random.chance, abs=0.005)
    assert math.isnan(mask_jaccard(a & False, a & False).jaccard)


# --- masks


@given(st.lists(st.integers(-3, 3), min_size=4, max_size=40).filter(lambda x: len(x) % 2 == 0), st.data())
def test_masks_hold_exactly_their_fraction_however_many_ties(values, data):
    x = torch.tensor(values, dtype=torch.float32).view(2, -1)
    count = data.draw(st.integers(0, len(values)))
    mask = largest(x, count)
    assert mask.sum() == count
    if 0 < count < len(values):
        assert x[mask].min() >= x[~mask].max()


def test_overlap_at_its_ends():
    w0 = torch.randn(40, 50).bfloat16().float()
    masks = weight_masks(w0, 8, 0.3)
    everything = overlap_with(masks, w0, 2 * w0)
    assert everything.density == 1
    assert everything.principal.overlap == everything.low.overlap == 0.3 == everything.low.ceiling
    only_low = overlap_with(masks, w0, torch.where(masks.low, 2 * w0, w0))
    assert only_low.low.overlap == only_low.low.recall == only_low.low.energy == only_low.low.ceiling == 1
    assert only_low.low.lift == pytest.approx(1 / 0.3)
    assert only_low.principal_not_low.overlap == 0
    nothing = mask_overlap(w0, w0, 8, 0.3)
    assert math.isnan(nothing.low.overlap)
    assert math.isnan(nothing.low.energy)
    assert nothing.density == nothing.low.recall == 0


def test_overlap_of_random_changes_is_chance():
    w0 = torch.randn(300, 300).bfloat16().float()
    got = mask_overlap(w0, torch.where(torch.rand(300, 300) < 0.4, 2 * w0, w0), 16, 0.3)
    for part in (got.principal, got.low):
        assert part.overlap == pytest.approx(0.3, abs=0.008)
        assert part.lift == pytest.approx(1, abs=0.03)
        assert part.overlap <= part.ceiling == pytest.approx(0.3 / 0.4, abs=0.01)
    both = weight_masks(w0, 16, 0.3)
    assert got.principal_not_low.share == (both.principal & ~both.low).double().mean().item()


def test_the_principal_mask_reduces_the_rank_first():
    strong, spike = torch.outer(torch.ones(20), torch.linspace(1, 2, 20)), torch.zeros(20, 20)
    spike[3, 0] = 4.0  # the largest weight by far, on a direction that rank 1 leaves out
    mask = weight_masks(strong + spike, 1, 0.1).principal
    assert not mask[3, 0]
    assert mask[:, -1].all()


def test_fraction_out_of_range():
    with pytest.raises(ConfigError, match="fraction = 30"):
        mask_overlap(torch.ones(3, 3), torch.ones(3, 3), 1, 30.0)


# --- angles


@pytest.mark.parametrize("degrees", [1e-6, 0.01, 30.0, 89.999])
def test_one_vector_turned_out_of_the_subspace_turns_it_by_that_angle(degrees):
    u, v = orthonormal(40, 40), orthonormal(30, 30)
    s = torch.arange(30, 0, -1, dtype=torch.float64)
    phi, turned = math.radians(degrees), v.clone()
    turned[:, 3] = math.cos(phi) * v[:, 3] + math.sin(phi) * v[:, 20]
    turned[:, 20] = -math.sin(phi) * v[:, 3] + math.cos(phi) * v[:, 20]
    left, right = principal_angles((u[:, :30] * s) @ v.T, (u[:, :30] * s) @ turned.T, 8)
    assert right[-1].item() == pytest.approx(degrees, rel=1e-6)
    assert right[:-1].max() < 1e-9
    assert left.max() < 1e-9


def test_the_same_or_a_rescaled_matrix_does_not_turn():
    w = torch.randn(30, 50)
    for other in (w, 4 * w):
        assert torch.cat(principal_angles(w, other, 10)).max() < 1e-9


def test_small_angles_survive_where_an_arc_cosine_loses_them():
    a, outside = orthonormal(50, 6)[:, :5], None
    outside = torch.linalg.svd(a).U[:, 5:10]
    angles = torch.tensor([1e-9, 1e-6, 1e-3, 1.0, 90.0], dtype=torch.float64)
    b = a * angles.deg2rad().cos() + outside * angles.deg2rad().sin()
    torch.testing.assert_close(subspace_angles(a, b), angles, rtol=1e-5, atol=1e-13)


def test_rotation_keeps_wedins_bound_and_summarises():
    w0 = torch.randn(60, 80, dtype=torch.float64)
    dw = 1e-3 * torch.randn(60, 80, dtype=torch.float64)
    d0, d1 = decompose(w0, 20), decompose(w0 + dw, 20)
    for r in rotation(d0, d1, (4, 20)):
        # Wedin with the gap between W0's s_k and W+'s s_{k+1}, which is at least gap - ||dW||.
        e = torch.linalg.matrix_norm(dw, 2).item()
        bound = math.degrees(math.asin(min(1.0, e / (r.gap - e))))
        left, right = principal_angles(w0, w0 + dw, r.k)
        assert 0 < r.left_median <= r.left_max <= bound
        assert r.left_max == pytest.approx(left[-1].item())
        assert r.right_mean == pytest.approx(right.mean().item())


# --- spectrum


def test_a_shrunk_matrix_has_shifted_by_the_shrinkage():
    w = torch.randn(50, 70, dtype=torch.float64)
    assert spectral_shift(w, (1 - 3e-5) * w) == pytest.approx(3e-5, abs=1e-14)
    got = shift_between(singular_values(w), singular_values((1 - 3e-3) * w))
    assert got.scale == pytest.approx(-3e-3, abs=1e-13)
    assert got.signed == pytest.approx(-3e-3, abs=1e-13)
    assert got.shape < 1e-12


def test_shift_by_hand_and_its_parts():
    got = shift_between(torch.tensor([4.0, 3.0]).double(), torch.tensor([4.0, 4.0]).double())
    assert got.shift == pytest.approx(1 / 5)
    assert got.scale == pytest.approx(3 / 25)
    assert got.shape == pytest.approx(4 / 25)
    assert got.signed == pytest.approx(1 / 7)


def test_shift_by_gram_and_svd_and_mirskys_bound():
    w0 = torch.randn(64, 80, dtype=torch.float64)
    dw = 1e-3 * torch.randn(64, 80, dtype=torch.float64)
    by_svd = shift_between(torch.linalg.svdvals(w0), torch.linalg.svdvals(w0 + dw))
    assert spectral_shift(w0, w0 + dw) == pytest.approx(by_svd.shift, abs=1e-12)
    assert by_svd.shift**2 == pytest.approx(by_svd.scale**2 + by_svd.shape**2)
    assert by_svd.shift < (torch.linalg.norm(dw) / torch.linalg.norm(w0)).item()


# --- shape of the update


def test_stable_rank_and_participation_of_known_spectra():
    one = torch.outer(torch.randn(40), torch.randn(30))
    five = orthonormal(40, 5) @ orthonormal(30, 5).T
    assert stable_rank(one) == pytest.approx(1, abs=1e-6)
    assert participation_ratio(one) == pytest.approx(1, abs=1e-6)
    assert [stable_rank(five), participation_ratio(five)] == pytest.approx([5, 5])
    assert participation_ratio(torch.diag(torch.tensor([2.0, 1.0]))) == pytest.approx(25 / 17)


@pytest.mark.parametrize("shape", [(512, 512), (300, 900)])
def test_stable_rank_of_noise(shape):
    assert stable_rank(torch.randn(*shape)) == pytest.approx(isotropic_stable_rank(*shape), rel=0.03)


def test_hill_of_a_power_law():
    s = torch.arange(1, 1001, dtype=torch.float64) ** (-1 / 2.5)
    assert hill_of(s, 1000) == pytest.approx(2.5, rel=0.01)
    assert hill_of(torch.tensor([4.0, 2.0, 1.0]).double(), 3) == pytest.approx(2 / (3 * math.log(2)))
    assert hill_of(torch.ones(3).double(), 3) == math.inf
    w = torch.diag(s[:100])
    assert hill(w, 50) == pytest.approx(hill_of(s, 50))


def test_hill_is_undefined_beyond_the_rank():
    lora = torch.randn(60, 4) @ torch.randn(4, 50)
    assert hill(lora, 4) > 0
    with pytest.raises(ConfigError, match="rank, which is 4"):
        hill(lora, 5)
    for k in (1, 51):
        with pytest.raises(ConfigError, match=f"k = {k}"):
            hill(lora, k)


def test_a_summary_says_what_the_single_functions_say():
    dw = 1e-4 * torch.randn(200, 150) @ torch.diag(torch.arange(1, 151) ** -0.5)
    got = summarise_update(dw, (4, 8, 200))
    s = torch.linalg.svdvals(dw.double())
    assert got.frobenius == pytest.approx(torch.linalg.norm(dw.double()).item())
    assert got.spectral == pytest.approx(s[0].item())
    assert got.stable_rank == pytest.approx(stable_rank(dw))
    assert got.participation_ratio == pytest.approx(participation_ratio(dw))
    assert got.participation_ratio == pytest.approx((s.square().sum() ** 2 / s.pow(4).sum()).item())
    assert got.energy[8] == pytest.approx((s[:8].square().sum() / s.square().sum()).item())
    assert got.gap_ratio[8] == pytest.approx((s[7] / s[8]).item())
    assert got.hill[8] == pytest.approx(hill(dw, 8))
    assert 200 not in got.energy


def test_a_summary_of_an_adapter_equals_that_of_the_dense_update():
    b, a = torch.randn(50, 6).double(), torch.randn(6, 40).double()
    core, dense = summarise_product(b, a, 2.0), summarise_update(2.0 * b @ a)
    for name in ("frobenius", "spectral", "stable_rank", "participation_ratio"):
        assert getattr(core, name) == pytest.approx(getattr(dense, name))
    assert core.energy == pytest.approx(dense.energy)
    assert core.hill == pytest.approx(dense.hill, nan_ok=True)
    assert core.gap_ratio == pytest.approx(dense.gap_ratio)
    assert math.isnan(core.hill[8])


def test_growth_exponent():
    assert growth_exponent([1, 4, 16], [3.0, 6.0, 12.0]) == pytest.approx(0.5)
    for steps, norms in (([5], [1.0]), ([5, 5], [1.0, 2.0]), ([0, 5], [1.0, 2.0]), ([1, 5], [0.0, 2.0])):
        with pytest.raises(ConfigError, match="growth exponent"):
            growth_exponent(steps, norms)


# --- subspaces over time


def test_similarity_of_same_orthogonal_and_random_subspaces():
    a = orthonormal(64, 32)
    assert similarity(a[:, :16], a[:, :16] @ orthonormal(16, 16)) == pytest.approx(1)
    assert similarity(a[:, :16], a[:, 16:]) == pytest.approx(0, abs=1e-20)
    random = [similarity(orthonormal(64, 16), orthonormal(64, 16)) for _ in range(50)]
    assert sum(random) / 50 == pytest.approx(chance_similarity(16, 64), rel=0.03)


def test_sides_are_input_and_output():
    u, v, other = orthonormal(40, 4), orthonormal(30, 4), orthonormal(30, 4)
    s = torch.tensor([4.0, 3.0, 2.0, 1.0]).double()
    a, b = (u * s) @ v.T, (u * s) @ other.T
    assert subspace_similarity(a, b, 4, "left") == pytest.approx(1)
    assert subspace_similarity(a, b, 4) == pytest.approx(similarity(v, other))


def test_time_by_time_matrix():
    bases = [orthonormal(30, 8) for _ in range(3)]
    got = similarity_matrix(bases, 4)
    torch.testing.assert_close(got, got.T)
    torch.testing.assert_close(got.diagonal(), torch.ones(3).double())
    assert got[0, 2].item() == pytest.approx(similarity(bases[0][:, :4], bases[2][:, :4]))
    with pytest.raises(ConfigError, match="k = 9"):
        similarity_matrix(bases, 9)


def test_windows_do_not_count_a_step_twice():
    first, second = orthonormal(30, 2) @ orthonormal(40, 2).T, orthonormal(30, 2) @ orthonormal(40, 2).T
    updates = [10 * first, 10 * first + second]
    assert subspace_similarity(*updates, 2) > 0.95
    assert window_similarity(*updates, 2) == pytest.approx(subspace_similarity(first, second, 2))
    torch.testing.assert_close(list(increments(updates)), [10 * first, second])
    with pytest.raises(ConfigError, match="zero in every entry"):
        window_similarity(first, first, 2)


def test_energy_in_the_leading_subspace():
    d0 = decompose(torch.diag(torch.arange(10.0, 0, -1)), 4)
    dw = torch.zeros(10, 10)
    dw[0, 0], dw[9, 9], dw[0, 9] = 3.0, 4.0, 5.0
    assert projection_energy(dw, d0, 4) == pytest.approx(9 / 50)
    noise = projection_energy(torch.randn(200, 300), decompose(torch.randn(200, 300), 60), 60)
    assert noise == pytest.approx(60**2 / (200 * 300), rel=0.1)


def test_input_alignment():
    covariance = torch.diag(torch.arange(20.0, 0, -1))
    v = torch.eye(20).double()
    assert input_alignment(v[:, :5], covariance) == pytest.approx(1)
    assert input_alignment(v[:, 3:8], covariance) == pytest.approx(2 / 5)
