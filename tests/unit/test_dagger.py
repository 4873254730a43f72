"""Imitation at the student's prefixes, and what omniopd can do beyond the paper, against listings of all answers."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.tabular import ANSWERS, LETTERS, Tabular, V, double, expected_gradient, probability, rollout, rows, table

from potstill import divergence as D
from potstill.batch import collate, count_tokens
from potstill.chunks import plan_chunks, word_starts
from potstill.errors import TeacherError
from potstill.methods.base import Method
from potstill.methods.dagger import Dagger
from potstill.methods.omniopd import OmniOPD
from potstill.types import Ask, Batch, Continuation, Feedback, Reviewed, Target

THETA, START = table(0), table(2)
COUNTS = {(): (5, 3, 2), (0,): (1, 8, 1), (1,): (4, 4, 2), (2,): (0, 3, 7)}
"""What a teacher writes in ten tries after each prefix."""
TEN = sum(COUNTS[()])


class Branching(Tabular):
    """The table on rows that begin anywhere in an answer: what a row's prompt holds behind the question is its prefix."""

    def __init__(self, logits: torch.Tensor, batch: Batch, reference: "Tabular | None" = None):
        super().__init__(logits, [], reference)
        self._batch = batch

    @cached_property
    def all(self) -> torch.Tensor:
        logp = self._logits.log_softmax(-1)
        out = []
        for prompt, labels in zip(self._batch.prompt_ids, self._batch.labels, strict=True):
            y = [*prompt[1:], *labels.tolist()]
            whole = torch.stack([logp[0], *(logp[1 + token] for token in y[:-1])])
            out.append(whole[len(prompt) - 1 :])
        return torch.stack(out)


def ten(ask: Ask) -> Feedback:
    prefix = ask.rollout.response_ids[: ask.start]
    ids = tuple((v,) for v, count in enumerate(COUNTS[prefix]) for _ in range(count))
    return Feedback(ask=ask, teacher="t", texts=tuple(LETTERS[i] for (i,) in ids), ids=ids)


def gradient(method: Method, theta: torch.Tensor, groups: Sequence[tuple[float, Sequence[Target]]]) -> torch.Tensor:
    """Of the sum over lists of targets of probability x loss x divisor."""
    theta = theta.clone().requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for p, targets in groups:
        batch = double(collate(targets))
        loss, _ = method.loss(Branching(theta, batch, Branching(START, batch)), batch)
        total = total + p * loss * batch.n_tokens
    return torch.autograd.grad(total, theta)[0]


def expected(method: Method, answer: Callable[[Ask], Feedback]) -> torch.Tensor:
    """Over y ~ pi_theta, with rows that are branches of y."""
    groups = []
    for y in ANSWERS:
        r = rollout(THETA, y)
        said = tuple(answer(ask) for ask in method.asks(r))
        groups.append((probability(THETA, y).item(), method.targets([Reviewed(rollout=r, feedback=said)])))
    return gradient(method, THETA, groups)


def close(got: torch.Tensor, want: torch.Tensor, atol: float = 1e-6) -> None:
    torch.testing.assert_close(got, want, atol=atol, rtol=1e-5)
    assert want.abs().max() > 1e-3  # a comparison of zeros would prove nothing


# --- dagger ---------------------------------------------------------------------------------------------------------


def test_dagger_is_the_forward_kl_at_the_students_prefixes():
    got = expected(Dagger(chunks=2, chunk_length=1, continuations=TEN), ten)
    teacher = torch.tensor([COUNTS[p] for p in [(), (0,), (1,), (2,)]], dtype=torch.float64) / TEN
    theta = THETA.clone().requires_grad_()
    cross = -(teacher * theta.log_softmax(-1)).sum(-1)  # forward KL but for the teacher's entropy, which does not move
    visits = theta[0].softmax(-1).detach()
    close(got, torch.autograd.grad(cross[0] + (visits * cross[1:]).sum(), theta)[0])


