"""Teacher and verifier side by side, without a gate: what the gated methods have to beat.

    d_t = log pi_T(y_t | h_t) - log pi_old(y_t | h_t)
    A_i = (R_i - mean R) / std R over the answers to the prompt  R: the verifier's score
    A_t = alpha d_t + (1 - alpha) A_i
    L as in methods/token_credit.py

alpha = 1 is `sampled_kl`, alpha = 0 is `grpo`, to the bit. alpha weighs the sizes of the two terms as well as their
directions, so both are logged: `term/teacher_rms`, `term/verifier_rms`, and the cosine of the two gradients.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from potstill.credit import PerToken, group_advantage
from potstill.methods.base import Need
from potstill.methods.token_credit import Evidence, TokenCredit
from potstill.types import Target

TEACHER, VERIFIER = "term/teacher_rms", "term/verifier_rms"


class Mix(TokenCredit):
    """alpha of the teacher's credit, 1 - alpha of the verifier's."""

    name: Literal["mix"] = "mix"
    alpha: float = Field(0.5, ge=0, le=1)
    """The teacher's part."""
    cosine_every: int = Field(0, ge=0)
    """Steps between logs of the cosine of the two terms' gradients, which costs two backward passes more; 0: none."""

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
        """How large the two terms are, besides what the family logs."""
        verifier = torch.full_like(e.d, (1 - self.alpha) * e.advantage)
        return super().info(e, worth) | {TEACHER: self.alpha * e.d, VERIFIER: verifier}

    def terms(self, targets: Sequence[Target], step: int) -> tuple[Sequence[Target], Sequence[Target]] | None:
        """alpha d_t alone and (1 - alpha) A_i alone, without the teacher's own answers."""
        if not self.cosine_every or step % self.cosine_every:
            return None
        mine = [t for t in targets if TEACHER in t.info]

        def alone(term: str) -> list[Target]:
            return [replace(t, advantage=t.info[term].nan_to_num(), imitate=None) for t in mine]

        return (alone(TEACHER), alone(VERIFIER)) if mine else None
