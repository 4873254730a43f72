"""Which tokens are audited, and what an audit is worth (OmniOPD Eq. 4, 5 and 7)."""

import itertools
import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.tabular import PROMPT

from potstill.chunks import Chunk, chunk_prior, chunk_target, plan_chunks, select_chunks
from potstill.methods.omniopd import OmniOPD
from potstill.types import Rollout

entropies = st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.5]), max_size=40)
counts, lengths = st.integers(1, 8), st.integers(1, 9)
schedulers, overlaps = (
    st.sampled_from(["peak_entropy", "uniform", "random"]),
    st.sampled_from(["skip", "merge", "resample"]),
)


def floats(values: list[int]) -> list[float]:
    return [float(v) for v in values]


@pytest.mark.parametrize(
    ("entropy", "count", "length", "anchors"),
    [
        ([0, 9, 8, 0, 7, 0, 9], 3, 2, [1, 4]),  # 2 overlaps the chunk at 1; 6 does not fit
        ([5, 1, 4, 1, 3, 1], 2, 2, [0, 2]),
        ([5, 1, 4, 1, 3, 1], 9, 2, [0, 2, 4]),
        ([1, 1, 1, 1, 1], 2, 2, [0, 2]),  # of equals the earlier
        ([0, 3, 0, 3, 0], 1, 1, [1]),
        ([0, 0, 9, 0, 0], 2, 3, [2]),  # the best one leaves no room for another
        ([1, 2], 3, 2, [0]),
        ([1], 3, 2, []),
        ([], 3, 1, []),
    ],
)
def test_peaks_by_hand(entropy: list[int], count: int, length: int, anchors: list[int]) -> None:
    assert select_chunks(floats(entropy), count, length) == anchors


@given(entropies, counts, lengths, schedulers, overlaps, st.integers(0, 5))
def test_chunks_are_ascending_disjoint_and_inside_the_response(
    entropy: list[float], count: int, length: int, scheduler: str, overlap: str, seed: int
) -> None:
    plan = plan_chunks(entropy, count, length, scheduler=scheduler, overlap=overlap, seed=seed)  # type: ignore[arg-type]
    assert all(a.start + a.length <= b.start for a, b in itertools.pairwise(plan))
    assert all(chunk.start >= 0 and chunk.start + chunk.length <= len(entropy) for chunk in plan)
    assert len(plan) <= count
    assert bool(plan) == (len(entropy) >= length)
    if overlap == "merge":
        assert all(chunk.length >= length for chunk in plan)
    else:
        assert all(chunk.length == length for chunk in plan)


@given(entropies, counts, lengths)
def test_no_better_anchor_was_left_out(entropy: list[float], count: int, length: int) -> None:
    """Every position that fits and was not taken overlaps a chunk that ranks before it, or all chunks rank before it."""
    anchors = select_chunks(entropy, count, length)

    def rank(t: int) -> tuple[float, int]:
        return -entropy[t], t

    for t in set(range(len(entropy) - length + 1)) - set(anchors):
        before = [a for a in anchors if rank(a) < rank(t)]
        assert len(before) == count or any(abs(a - t) < length for a in before)


def test_merge_joins_chunks_that_overlap() -> None:
    entropy = floats([0, 9, 8, 0, 0, 0, 7, 0])
    assert plan_chunks(entropy, 3, 2, overlap="merge") == [Chunk(1, 3), Chunk(6, 2)]
    assert plan_chunks(floats([9, 8, 7, 6, 0]), 4, 2, overlap="merge") == [Chunk(0, 5)]
    assert plan_chunks(floats([9, 0, 8, 0]), 2, 2, overlap="merge") == [
        Chunk(0, 2),
        Chunk(2, 2),
    ]  # side by side is not overlapping


