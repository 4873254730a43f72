"""The numbers that are reported, against hand computation, enumeration and simulation."""

from itertools import combinations
from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from potstill.metrics import avg_at_k, bootstrap, maj_at_k, paired_bootstrap, pass_at_k, repetition

settings.register_profile("repeatable", derandomize=True, database=None, deadline=None)
settings.load_profile("repeatable")

RIGHT = np.array([[1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]], dtype=bool)
tables = st.tuples(st.integers(1, 4), st.integers(1, 7)).flatmap(lambda shape: arrays(bool, shape))


def test_avg_and_pass_at_k_by_hand() -> None:
    assert avg_at_k(RIGHT).tolist() == [0.5, 0, 1]
    # two of four are right; of the C(4, 2) = 6 pairs one holds none of them
    np.testing.assert_allclose(pass_at_k(RIGHT, 2), [5 / 6, 0, 1])


@given(tables)
def test_pass_at_k_is_the_share_of_all_subsets_that_hold_a_right_answer(correct: np.ndarray) -> None:
    n = correct.shape[1]
    for k in range(1, n + 1):
        expected = [np.mean([any(row[list(chosen)]) for chosen in combinations(range(n), k)]) for row in correct]
        np.testing.assert_allclose(pass_at_k(correct, k), expected, atol=1e-12)


@given(tables)
def test_pass_at_k_begins_with_the_average_ends_with_any_and_never_falls(correct: np.ndarray) -> None:
    by_k = np.array([pass_at_k(correct, k) for k in range(1, correct.shape[1] + 1)])
    np.testing.assert_allclose(by_k[0], avg_at_k(correct), atol=1e-12)
    np.testing.assert_allclose(by_k[-1], correct.any(axis=1), atol=1e-12)
    assert (np.diff(by_k, axis=0) >= -1e-12).all()


def test_pass_at_k_stays_exact_where_binomials_are_astronomical() -> None:
    correct = np.arange(2000)[None] < 3
    expected = float(1 - (comb(1997, 1000) * 10**15 // comb(2000, 1000)) / 10**15)
    np.testing.assert_allclose(pass_at_k(correct, 1000), [expected], rtol=1e-12)


@pytest.mark.parametrize("k", [0, 5])
def test_k_must_be_within_the_answers(k: int) -> None:
    with pytest.raises(ValueError, match=r"there are 4 answers"):
        pass_at_k(RIGHT, k)
    with pytest.raises(ValueError, match=r"there are 4 answers"):
        maj_at_k([["a"] * 4] * 3, k, RIGHT)


def test_pass_at_k_refuses_partial_credit() -> None:
    with pytest.raises(ValueError, match="round them"):
        pass_at_k(np.array([[0.5, 1.0]]), 1)


@pytest.mark.parametrize(
    ("answers", "correct", "k", "expected"),
    [
        (["7", "7", "3"], [1, 1, 0], 3, 1.0),
        (["7", "3", "3"], [1, 0, 0], 3, 0.0),
        (["7", "3"], [1, 0], 2, 0.5),  # a tie: each wins half the time
        (["7", "3", "5", "5"], [1, 0, 0, 0], 2, 0.5),  # only the first k vote
        ([None, None, "7"], [0, 0, 1], 3, 1.0),  # no answer never wins against an answer
        ([None, None], [0, 0], 2, 0.0),
        (["a", "a"], [1, 0], 2, 0.5),  # the verifier disagrees with itself
    ],
)
def test_maj_at_k_by_hand(answers: list[str | None], correct: list[int], k: int, expected: float) -> None:
    assert maj_at_k([answers], k, np.array([correct])).tolist() == [expected]


@given(st.lists(st.sampled_from(["1", "2", "3", None]), min_size=1, max_size=8))
def test_the_majority_of_one_is_the_first_answer(answers: list[str | None]) -> None:
    correct = np.array([[answer == "2" for answer in answers]])
    assert maj_at_k([answers], 1, correct)[0] == correct[0, 0]


def test_maj_at_k_refuses_scores_of_another_shape() -> None:
    with pytest.raises(ValueError, match="differ in shape"):
        maj_at_k([["a"], ["a", "b"]], 1, np.ones((2, 1)))


def test_bootstrap_matches_the_binomial() -> None:
    """For Q scores of 0 and 1 the resampled sum is Binomial(Q, p), whose quantiles are known: 0.5 +- 0.10 here."""
    interval = bootstrap(np.arange(100) % 2)
    assert interval.value == 0.5
    np.testing.assert_allclose([interval.low, interval.high], [0.40, 0.60], atol=0.011)


def test_bootstrap_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    samples = rng.random((400, 100)) < 0.3
    intervals = [bootstrap(sample, level=0.9, resamples=500, seed=number) for number, sample in enumerate(samples)]
    coverage = np.mean([interval.low <= 0.3 <= interval.high for interval in intervals])
    assert abs(coverage - 0.9) < 0.05  # the standard error of 400 trials is 0.015


def test_bootstrap_resamples_questions_not_answers() -> None:
    """Eight equal answers to a question tell no more than one."""
    scores = np.arange(40) % 2
    assert bootstrap(np.repeat(scores[:, None], 8, axis=1)) == bootstrap(scores)


@given(arrays(np.float64, st.integers(1, 30), elements=st.floats(0, 1)), st.sampled_from([0.5, 0.95]))
def test_an_interval_holds_its_value_and_is_repeatable(scores: np.ndarray, level: float) -> None:
    interval = bootstrap(scores, level=level, resamples=200)
    assert interval.low <= interval.value <= interval.high
    assert interval == bootstrap(scores, level=level, resamples=200)
    assert interval.low >= 0
    assert interval.high <= 1 + 1e-12


def test_bootstrap_takes_any_statistic_and_any_number_of_questions() -> None:
    assert bootstrap(np.array([0.0, 0.0, 1.0]), statistic=np.median).value == 0
    assert bootstrap(np.ones(7)) == (1, 1, 1)
    rng = np.random.default_rng(1)
    large = bootstrap(rng.random(20_000) < 0.5, resamples=1000)  # several slices
    assert 0.012 < large.high - large.low < 0.016  # 2 * 1.96 * sqrt(0.25 / 20000) = 0.0139


@pytest.mark.parametrize(("scores", "level"), [([], 0.95), ([np.nan], 0.95), ([1.0], 95.0)])
def test_bootstrap_refuses_what_has_no_interval(scores: list[float], level: float) -> None:
    with pytest.raises(ValueError, match=r"no interval|no level"):
        bootstrap(np.array(scores), level=level)


def test_pairing_removes_what_is_common_to_both() -> None:
    hard = np.random.default_rng(0).random(200)
    paired = paired_bootstrap(hard, hard + 0.1)
    np.testing.assert_allclose(paired, [0.1, 0.1, 0.1])
    assert bootstrap(hard).high - bootstrap(hard).low > 0.05
    assert paired_bootstrap(np.array([1.0, 0, 0]), np.array([1.0, 1, 0])).value == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="same questions"):
        paired_bootstrap(np.ones(3), np.ones(2))


def test_repetition_by_hand() -> None:
    assert repetition([1, 2, 3]) == 0  # too short
    assert repetition([1, 2, 3, 4, 5]) == 0
    assert repetition([1, 2, 1, 2, 1, 2, 1, 2]) == 1 - 2 / 5  # 1212 2121 1212 2121 1212
    assert repetition("so so so so so") == 1 / 2
    assert repetition([0] * 1000) == 1 - 1 / 997
