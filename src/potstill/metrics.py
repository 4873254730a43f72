"""What is reported about a set of answers, and how sure one can be of it. Needs no torch.

Shapes: Q questions, n answers to each. Everything is per question first, because questions are what varies: the
answers to one question are alike, so intervals come from resampling questions, never single answers.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Shaped

from potstill.seeds import derive

GRAM = 4
"""Tokens in a row that count as one repeatable piece."""


class Interval(NamedTuple):
    """An estimate and the bounds of its confidence interval."""

    value: float
    low: float
    high: float


def avg_at_k(correct: Shaped[np.ndarray, "Q n"]) -> Float[np.ndarray, " Q"]:
    """Mean score of the answers to each question; its mean over questions is the accuracy of one sampled answer."""
    return np.asarray(correct, dtype=np.float64).mean(axis=1)


def pass_at_k(correct: Shaped[np.ndarray, "Q n"], k: int) -> Float[np.ndarray, " Q"]:
    """The chance that k of the n answers, drawn without replacement, hold at least one that is correct.

    1 - C(n - c, k) / C(n, k) for c correct answers: unbiased for the chance that k fresh answers do (Chen et al. 2021,
    arXiv:2107.03374, Eq. 1), computed as a product of k factors, none of which can overflow.

    Raises:
        ValueError: `correct` is not of zeros and ones, or there are fewer than k answers.
    """
    correct = np.asarray(correct)
    n = correct.shape[1]
    _check_k(k, n)
    if not np.isin(correct, (0, 1)).all():
        raise ValueError("pass@k counts answers that are right, so scores between 0 and 1 cannot be used; round them")
    wrong = n - correct.sum(axis=1, dtype=np.int64)
    drawn = np.arange(k)
    return 1 - np.clip((wrong[:, None] - drawn) / (n - drawn), 0, None).prod(axis=1)


def maj_at_k(
    answers: Sequence[Sequence[str | None]], k: int, correct: Shaped[np.ndarray, "Q n"]
) -> Float[np.ndarray, " Q"]:
    """The chance that the answer given most often among the first k is correct (self-consistency, arXiv:2203.11171).

    Answers count as the same if their extracted strings are equal. None (no answer) never wins against an answer, and
    is wrong where nothing else was given. Equally frequent answers win with equal chance, so a tie between a right
    and a wrong answer gives 1/2. Where a verifier judged equal strings differently, their mean score counts.

    Args:
        answers: [Q][n] extracted answers.
        k: How many of each question's answers vote.
        correct: [Q, n] the verifier's score of each answer.

    Raises:
        ValueError: The shapes differ, or a question has fewer than k answers.
    """
    correct = np.asarray(correct, dtype=np.float64)
    if [len(row) for row in answers] != [correct.shape[1]] * correct.shape[0]:
        raise ValueError(f"answers and correct differ in shape: correct is {correct.shape}; give one score per answer")
    _check_k(k, correct.shape[1])
    return np.array([_majority(row[:k], scores[:k]) for row, scores in zip(answers, correct, strict=True)])


def _majority(answers: Sequence[str | None], scores: Float[np.ndarray, " k"]) -> float:
    votes: dict[str, list[float]] = {}
    for answer, score in zip(answers, scores, strict=True):
        if answer is not None:
            votes.setdefault(answer, []).append(float(score))
    most = max(map(len, votes.values()), default=0)
    winners = [float(np.mean(given)) for given in votes.values() if len(given) == most]
    return float(np.mean(winners)) if winners else 0.0


def _check_k(k: int, n: int) -> None:
    if not 1 <= k <= n:
        raise ValueError(f"k = {k}, but there are {n} answers to each question; k must be 1 .. {n}")


Statistic = Callable[..., Any]
"""statistic(x, axis=0) reduces the axis of questions; `np.mean` and `np.median` are such functions."""


def bootstrap(
    per_question: Shaped[np.ndarray, "Q ..."],
    statistic: Statistic = np.mean,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap over questions (Efron 1979): an interval for `statistic` of new questions of this kind.

    A row holds all that is known about one question and is drawn as a whole; the answers in it are averaged first.
    It is too short for very few questions, and has no width where all questions score alike. It always holds `value`.

    Args:
        per_question: [Q] or [Q, m]; the mean over m is taken first.
        statistic: Reduces axis 0, vectorised.
        level: Of confidence.
        resamples: Sets of Q questions drawn with replacement.
        seed: Equal seeds give equal intervals.

    Raises:
        ValueError: There is no question, a score is not a number, or `level` is not between 0 and 1.
    """
    scores = np.asarray(per_question, dtype=np.float64)
    if scores.size == 0 or not np.isfinite(scores).all():
        raise ValueError(f"{scores.shape} scores, {np.isnan(scores).sum()} of them not numbers: no interval exists")
    if not 0 < level < 1:
        raise ValueError(f"level = {level} is no level of confidence; give one between 0 and 1, such as 0.95")
    if scores.ndim > 1:
        scores = scores.reshape(len(scores), -1).mean(axis=1)
    rng = np.random.default_rng(derive("bootstrap", seed))
    rows = max(1, 2**22 // len(scores))  # at most 32 MB of drawn scores at a time
    drawn = [
        statistic(scores[rng.integers(len(scores), size=(len(scores), min(rows, resamples - done)))], axis=0)
        for done in range(0, resamples, rows)
    ]
    low, high = np.quantile(np.concatenate(drawn), [(1 - level) / 2, (1 + level) / 2])
    value = float(statistic(scores, axis=0))
    return Interval(value, min(float(low), value), max(float(high), value))


def paired_bootstrap(
    a: Shaped[np.ndarray, " Q"],
    b: Shaped[np.ndarray, " _"],
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """mean(b) - mean(a) on the same questions in the same order, with its interval; see `bootstrap`.

    Questions that are hard for both cancel, so it is narrower than the intervals of `a` and `b` suggest.

    Raises:
        ValueError: `a` and `b` differ in shape.
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.shape != b.shape:
        raise ValueError(f"{a.shape} and {b.shape} scores cannot be paired; evaluate both on the same questions")
    return bootstrap(b - a, level=level, resamples=resamples, seed=seed)


def crossed_bootstrap(
    scores: Shaped[np.ndarray, "S Q"], level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> Interval:
    """The mean of S runs on the same Q questions, with an interval for new runs *and* new questions.

    Percentile bootstrap of two crossed factors: seeds and questions are drawn with replacement, independently, and a
    drawn run meets every drawn question (the pigeonhole bootstrap: Owen 2007, Ann. Appl. Stat. 1(2), arXiv:0712.1111).
    No bootstrap is exact for crossed factors. With seeds of variance A, questions of variance B and a remainder C in
    each cell, the mean has the variance A/S + B/Q + C/(SQ), and the drawn means have, on average,

        (1 - 1/S) A/S + (1 - 1/Q) B/Q + (3 - 2/S - 2/Q + 1/(SQ)) C/(SQ)

    so the part of the seeds is too small for few of them (S < 5: too short an interval, half the variance for S = 2),
    and the part of single answers is counted up to three times (too long an interval). For differences pass
    `b - a`, paired by seed and question. One run varies no seeds: then it is `bootstrap` over the questions.

    Args:
        scores: [S, Q], a row a run, a column a question, in the same order in each run.
        level: Of confidence.
        resamples: Draws of S seeds and Q questions.
        seed: Equal seeds give equal intervals.

    Raises:
        ValueError: There is no score, one is not a number, or `level` is not between 0 and 1.
    """
    scores = np.asarray(scores, dtype=np.float64)
    if len(scores) == 1 or not np.isfinite(scores).all() or not scores.size or not 0 < level < 1:
        return bootstrap(scores.reshape(-1), level=level, resamples=resamples, seed=seed)  # which knows what is wrong
    runs, questions = scores.shape
    rng = np.random.default_rng(derive("crossed bootstrap", seed))
    rows = max(1, 2**22 // questions)
    drawn: list[np.ndarray] = []
    for done in range(0, resamples, rows):
        size = min(rows, resamples - done)
        seeds = rng.multinomial(runs, np.full(runs, 1 / runs), size=size)  # how often each was drawn
        asked = rng.multinomial(questions, np.full(questions, 1 / questions), size=size)
        drawn.append(((seeds @ scores) * asked).sum(axis=1) / scores.size)
    low, high = np.quantile(np.concatenate(drawn), [(1 - level) / 2, (1 + level) / 2])
    value = float(scores.mean())
    return Interval(value, min(float(low), value), max(float(high), value))


def repetition(text_or_ids: str | Sequence[Hashable]) -> float:
    """Share of 4-grams that occurred before: 1 - distinct / all, from 0 (no piece twice) towards 1 (a loop).

    Over token ids, or over the words of a text. Fewer than four tokens cannot repeat: 0.
    """
    tokens = text_or_ids.split() if isinstance(text_or_ids, str) else text_or_ids
    grams = [tuple(tokens[start : start + GRAM]) for start in range(len(tokens) - GRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
