"""Credit functions against numbers worked out by hand, and their properties."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from potstill.credit import agrees, discounted, extrapolated, group_advantage, k3, outcome, sign_gate

exactly = settings(derandomize=True, database=None)
rewards = st.lists(st.one_of(st.none(), st.floats(0, 1, width=16)), min_size=1, max_size=8)
numbers = st.lists(st.floats(-8, 8, width=16), min_size=1, max_size=8)


def test_group_advantage_by_hand():
    # mean 1/4, sample variance (9/16 + 3/16) / 3 = 1/4, std 1/2
    assert group_advantage([1, 0, 0, 0]).tolist() == pytest.approx([1.5, -0.5, -0.5, -0.5], abs=1e-5)
    assert group_advantage([1, 0, 0, 0], std=False).tolist() == [0.75, -0.25, -0.25, -0.25]
    assert group_advantage(torch.tensor([1.0, 0.0])).tolist() == pytest.approx(
        [math.sqrt(0.5), -math.sqrt(0.5)], abs=1e-5
    )


@pytest.mark.parametrize("score", [0.0, 1.0, 0.1, 1 / 3])
@pytest.mark.parametrize("std", [True, False])
def test_equal_rewards_are_worth_exactly_nothing(score, std):
    """The mean of three times 0.1 is not 0.1, and what is left would be divided by almost nothing."""
    assert group_advantage([score] * 3, std=std).tolist() == [0, 0, 0]


def test_an_answer_without_a_verdict_is_no_part_of_the_statistics():
    assert group_advantage([1, None, 0], std=False).tolist() == [0.5, 0, -0.5]
    assert group_advantage([None, 1.0]).tolist() == [0, 0]
    assert outcome([1, None, 0, 0.75]).tolist() == [1, 0, -1, 0.5]


@exactly
@given(rewards)
def test_advantages_cancel_and_follow_the_rewards(scores):
    worth = group_advantage(scores)
    assert worth.sum().abs() < 1e-4
    pairs = [(r, a) for r, a in zip(scores, worth.tolist(), strict=True) if r is not None]
    assert [a for _, a in sorted(pairs)] == sorted(a for _, a in pairs)


@pytest.mark.parametrize(
    ("advantage", "d", "c"),
    [
        (1, 2, 1.8),
        (1, -2, 0.5),
        (-1, -2, 1.8),
        (-1, 2, 0.5),
        (0, 2, 0.5),
        (1, 0, 0.5),
        (1e-30, 1e-30, 1.8),
        (-1, -1e-40, 1.8),
    ],
)
def test_the_truth_table_of_the_gate(advantage, d, c):
    assert sign_gate(advantage, torch.tensor([d], dtype=torch.float64), 1.8, 0.5).tolist() == [c]


def test_a_small_d_is_no_agreement():
    assert agrees(1.0, torch.tensor([0.05, 0.2, -0.2]), margin=0.1).tolist() == [0, 1, 0]


@exactly
@given(numbers, st.floats(-1, 1, width=16))
def test_turning_the_verdict_swaps_the_branch_of_every_token_with_a_signal(values, a):
    d = torch.tensor(values)
    one, other = agrees(a, d), agrees(-a, d)
    assert ((one + other) == ((d != 0) & (a != 0))).all()


@exactly
@given(numbers, numbers)
def test_extrapolation_by_one_is_the_signal_itself_to_the_bit(values, gaps):
    n = min(len(values), len(gaps))
    d, gap = torch.tensor(values[:n]), torch.tensor(gaps[:n])
    assert torch.equal(extrapolated(d, gap, torch.ones(n)), d)
    torch.testing.assert_close(extrapolated(d, gap, torch.full((n,), 1.8)), d + 0.8 * gap)


def test_discounted_by_hand():
    assert discounted(torch.tensor([1.0, 2.0, 4.0]), 0.5).tolist() == [3, 4, 4]


@exactly
@given(st.lists(st.floats(0.01, 1), min_size=2, max_size=5), st.lists(st.floats(0.01, 1), min_size=2, max_size=5))
def test_k3_estimates_the_divergence_without_bias(first, second):
    n = min(len(first), len(second))
    q = torch.tensor(first[:n], dtype=torch.float64)
    p = torch.tensor(second[:n], dtype=torch.float64)
    q, p = q / q.sum(), p / p.sum()
    estimate = k3((p / q).log())
    assert (estimate >= 0).all()
    torch.testing.assert_close((q * estimate).sum(), (q * (q / p).log()).sum(), atol=1e-9, rtol=1e-9)