def test_dagger_asks_where_omniopd_asks():
    r = rollout(
        THETA,
        (0, 1),
        response_ids=(0, 1, 2, 1),
        pieces=("a", "b", "c", "b"),
        old_logp=(-1.0,) * 4,
        entropy=(0.1, 0.9, 0.3, 0.8),
    )
    shape = {"chunks": 2, "chunk_length": 1, "continuations": 3, "beta": 0.1}
    mine, theirs = Dagger(**shape).asks(r), OmniOPD(**shape).asks(r)
    assert (
        [(a.start, a.length, a.n) for a in mine] == [(a.start, a.length, a.n) for a in theirs] == [(1, 1, 3), (3, 1, 3)]
    )
    assert all(a.ids for a in mine)


def test_equal_texts_are_one_row_with_their_share():
    r = rollout(THETA, (0, 1))
    method = Dagger(chunks=1, chunk_length=1, continuations=4)
    [ask] = method.asks(r)
    ids = ((1,), (2,), (1,), ())
    said = Feedback(ask=ask, teacher="t", texts=("b", "c", "b", ""), ids=ids)
    [target] = method.targets([Reviewed(rollout=r, feedback=(said,))])
    assert {(c.ids, c.share) for c in target.continuations} == {((1,), 0.5), ((2,), 0.25)}  # nothing is a text too
    apart = replace(target, continuations=tuple(Continuation(start=ask.start, ids=i, share=0.25) for i in ids if i))
    assert count_tokens([target]) == count_tokens([apart]) == 1
    close(gradient(method, THETA, [(1.0, [target])]), gradient(method, THETA, [(1.0, [apart])]), atol=1e-12)


def test_a_branch_reads_the_prompt_and_the_beginning_of_the_rollout():
    r = rollout(THETA, (2, 1), response_ids=(2, 1, 0), pieces=("c", "b", "a"), old_logp=(-1.0,) * 3, entropy=(0.0,) * 3)
    branch = Continuation(start=2, ids=(1, 1, 0), share=0.5)
    target = Target(source=Reviewed(rollout=r), weight=torch.zeros(3), continuations=(branch,))
    batch = collate([target])
    assert batch.prompt_ids == ((0, 2, 1),)  # a rollout without any weight of its own is left out
    assert batch.labels.tolist() == [[1, 1, 0]]
    assert batch.imitate is not None
    assert batch.imitate.tolist() == [[0.5] * 3]
    assert (batch.n_tokens, batch.n_rollouts) == (1.5, 1)
    anchored = collate([replace(target, anchor=torch.tensor([1.0, 1.0, 0.0]))])
    assert anchored.prompt_ids == ((0,), (0, 2, 1))
    assert anchored.anchor is not None
    assert anchored.anchor.tolist() == [[1, 1, 0], [0, 0, 0]]
    assert anchored.n_tokens == 3.5


def test_what_only_some_rows_have_survives_a_row_that_is_left_out():
    """A part of a batch may hold nothing but branches; the terms of the others are there all the same."""
    r = rollout(THETA, (0, 1))
    covered = Dagger(chunks=2, chunk_length=1, beta=0.1)
    said = tuple(Feedback(ask=a, teacher="t", texts=("b",), ids=((1,),)) for a in covered.asks(r))
    batch = collate(covered.targets([Reviewed(rollout=r, feedback=said)]))
    assert batch.anchor is not None
    assert batch.anchor.tolist() == [[0], [0]]


def test_dagger_refuses_missing_continuations():
    r = rollout(THETA, (0, 1))
    method = Dagger(chunks=1, chunk_length=1, continuations=2)
    said = Feedback(ask=method.asks(r)[0], teacher="t", texts=("a",), ids=((0,),))
    with pytest.raises(TeacherError, match="1 of 2 continuations"):
        method.targets([Reviewed(rollout=r, feedback=(said,))])


