"""Supervised fine-tuning: the likelihood of answers that somebody else wrote.

    y ~ pi_T(. | x),  or y from the data set
    L = -1/N sum_t log pi_theta(y_t | h_t)                       N = response tokens of the whole batch

The off-policy baseline of every paper here (OmniOPD Eq. 1). A foreign teacher's text is written in the student's tokens.
"""

from collections.abc import Sequence
from typing import Literal

import torch

from potstill.methods.base import Method, Metrics, Policy
from potstill.types import Author, Batch, Reviewed, Target


class SFT(Method):
    """Likelihood of the teacher's answers or of the data set's."""

    name: Literal["sft"] = "sft"
    source: Literal["teacher", "data"] = "teacher"
    """`teacher`: fresh samples of the teacher. `data`: the data set's `completion`, or its `answer` where it has none."""

    @property
    def author(self) -> Author:
        """Not the student."""
        return self.source

    def targets(self, group: Sequence[Reviewed]) -> list[Target]:
        """Every token counts once."""
        return [
            Target(source=r, weight=torch.ones(len(r.rollout.response_ids))) for r in group if r.rollout.response_ids
        ]

    def loss(self, policy: Policy, batch: Batch) -> tuple[torch.Tensor, Metrics]:
        """-log pi_theta(y_t | h_t), over N."""
        return -(batch.weight * policy.logp(batch.labels)).sum() / batch.n_tokens, {}
