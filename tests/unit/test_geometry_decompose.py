"""The three routes to singular triplets agree, also across a narrow gap, and say no where there is nothing to find."""

import pytest
import torch
from torch import Tensor

from potstill.errors import ConfigError
from potstill.geometry import (
    decompose,
    decompose_product,
    gram,
    mask_overlap,
    principal_angles,
    similarity,
    singular_values,
    spectral_shift,
    stable_rank,
    subspace_similarity,
    update_sparsity,
)


def with_values(s: Tensor, m: int, n: int) -> Tensor:
    """A matrix with these singular values and random directions."""
    u, v = (torch.linalg.qr(torch.randn(d, len(s), dtype=torch.float64)).Q for d in (m, n))
    return (u * s) @ v.T


def narrow_gap(m: int, n: int) -> Tensor:
    """s_16 / s_17 = 1.02 inside an otherwise slow decay."""
    s = torch.arange(1, min(m, n) + 1, dtype=torch.float64) ** -0.3
    s[16:] *= s[15] / s[16] / 1.02
    return with_values(s, m, n)


@pytest.mark.parametrize("route", ["gram", "lanczos"])
@pytest.mark.parametrize("shape", [(300, 300), (300, 420), (420, 300)])
def test_routes_agree_with_the_full_svd(route, shape):
    w = narrow_gap(*shape)
    expected, got = decompose(w, 16, "svd"), decompose(w, 16, route)
    assert expected.gap_ratio(16) == pytest.approx(1.02, rel=1e-9)
    torch.testing.assert_close(got.s[:17], expected.s[:17], rtol=1e-10, atol=0)
    assert similarity(got.v, expected.v) > 0.9999
    assert similarity(got.u, expected.u) > 0.9999
    torch.testing.assert_close(w @ got.v, got.u * got.s[:16], rtol=0, atol=1e-7)
    torch.testing.assert_close(got.u.T @ got.u, torch.eye(16, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(got.v.T @ got.v, torch.eye(16, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("route", ["gram", "lanczos"])
def test_small_values_keep_their_accuracy(route):
    s = 10.0 ** -torch.linspace(0, 6, 40, dtype=torch.float64)
    got = decompose(with_values(s, 200, 250), 30, route).s[:20]
    torch.testing.assert_close(got, s[:20], rtol=1e-10, atol=0)


@pytest.mark.parametrize("route", ["svd", "gram", "lanczos"])
def test_a_low_rank_update_has_no_directions_beyond_its_rank(route):
    w = torch.randn(120, 5, dtype=torch.float64) @ torch.randn(5, 90, dtype=torch.float64)
    d = decompose(w, 16, route)
    assert (d.s > d.tolerance).sum() == 5
    assert d.v.T @ d.v == pytest.approx(torch.eye(16).numpy(), abs=1e-10)
    d.defined(5, "this")
    with pytest.raises(ConfigError, match="rank, which is 5"):
        d.defined(6, "this")


@pytest.mark.parametrize("route", ["gram", "lanczos"])
@pytest.mark.parametrize("m", [1, 2, 5, 17])
def test_tiny_matrices_and_all_of_their_vectors(route, m):
    w = torch.randn(m, 9, dtype=torch.float64)
    d = decompose(w, min(m, 9), route)
    torch.testing.assert_close((d.u * d.s) @ d.v.T, w)
    assert d.next(min(m, 9)) == 0


def test_lanczos_is_repeatable_and_takes_a_gram_matrix():
    w = torch.randn(200, 260)
    once, again, from_gram = decompose(w, 8), decompose(w, 8), decompose(w, 8, gram_matrix=gram(w))
    assert torch.equal(once.v, again.v)
    torch.testing.assert_close(from_gram.s, once.s, rtol=1e-10, atol=0)


@pytest.mark.parametrize("shape", [(700, 600), (600, 700)])
def test_gram_is_the_product_of_the_smaller_side(shape):
    w = torch.randn(*shape, dtype=torch.float64)
    torch.testing.assert_close(gram(w), w.T @ w if shape[0] > shape[1] else w @ w.T)


def test_all_singular_values_equal_those_of_the_svd():
    w = torch.randn(200, 300)
    torch.testing.assert_close(singular_values(w), torch.linalg.svdvals(w.double()), rtol=1e-10, atol=0)


def test_a_lora_core_equals_the_dense_route():
    b, a = torch.randn(60, 4), torch.randn(4, 80)
    core, dense = decompose_product(b, a, 0.5), decompose(0.5 * b.double() @ a.double(), 4)
    torch.testing.assert_close(core.s[:4], dense.s[:4], rtol=1e-10, atol=0)
    assert similarity(core.v, dense.v) == pytest.approx(1)
    assert similarity(core.u, dense.u) == pytest.approx(1)
    assert len(core.s) == 60
    with pytest.raises(ConfigError, match=r"\[60, 4\] and A \[5, 80\]"):
        decompose_product(b, torch.randn(5, 80))


TWO = [
    update_sparsity,
    spectral_shift,
    lambda a, b: principal_angles(a, b, 2),
    lambda a, b: mask_overlap(a, b, 2, 0.3),
    lambda a, b: subspace_similarity(a, b, 2),
]


@pytest.mark.parametrize("measure", TWO)
def test_bad_matrices_get_a_clear_message(measure):
    w, broken = torch.randn(6, 5), torch.randn(6, 5)
    broken[2, 3] = float("nan")
    with pytest.raises(ConfigError, match=r"\[6, 5\] and \[5, 6\] have no difference"):
        measure(w, w.T)
    with pytest.raises(ConfigError, match=r"\[30\] is not a weight matrix"):
        measure(w.view(-1), w.view(-1))
    with pytest.raises(ConfigError, match="with 1 nan or infinite"):
        measure(w, broken)
    with pytest.raises(ConfigError, match="with 30 nan or infinite"):
        measure(torch.full((6, 5), -float("inf")), w)
    with pytest.raises(ConfigError, match=r"torch.int8 cannot be compared"):
        measure(w.to(torch.int8), w.to(torch.int8))


def test_k_beyond_the_matrix_or_its_rank():
    w = torch.randn(6, 5)
    with pytest.raises(ConfigError, match=r"k = 6 must lie in 1 .. 5"):
        decompose(w, 6)
    with pytest.raises(ConfigError, match=r"k = 5 must lie in 1 .. 4"):
        principal_angles(w, w, 5)
    with pytest.raises(ConfigError, match="rank, which is 1"):
        subspace_similarity(torch.ones(6, 5), w, 2)
    with pytest.raises(ConfigError, match="zero in every entry"):
        subspace_similarity(torch.zeros(6, 5), w, 2)
    with pytest.raises(ConfigError, match="zero in every entry"):
        stable_rank(torch.zeros(6, 5))
    with pytest.raises(ConfigError, match="zero in every entry"):
        spectral_shift(torch.zeros(6, 5), w)
