"""Divergences of next-token distributions: hand-computed values, identities, limits, and zero probabilities."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from potstill.divergence import entropy, forward_kl, jsd, likeliest, overlap, reverse_kl, with_rest

V = 4
BETAS = [0.0, 0.1, 0.5, 0.9, 1.0]
ALL: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "forward": forward_kl,
    "reverse": reverse_kl,
    **{f"jsd {b}": (lambda s, t, b=b: jsd(s, t, b)) for b in BETAS},
}
EVERY = pytest.mark.parametrize("divergence", ALL.values(), ids=ALL.keys())
logits = st.lists(st.floats(-4, 4), min_size=V, max_size=V).map(lambda x: torch.tensor(x, dtype=torch.float64))


def distribution(*p: float) -> Tensor:
    return torch.tensor(p, dtype=torch.float64).log()


def test_by_hand() -> None:
    s, t = distribution(0.5, 0.5), distribution(0.25, 0.75)
    assert forward_kl(s, t).item() == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5))
    assert reverse_kl(s, t).item() == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    # beta = 0.2 weighs the teacher: m = 0.2 (1/4, 3/4) + 0.8 (1/2, 1/2) = (0.45, 0.55)
    teachers = 0.25 * math.log(0.25 / 0.45) + 0.75 * math.log(0.75 / 0.55)
    students = 0.5 * math.log(0.5 / 0.45) + 0.5 * math.log(0.5 / 0.55)
    assert jsd(s, t, 0.2).item() == pytest.approx(0.2 * teachers + 0.8 * students)


@given(logits, logits, st.floats(0, 1))
def test_no_divergence_is_negative_and_jsd_is_bounded(s: Tensor, t: Tensor, beta: float) -> None:
    for d in ALL.values():
        assert d(s, t) >= -1e-12
    bound = (
        0.0 if beta in (0, 1) else -beta * math.log(beta) - (1 - beta) * math.log1p(-beta)
    )  # entropy of the mixing coin
    assert beta in (0, 1) or -1e-12 <= jsd(s, t, beta) <= bound + 1e-12


@given(logits, st.floats(-50, 50))
def test_a_distribution_is_at_distance_zero_from_itself_however_its_logits_are_shifted(s: Tensor, by: float) -> None:
    for d in ALL.values():
        here = s.clone().requires_grad_()
        value = d(here, s + by)
        assert abs(value.item()) < 1e-12
        assert torch.autograd.grad(value, here)[0].abs().max() < 1e-12


@given(logits, logits, st.floats(-50, 50), st.floats(-50, 50))
def test_constants_added_to_logits_change_nothing(s: Tensor, t: Tensor, a: float, b: float) -> None:
    for d in ALL.values():
        torch.testing.assert_close(d(s + a, t + b), d(s, t), atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(entropy(s + a), entropy(s), atol=1e-10, rtol=1e-10)


@given(logits, logits, st.floats(0.01, 0.99))
def test_swapping_the_two_swaps_their_weights(s: Tensor, t: Tensor, beta: float) -> None:
    torch.testing.assert_close(jsd(s, t, beta), jsd(t, s, 1 - beta))
    torch.testing.assert_close(jsd(s, t, 0.5), jsd(t, s, 0.5))
    torch.testing.assert_close(forward_kl(s, t), reverse_kl(t, s))


@given(logits, logits)
def test_limits_in_beta(s: Tensor, t: Tensor) -> None:
    small = 1e-7
    torch.testing.assert_close(jsd(s, t, small) / small, forward_kl(s, t), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(jsd(s, t, 1 - small) / small, reverse_kl(s, t), atol=1e-3, rtol=1e-3)
    assert torch.equal(jsd(s, t, 0.0), forward_kl(s, t))
    assert torch.equal(jsd(s, t, 1.0), reverse_kl(s, t))


@pytest.mark.parametrize("beta", [-0.1, 1.1, math.nan])
def test_beta_is_a_weight(beta: float) -> None:
    with pytest.raises(ValueError, match=r"beta must lie in \[0, 1\]"):
        jsd(torch.zeros(2), torch.zeros(2), beta)


@EVERY
@pytest.mark.parametrize(
    ("s", "t"),
    [
        ((0.5, 0.5, 0.0), (0.2, 0.8, 0.0)),  # a token that neither can write
        ((0.5, 0.5, 0.0), (0.5, 0.5, 0.0)),
        ((0.5, 0.3, 0.2), (0.2, 0.8, 0.0)),  # one that only the student can
        ((0.5, 0.5, 0.0), (0.2, 0.3, 0.5)),  # one that only the teacher can
        ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0)),
    ],
)
def test_tokens_of_probability_zero_give_no_nan(
    divergence: Callable[[Tensor, Tensor], Tensor], s: tuple, t: tuple
) -> None:
    here = distribution(*s).requires_grad_()
    value = divergence(here, distribution(*t))
    assert not value.isnan()
    if value.isfinite():
        assert torch.autograd.grad(value, here)[0].isfinite().all()


def test_zero_probabilities_by_hand() -> None:
    s, t = distribution(0.5, 0.5, 0.0), distribution(0.2, 0.8, 0.0)
    assert forward_kl(s, t).item() == pytest.approx(0.2 * math.log(0.4) + 0.8 * math.log(1.6))
    apart = distribution(1.0, 0.0), distribution(0.0, 1.0)
    assert jsd(*apart, 0.5).item() == pytest.approx(math.log(2))
    assert reverse_kl(*apart) == forward_kl(*apart) == math.inf


@EVERY
def test_gradients_are_those_of_finite_differences(divergence: Callable[[Tensor, Tensor], Tensor]) -> None:
    s, t = (torch.randn(2, 3, V, dtype=torch.float64) for _ in range(2))
    assert torch.autograd.gradcheck(lambda x: divergence(x, t), s.requires_grad_())
    assert divergence(s, t).shape == (2, 3)


def test_entropy_by_hand() -> None:
    assert entropy(torch.zeros(8)).item() == pytest.approx(math.log(8))
    assert entropy(distribution(0.5, 0.25, 0.25)).item() == pytest.approx(1.5 * math.log(2))
    certain = distribution(1.0, 0.0).requires_grad_()
    assert entropy(certain).item() == 0


@given(logits, st.integers(1, V))
def test_the_rest_makes_a_distribution_and_never_adds_divergence(s: Tensor, k: int) -> None:
    t = s.flip(0) * 0.5
    p, q = s.log_softmax(-1)[:k], t.log_softmax(-1)[:k]
    assert with_rest(p).shape == (k + 1,)
    assert with_rest(p).exp().sum().item() == pytest.approx(1)
    for d in ALL.values():  # putting tokens together cannot make two distributions easier to tell apart
        assert -1e-9 <= d(with_rest(p), with_rest(q)) <= d(s, t) + 1e-9
    if k == V - 1:
        torch.testing.assert_close(with_rest(p), s.log_softmax(-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_rest_of_everything_is_nothing_and_its_gradient_a_number(dtype: torch.dtype) -> None:
    p = torch.randn(V, dtype=dtype).log_softmax(-1).requires_grad_()
    rest = with_rest(p)
    assert rest[-1] < math.log(1e-5)
    assert rest.isfinite().all()
    assert torch.autograd.grad(forward_kl(rest, rest.detach().flip(0)), p)[0].isfinite().all()


@pytest.mark.parametrize("vocab", [5, 2_000, 4_096, 5_003, 32_000])
def test_the_likeliest_are_those_of_the_whole_vocabulary(vocab: int) -> None:
    logp = (3 * torch.randn(2, 7, vocab, generator=torch.Generator().manual_seed(vocab))).log_softmax(-1)
    logp[..., : vocab // 5] = -math.inf
    for k in (1, 3, 16)[: 1 + vocab // 1000]:
        assert torch.equal(likeliest(logp, k), logp.topk(k, -1).indices)


def test_overlap_by_hand() -> None:
    s = torch.tensor([0.4, 0.3, 0.1, 0.1, 0.05, 0.03, 0.01, 0.01], dtype=torch.float64)
    t = torch.tensor([0.3, 0.05, 0.4, 0.1, 0.1, 0.03, 0.01, 0.01], dtype=torch.float64)
    seen = overlap(s.log()[None], t.log()[None])  # k = 8 / 4: {0, 1} and {2, 0}
    assert seen["overlap"].item() == 0.5
    assert seen["overlap/student"].item() == pytest.approx(0.4)
    assert seen["overlap/teacher"].item() == pytest.approx(0.3)
    gap = (t * t.log()).sum() - (s * s.log()).sum()
    assert seen["entropy_gap"].item() == pytest.approx(abs(gap.item()))
    same = overlap(s.log()[None], s.log()[None], k=1)
    assert [v.item() for v in same.values()] == pytest.approx([1, 0.4, 0.4, 0])
