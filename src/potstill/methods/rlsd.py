"""The verifier says which way, the teacher how far (RLSD, arXiv:2604.03128).

    d_t = log pi_T(y_t | h_t) - log pi_old(y_t | h_t)
    A_i = (R_i - mean R) / std R over the answers to the prompt  R: the verifier's score
    A_t = A_i clip(exp(sign(A_i) d_t), 1 - width, 1 + width)

The loss is that of methods/token_credit.py.
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


class RLSD(TokenCredit):
    """GRPO's advantage, a little larger on tokens where the teacher agrees."""

    name: Literal["rlsd"] = "rlsd"
    width: float = Field(0.2, ge=0, lt=1)
    """How far the teacher may move the size of an advantage."""

    @property
    def needs(self) -> frozenset[Need]:
        """Verdicts of several answers."""
        return super().needs | {"verdict", "group"}

    def advantages(self, verdicts: Sequence[float | None]) -> Float[Tensor, " G"]:
        """A_i."""
        return group_advantage(verdicts)

    def credit(self, e: Evidence) -> PerToken:
        """A_t."""
        a = torch.tensor(e.advantage)
        return a * (a.sign() * e.d).exp().clamp(1 - self.width, 1 + self.width)
