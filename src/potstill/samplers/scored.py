"""A control: the teacher writes, and the student says how likely it finds that (arXiv:2606.07082, Sec. 5).

Everything else of an on-policy method stays as it is: credit, ratio, loss. What is taken away is that the student learns
from its own answers.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from potstill.samplers.base import Sampler
from potstill.teachers.base import Teacher
from potstill.types import Ask, Feedback, Prompt, Rollout, Turn, Wants


class ScoredSampler:
    """Answers of another author with the student's log-probs and entropies, as it is now."""

    def __init__(self, author: Sampler, student: Teacher):
        self.author, self.student = author, student

    async def sample(self, prompts: Sequence[Prompt], n: int, turn: Turn) -> list[list[Rollout]]:
        """`n` answers to each prompt by the other author."""
        groups = await self.author.sample(prompts, n, turn)
        asks = [Ask(rollout=r, view=r.prompt, wants=Wants.FULL) for group in groups for r in group if r.response_ids]
        scored = {f.ask.rollout.key: _scored(f) for f in await self.student.feedback(asks)}
        return [[scored[r.key] if r.key in scored else replace(r, old_logp=(), entropy=()) for r in g] for g in groups]


def _scored(f: Feedback) -> Rollout:
    assert f.sampled is not None
    assert f.logp is not None
    p = np.exp(f.logp)
    entropy = -(p * np.where(p > 0, f.logp, 0.0)).sum(-1)
    return replace(f.ask.rollout, old_logp=tuple(f.sampled.tolist()), entropy=tuple(entropy.tolist()))
