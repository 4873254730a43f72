"""Which tokens are left to learn."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from potstill.select import select
from potstill.types import Ask, Feedback, Prompt, Reviewed, Rollout, Target, Wants


def target(
    entropy: list[float], teacher: list[float] | None = None, weight: list[float] | None = None, seed: int = 0
) -> Target:
    n = len(entropy)
    r = Rollout(
        prompt=Prompt(id="p", messages=()),
        sample=0,
        prompt_ids=(0,),
        response_ids=(1,) * n,
        pieces=("x",) * n,
        old_logp=(-1.0,) * n,
        entropy=tuple(entropy),
        finish="stop",
        seed=seed,
    )
    ask = Ask(rollout=r, view=r.prompt, wants=Wants.SAMPLED)
    said = () if teacher is None else (Feedback(ask=ask, teacher="t", sampled=torch.tensor(teacher).numpy()),)
    return Target(source=Reviewed(rollout=r, feedback=said), weight=torch.tensor(weight or [1.0] * n))


def kept(targets: list[Target], by: str, keep: float) -> list[list[float]]:
    return [t.weight.tolist() for t in select(targets, by, keep)]  # type: ignore[arg-type]


def test_the_most_uncertain_tokens_of_the_whole_batch():
    a, b = target([0.1, 0.9, 0.2]), target([0.8, 0.3, 0.0, 0.7])
    assert kept([a, b], "entropy", 0.5) == [[0, 1, 0], [1, 0, 0, 1]]  # 3 of 7


def test_a_token_without_weight_is_not_chosen_and_does_not_count():
    assert kept([target([0.9, 0.1, 0.2, 0.3], weight=[0.0, 1.0, 0.5, 2.0])], "entropy", 0.7) == [[0, 0, 0.5, 2]]


def test_the_tokens_teacher_and_student_differ_most_about():
    # k3 of d = -1, 1, 0, -3: .37, .72, 0, 2.05
    assert kept([target([0.0] * 4, [-2.0, 0.0, -1.0, -4.0])], "divergence", 0.5) == [[0, 1, 0, 1]]


def test_the_tokens_the_student_is_too_sure_of():
    assert kept([target([0.0] * 4, [-2.0, 0.0, -1.0, -4.0])], "gap", 0.5) == [[1, 0, 0, 1]]  # -d = 1, -1, 0, 3


def test_every_answer_keeps_its_share():
    a, b = target([0.1, 0.2, 0.3, 0.4]), target([0.8, 0.9])
    assert kept([a, b], "entropy", 0.5) == [[0, 0, 0, 1], [1, 1]]
    assert [t.weight.tolist() for t in select([a, b], "entropy", 0.5, "answer")] == [[0, 0, 1, 1], [0, 1]]


@settings(derandomize=True, database=None, max_examples=50)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.floats(0.05, 0.95), st.booleans())
def test_an_answer_weighs_the_same_whatever_it_lost(lengths, keep, chance):
    """r~_t = (T / sum m) m_t r_t: over an answer its mean is that of r over the kept tokens (arXiv:2606.07082, Sec. 5)."""
    targets = [target([i * 0.1 for i in range(n)], [-float(i % 3) for i in range(n)], seed=n) for n in lengths]
    got = select(targets, "random" if chance else "gap", keep, "answer")
    trained = sum(int((t.weight != 0).sum()) for t in got)  # what the loss is divided by
    for n, t in zip(lengths, got, strict=True):
        r, m = torch.arange(1.0, n + 1), t.weight != 0
        assert int(m.sum()) == max(int(keep * n), 1)
        mean = r[m].mean().item()
        assert (t.weight * r).sum().item() / trained == pytest.approx(n / sum(lengths) * mean, rel=1e-5)


def test_the_gap_is_signed():
    """Of d = -3 (the student too sure) and d = +4 (the teacher surer), the first is kept, though |d| is smaller."""
    [t] = select([target([0.0] * 2, [-4.0, 3.0])], "gap", 0.5, "answer")
    assert t.weight.tolist() == [1, 0]


def test_tip_takes_the_uncertain_and_the_overconfident():
    entropy = [1.0, 0.0, 0.0, 0.5]
    teacher = [-1.0, -9.0, -1.0, -1.0]  # only the second is a disagreement
    assert kept([target(entropy, teacher)], "tip", 0.5) == [[1, 1, 0, 0]]


def test_tip_is_the_soft_or_of_both():
    h, teacher = [0.4, 0.6, 0.0, 1.0, 0.0], [0.0, -2.0, -1.0, -1.0, -30.0]
    k3 = [math.exp(1) - 2, math.exp(-1), 0, 0, math.exp(-10) + 9]
    score = [(a := x / max(h)) + (b := y / max(k3)) - a * b for x, y in zip(h, k3, strict=True)]
    best = sorted(range(5), key=lambda i: -score[i])[:3]
    assert kept([target(h, teacher)], "tip", 0.6) == [[float(i in best) for i in range(5)]]


def test_surely_one_counts_more_than_half_of_both():
    """The soft or of (1, 0) and (0, 1) is 1, that of (.6, .6) is .84; their sum would rank them the other way."""
    third = 0.804  # exp(d) - d - 1 = 0.43, 0.6 times that of d = 1
    assert kept([target([1.0, 0.6, 0.0], [-1.0, -1.0 + third, 0.0])], "tip", 0.7) == [[1, 0, 1]]


def test_outliers_leave_room_for_the_third():
    """Two divergences far above all others count as the third largest, which then beats half of the largest entropy."""
    entropy = [1.0] * 3 + [0.5] + [0.0] * 96
    teacher = [-1.0] * 4 + [-11.0, -11.0, -3.0] + [-1.0] * 93
    [weights] = kept([target(entropy, teacher)], "tip", 0.06)
    assert [i for i, w in enumerate(weights) if w] == [0, 1, 2, 4, 5, 6]


def test_an_outlier_does_not_decide_the_scale():
    """Of 100 tokens the two largest divergences count as the third largest."""
    teacher = [-1.0 - 0.02 * i for i in range(98)] + [-40.0, -50.0]
    one = kept([target([0.0] * 100, teacher)], "tip", 0.1)
    assert [i for i, w in enumerate(one[0]) if w] == list(range(90, 100))


def test_rows_of_the_teacher_do_not_move_the_scale_of_tip():
    t = target([0.9, 0.5, 0.7, 0.6], [-1.2, -1.9, -1.1, -3.0])
    theirs = Target(source=Reviewed(rollout=target([0.0] * 9).rollout), weight=torch.zeros(9), imitate=torch.ones(9))
    for keep in (0.3, 0.5, 0.8):
        assert kept([t], "tip", keep)[0] == kept([theirs, t], "tip", keep)[1]


def test_chance_depends_on_the_seed_alone():
    one = kept([target([0.0] * 20, seed=1)], "random", 0.5)
    assert one == kept([target([1.0] * 20, seed=1)], "random", 0.5)
    assert one != kept([target([0.0] * 20, seed=2)], "random", 0.5)
    assert sum(one[0]) == 10


@pytest.mark.parametrize("by", ["entropy", "divergence", "gap", "tip", "random"])
@settings(derandomize=True, database=None, max_examples=30)
@given(
    st.lists(st.lists(st.floats(0, 5, width=16), min_size=1, max_size=6), min_size=1, max_size=4), st.floats(0.01, 0.99)
)
def test_the_share_that_is_kept(by, entropies, keep):
    targets = [target(h, [-1.0 - x for x in h], seed=i) for i, h in enumerate(entropies)]
    n = sum(map(len, entropies))
    assert sum(map(sum, kept(targets, by, keep))) == max(int(keep * n), 1)


def test_an_answer_of_the_teacher_keeps_its_likelihood_weight():
    t = target([0.0, 0.0])
    theirs = Target(source=Reviewed(rollout=t.rollout), weight=torch.zeros(2), imitate=torch.ones(2))
    [_, got] = select([target([1.0, 2.0], [-1.0, -5.0]), theirs], "tip", 0.5)
    assert got.imitate is not None
    assert got.imitate.tolist() == [1, 1]