def test_dagger_with_an_anchor_is_both_terms():
    shape = {"chunks": 1, "chunk_length": 1, "continuations": TEN}
    free, held = expected(Dagger(**shape), ten), expected(Dagger(**shape, beta=0.5), ten)
    drift = expected(OmniOPD(**shape, beta=0.5, alpha=0.0, similarity="exact"), silent)
    close(held, free + drift)


def silent(ask: Ask) -> Feedback:
    """A teacher that agrees with nothing, so that omniopd is its anchor alone."""
    return Feedback(ask=ask, teacher="t", texts=("?",) * ask.n, ids=((),) * ask.n)


def test_the_mix_is_the_sum():
    shape = {"chunks": 2, "chunk_length": 1, "continuations": TEN, "beta": 0.0}
    agreement = {"alpha": 0.0, "similarity": "exact"}
    mixed = expected(OmniOPD(**shape, **agreement, dagger=0.7), ten)
    alone, imitation = expected(OmniOPD(**shape, **agreement), ten), expected(Dagger(**shape), ten)
    close(mixed, alone + 0.7 * imitation)
    assert alone.abs().max() > 1e-2


# --- control variates -----------------------------------------------------------------------------------------------

ONE = OmniOPD(chunks=1, chunk_length=1, continuations=2, similarity="exact", alpha=0.5, beta=0.0)


def two(ask: Ask) -> Feedback:
    """The teacher agrees with the first two letters, each once."""
    return Feedback(ask=ask, teacher="t", texts=(LETTERS[0], LETTERS[1]))


def bias_of_own(theta: torch.Tensor, **fields: str) -> torch.Tensor:
    """Expected gradient with the student's own alternatives as baseline, minus the one without."""
    plain = ONE.model_copy(update=fields)
    method = plain.model_copy(update={"baseline": "own"})
    total = torch.zeros_like(theta)
    for y, v in itertools.product(ANSWERS, range(V)):
        r = rollout(theta, y)
        asks = method.asks(r)
        assert [a.of for a in asks] == ["teacher", "student"]
        own = Feedback(ask=asks[1], teacher="student", texts=(LETTERS[v],))
        targets = method.targets([Reviewed(rollout=r, feedback=(two(asks[0]), own))])
        drawn = rows(theta, y)[asks[1].start, v].exp().item()
        total += gradient(method, theta, [(probability(theta, y).item() * drawn, targets)])
    want = expected_gradient(plain, theta, two)
    assert want.abs().max() > 1e-3
    return total - want


@pytest.mark.parametrize("seed", range(4))
def test_the_students_own_alternatives_leave_the_expected_gradient_as_it_is(seed: int):
    """Where the chunk's place does not depend on what is in it. Where it does, there is a bias, and the docs say so."""
    assert bias_of_own(table(seed), scheduler="uniform").abs().max() < 1e-6
    moves = seed == 3  # the first token of this table decides whether the first or the second is the more uncertain
    assert (bias_of_own(table(seed)).abs().max() > 1e-2) == moves


def test_leaving_one_out_leaves_the_expected_gradient_as_it_is():
    def over_pairs(method: OmniOPD) -> torch.Tensor:
        groups = []
        for pair in itertools.product(ANSWERS, repeat=2):
            rs = [rollout(THETA, y, sample=i) for i, y in enumerate(pair)]
            group = [Reviewed(rollout=r, feedback=tuple(two(a) for a in method.asks(r))) for r in rs]
            p = math.prod(probability(THETA, y).item() for y in pair)
            groups.append((p, method.targets(group)))
        return gradient(method, THETA, groups)

    shape = {"chunks": 2, "chunk_length": 1, "continuations": 2, "similarity": "exact", "alpha": 0.0, "beta": 0.0}
    plain, out = over_pairs(OmniOPD(**shape)), over_pairs(OmniOPD(**shape, baseline="leave_one_out"))
    close(out, plain)
    assert (over_pairs(OmniOPD(**shape, baseline="mean")) - plain).abs().max() > 1e-3  # biased, as its docstring says