def test_resample_keeps_the_peaks_and_draws_the_others() -> None:
    entropy = [0.0, 9.0, 8.0, *[0.0] * 40]
    plans = [plan_chunks(entropy, 2, 2, overlap="resample", seed=s) for s in range(50)]
    assert all(len(plan) == 2 and Chunk(1, 2) in plan for plan in plans)
    others = {chunk.start for plan in plans for chunk in plan} - {1}
    assert len(others) > 15
    assert not others & {0, 2}
    assert plans == [plan_chunks(entropy, 2, 2, overlap="resample", seed=s) for s in range(50)]


def test_uniform_spreads_from_the_first_to_the_last_position_that_fits() -> None:
    zeros = [0.0] * 12
    assert [c.start for c in plan_chunks(zeros, 3, 2, scheduler="uniform")] == [0, 5, 10]
    assert [c.start for c in plan_chunks(zeros, 1, 2, scheduler="uniform")] == [0]
    assert [c.start for c in plan_chunks(zeros, 6, 2, scheduler="uniform")] == [0, 2, 4, 6, 8, 10]


def test_random_treats_all_positions_alike() -> None:
    hits = Counter(plan_chunks([9.0, *[0.0] * 9], 1, 1, scheduler="random", seed=s)[0].start for s in range(2000))
    assert set(hits) == set(range(10))
    assert sum((n - 200) ** 2 / 200 for n in hits.values()) < 27.9  # 0.1 % point at nine degrees of freedom


def test_a_chunk_begins_with_the_uncertain_token() -> None:
    """The off-by-one of this method: entropy[t] belongs to the distribution that produced token t."""
    r = Rollout(
        prompt=PROMPT,
        sample=0,
        prompt_ids=(0,),
        response_ids=(1, 2, 3, 4),
        pieces=("w", "x", "y", "z"),
        old_logp=(-0.1,) * 4,
        entropy=(0.1, 0.1, 3.0, 0.1),
        finish="stop",
    )
    [ask] = OmniOPD(chunks=1, chunk_length=2, continuations=1).asks(r)
    assert (r.text(0, ask.start), r.text(ask.start, ask.length)) == ("wx", "yz")


def test_prior_by_hand() -> None:
    assert chunk_prior([-1.0, -3.0]) == pytest.approx(math.exp(-2))
    assert chunk_prior([math.log(0.2), math.log(0.8)]) == pytest.approx(0.4)  # the geometric mean
    assert chunk_prior([0.0] * 50) == 1


def test_target_by_hand() -> None:
    assert chunk_target(k_sem=7.5, pi_bar=0.5, n=10, alpha=1.0) == pytest.approx(8 / 11)
    assert chunk_target(k_sem=0.0, pi_bar=0.3, n=4, alpha=2.0) == pytest.approx(0.1)
    assert chunk_target(k_sem=3.0, pi_bar=0.9, n=4, alpha=0.0) == 0.75


@given(st.integers(1, 20), st.floats(0, 1), st.floats(0, 1), st.floats(0, 10))
def test_target_lies_between_agreement_and_prior(n: int, share: float, pi_bar: float, alpha: float) -> None:
    target = chunk_target(share * n, pi_bar, n, alpha)
    assert min(share, pi_bar) - 1e-9 <= target <= max(share, pi_bar) + 1e-9
    assert 0 <= target <= 1
    assert chunk_target(share * n, pi_bar, n, 1e12) == pytest.approx(pi_bar, abs=1e-6)
    assert target == pytest.approx(n / (n + alpha) * share + alpha / (n + alpha) * pi_bar)  # the paper's Eq. 10


@pytest.mark.parametrize(
    "arguments",
    [
        (1.0, 0.5, 0, 1.0),
        (-0.1, 0.5, 2, 1.0),
        (2.1, 0.5, 2, 1.0),
        (1.0, 1.1, 2, 1.0),
        (1.0, -0.1, 2, 1.0),
        (1.0, 0.5, 2, -1.0),
    ],
)
def test_impossible_arguments_are_refused(arguments: tuple[float, float, int, float]) -> None:
    with pytest.raises(ValueError, match=r"k_sem|alpha"):
        chunk_target(*arguments)
    with pytest.raises(ValueError, match="k_sem"):
        chunk_target(math.nan, 0.5, 2, 1.0)
