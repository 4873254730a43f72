"""Teacher and verifier side by side, without a gate: what the gated methods have to beat.

    d_t = log pi_T(y_t | h_t) - log pi_old(y_t | h_t)
    A_i = (R_i - mean R) / std R over the answers to the prompt  R: the verifier's score
    A_t = alpha d_t + (1 - alpha) A_i
    L as in methods/token_credit.py

alpha = 1 is `sampled_kl`, alpha = 0 is `grpo`, to the bit.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from potstill.credit import PerToken, group_advantage
from potstill.methods.base import Need
from potstill.methods.token_credit import Evidence, TokenCredit


class Mix(TokenCredit):
    """alpha of the teacher's credit, 1 - alpha of the verifier's."""

    name: Literal["mix"] = "mix"
    alpha: float = Field(0.5, ge=0, le=1)
    """The teacher's part."""

    @property
    def scores(self) -> bool:
        """At alpha = 0 nobody is asked."""
        return self.alpha > 0

    @property
    def needs(self) -> frozenset[Need]:
        """Verdicts of several answers, below alpha = 1."""
        return super().needs | {"verdict", "group"} if self.alpha < 1 else super().needs

    def advantages(self, verdicts: Sequence[float | None]) -> Float[Tensor, " G"]:
        """A_i."""
        return group_advantage(verdicts)

    def credit(self, e: Evidence) -> PerToken:
        """A_t."""
        return self.alpha * e.d + (1 - self.alpha) * e.advantage

    def info(self, e: Evidence, worth: PerToken) -> dict[str, PerToken]:
        """How large the two terms are: alpha weighs their sizes as well as their directions."""
        verifier = torch.full_like(e.d, (1 - self.alpha) * e.advantage)
        return super().info(e, worth) | {"term/teacher_rms": self.alpha * e.d, "term/verifier_rms": verifier}