def test_baselines_by_hand():
    """Two answers of two chunks; agreement .5, .5 | 0, .5 (no alpha): the teacher writes "a" once and "b" once."""
    shape = {"chunks": 2, "chunk_length": 1, "continuations": 2, "similarity": "exact", "alpha": 0.0, "beta": 0.0}

    def credit(baseline: str) -> list[list[float]]:
        method = OmniOPD(**shape, baseline=baseline)
        rs = [rollout(THETA, (0, 1)), rollout(THETA, (2, 1), sample=1)]
        group = [Reviewed(rollout=r, feedback=tuple(two(a) for a in method.asks(r))) for r in rs]
        return [t.advantage.tolist() for t in method.targets(group) if t.advantage is not None]

    assert credit("none") == [[0.5, 0.5], [0.0, 0.5]]
    assert credit("mean") == [[0.125, 0.125], [-0.375, 0.125]]
    assert credit("leave_one_out") == [
        pytest.approx([0.5 - 0.25, 0.5 - 1 / 3]),  # without itself and, for the first chunk, without the second
        pytest.approx([0.0 - 0.5, 0.5 - 1 / 3]),
    ]


def test_own_alternatives_by_hand():
    method = OmniOPD(
        chunks=1,
        chunk_length=1,
        continuations=2,
        similarity="exact",
        alpha=1.0,
        beta=0.0,
        baseline="own",
        alternatives=3,
    )
    r = rollout(THETA, (0, 1), old_logp=(-2.0, -2.0))
    asks = method.asks(r)
    own = Feedback(ask=asks[1], teacher="student", texts=("a", "c", "c"))
    [target] = method.targets([Reviewed(rollout=r, feedback=(own, two(asks[0])))])
    [audit] = target.audits
    assert asks[1].n == 3
    assert audit.target == pytest.approx((1 + math.exp(-2)) / 3)
    assert audit.baseline == pytest.approx(1 / 3 / 3)  # one of 3 x 2 pairs agrees: 1/3 of a text, of N + alpha = 3
    assert target.advantage is not None
    assert target.advantage[audit.start].item() == pytest.approx(audit.target - audit.baseline)


# --- one after the other ----------------------------------------------------------------------------------------------


def ask_until_known(method: OmniOPD, agrees: Sequence[bool]) -> tuple[list[Feedback], list[tuple[int, int]]]:
    """The dialogue about one chunk whose teacher agrees, or does not, draw by draw."""
    r = rollout(THETA, (0, 1))
    said, asked, new = list[Feedback](), list[tuple[int, int]](), method.asks(r)
    while new:
        for ask in new:
            asked.append((ask.first, ask.n))
            mine = LETTERS[r.response_ids[ask.start]]
            texts = tuple(mine if agrees[i] else "?" for i in range(ask.first, ask.first + ask.n))
            said.append(Feedback(ask=ask, teacher="t", texts=texts))
        new = method.more(said)
    [target] = method.targets([Reviewed(rollout=r, feedback=tuple(said))])
    assert len(target.audits[0].continuations) == sum(n for _, n in asked)
    return said, asked


NARROW = OmniOPD(chunks=1, chunk_length=1, continuations=6, similarity="exact", alpha=0.0, beta=0.0, narrow=0.2)


def test_asking_stops_when_the_posterior_is_narrow():
    """sd Beta(3, 1) = .194 after two that agree; Beta(2, 2) = .224 after one of two; Beta(3, 3) = .189 after two of four."""
    assert ask_until_known(NARROW, [True] * 6)[1] == [(0, 2)]
    assert ask_until_known(NARROW, [False] * 6)[1] == [(0, 2)]
    assert ask_until_known(NARROW, [True, False, False, True, True, True])[1] == [(0, 2), (2, 2)]
    assert ask_until_known(NARROW.model_copy(update={"narrow": 0.0}), [True] * 6)[1] == [(0, 6)]


