"""Held-out questions put to a model: how often it is right, and how sure one can be of that."""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from potstill.decode import Decoding
from potstill.metrics import Interval, avg_at_k, bootstrap, maj_at_k, pass_at_k, repetition
from potstill.models import Loaded
from potstill.samplers.hf import HFSampler
from potstill.types import Prompt, Rollout, Turn
from potstill.verifiers.base import Verifier

Row = dict[str, Any]


async def evaluate(
    loaded: Loaded,
    questions: Sequence[Prompt],
    verifier: Verifier,
    *,
    name: str,
    samples: int,
    max_tokens: int,
    how: Decoding,
    seed: int = 0,
) -> tuple[Row, list[list[Rollout]]]:
    """One row of evals.jsonl, every figure with its 95 % interval over questions, and the answers behind it.

    The random numbers depend on the seed, the question and the sample alone, so that two models are asked alike and
    their answers can be compared question by question.
    """
    began = time.process_time()
    sampler = HFSampler(loaded, decoding=how)
    groups = await sampler.sample(questions, samples, Turn(seed=seed, step=-1, max_tokens=max_tokens))
    row = score(groups, verifier) | {
        "name": name,
        "samples": samples,
        "temperature": how.temperature,
        "top_p": how.top_p,
    }
    return row | {"seed": seed, "eval_cpu_s": round(time.process_time() - began, 3)}, groups


def score(groups: Sequence[Sequence[Rollout]], verifier: Verifier) -> Row:
    """avg@k, pass@k, maj@k, and how the answers went wrong. [Q][k] answers -> one row.

    For pass@k and maj@k an answer is right if its score is 1. `scores` and `passes` are avg@k and pass@k of each
    question, so that models can be compared question by question.
    """
    k = len(groups[0])
    correct = np.array([[verifier(r) for r in group] for group in groups])
    answers = [[verifier.extract(r.text()) for r in group] for group in groups]
    per_question = {
        f"avg@{k}": avg_at_k(correct),
        f"pass@{k}": pass_at_k(correct >= 1, k),
        f"maj@{k}": maj_at_k(answers, k, correct >= 1),
        "format_failure": _per_question([[a is None for a in row] for row in answers]),
        "truncated": _per_question([[r.finish == "length" for r in group] for group in groups]),
        "repetition": _per_question([[repetition(r.response_ids) for r in group] for group in groups]),
        "length": _per_question([[len(r.response_ids) for r in group] for group in groups]),
    }
    row: Row = {name: _rounded(bootstrap(values)) for name, values in per_question.items()}
    lists = {"scores": per_question[f"avg@{k}"], "passes": per_question[f"pass@{k}"]}
    return row | {"questions": len(groups)} | {name: [round(float(x), 6) for x in v] for name, v in lists.items()}


def _per_question(values: Sequence[Sequence[int | float]]) -> Any:
    return np.array(values, dtype=float).mean(1)


def _rounded(interval: Interval) -> dict[str, float]:
    return {name: round(value, 6) for name, value in interval._asdict().items()}