@settings(derandomize=True, database=None, deadline=None, max_examples=40)
@given(st.lists(st.booleans(), min_size=9, max_size=9), st.floats(0.02, 0.22), st.integers(1, 9))
def test_draws_are_asked_for_once_and_never_more_than_n(agrees: list[bool], narrow: float, n: int):
    method = NARROW.model_copy(update={"narrow": narrow, "continuations": n})
    _, asked = ask_until_known(method, agrees)
    draws = [d for first, count in asked for d in range(first, first + count)]
    assert draws == list(range(len(draws)))
    assert len(draws) <= n


def test_a_chunk_whose_next_question_went_unanswered_is_judged_by_what_came():
    r = rollout(THETA, (0, 1))
    [ask] = NARROW.asks(r)
    mine = LETTERS[r.response_ids[ask.start]]
    said = Feedback(ask=ask, teacher="t", texts=(mine, "?"))
    assert NARROW.more([said]) != []
    [target] = NARROW.targets([Reviewed(rollout=r, feedback=(said,))])
    assert target.audits[0].target == 0.5


# --- the same answers again -------------------------------------------------------------------------------------------


def test_the_ratio_makes_old_answers_count_as_new_ones():
    """Answers of another policy, weighed by pi_theta / pi_old, have the gradient of the student's own; chunk at y_1."""
    shape = {"chunks": 1, "chunk_length": 1, "continuations": 2, "similarity": "exact", "alpha": 0.0, "beta": 0.0}
    at_first = {**shape, "scheduler": "uniform"}

    def by(author: torch.Tensor, method: OmniOPD) -> torch.Tensor:
        groups = []
        for y in ANSWERS:
            r = rollout(author, y)
            target = method.targets([Reviewed(rollout=r, feedback=tuple(two(a) for a in method.asks(r)))])
            groups.append((probability(author, y).item(), target))
        return gradient(method, THETA, groups)

    want = by(THETA, OmniOPD(**at_first))
    close(by(THETA, OmniOPD(**at_first, max_ratio=1.5)), want)
    close(by(START, OmniOPD(**at_first, max_ratio=1e6)), want)
    assert (by(START, OmniOPD(**at_first)) - want).abs().max() > 1e-3
    assert (by(START, OmniOPD(**at_first, max_ratio=1.0)) - want).abs().max() > 1e-3


# --- words ------------------------------------------------------------------------------------------------------------


def test_where_a_word_begins():
    pieces = ["He", "llo", " wor", "ld", "\n", "ne", "", "xt", " ", "", "é", "b"]
    assert word_starts(pieces) == [0, 0, 2, 2, 4, 5, 5, 5, 8, 9, 9, 9]  # a split character begins with its first token


def test_an_anchor_stays_where_its_chunk_would_lose_it():
    """Without white space all is one word; moved to its beginning, a chunk would miss what is uncertain."""
    entropy = [0.0] * 10
    entropy[7], entropy[1] = 2.0, 1.0
    assert [c.start for c in plan_chunks(entropy, 2, 3, pieces=["x"] * 10)] == [0, 7]


def test_anchors_move_to_the_beginning_of_their_word():
    pieces = ["He", "llo", " wor", "ld", " ne", "xt", "!"]
    entropy = [0.0, 5.0, 0.0, 4.0, 0.0, 3.0, 0.0]
    plain = plan_chunks(entropy, 3, 2)
    moved = plan_chunks(entropy, 3, 2, pieces=pieces)
    assert [c.start for c in plain] == [1, 3, 5]
    assert [c.start for c in moved] == [0, 2, 4]


def test_forward_kl_of_the_table_is_what_dagger_estimates():
    """The constant that dagger leaves out is the teacher's entropy."""
    teacher = torch.tensor(COUNTS[(1,)], dtype=torch.float64) / TEN
    logp = THETA[2].log_softmax(-1)
    cross = -(teacher * logp).sum()
    entropy = -(teacher * teacher.log()).sum()
    torch.testing.assert_close(D.forward_kl(logp, teacher.log()), cross - entropy)
