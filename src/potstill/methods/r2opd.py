"""The verdict weighs every token smoothly instead of gating it (R2-OPD, arXiv:2609.35517).

    d_t = log pi_T(y_t | h_t) - log pi_old(y_t | h_t)
    z   = 2 R - 1                                               R: the verifier's score
    w_t = sigmoid(beta z d_t / nu),   nu = max(median |d|, eps)
    A_t = Z w_t d_t,   Z = sum |d| / sum w |d|                   Z keeps the size of the whole
    L as in methods/token_credit.py

Median and sums are taken over the tokens of one answer here. beta and eps are as a note on the paper gives them; at such
a small beta all w are nearly 1/2, and the method is nearly `sampled_kl`.
"""

from collections.abc import Sequence
from typing import Literal

from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from potstill.credit import PerToken, outcome
from potstill.methods.base import Need
from potstill.methods.token_credit import Evidence, TokenCredit


class R2OPD(TokenCredit):
    """Tokens on which teacher and verdict agree weigh more, the sum of sizes staying the same."""

    name: Literal["r2opd"] = "r2opd"
    beta: float = Field(1e-3, ge=0)
    """How sharply agreement counts; 0: not at all."""
    eps: float = Field(1e-8, gt=0)
    """Smallest nu."""

    @property
    def needs(self) -> frozenset[Need]:
        """Verdicts."""
        return super().needs | {"verdict"}

    def advantages(self, verdicts: Sequence[float | None]) -> Float[Tensor, " G"]:
        """z."""
        return outcome(verdicts)

    def credit(self, e: Evidence) -> PerToken:
        """A_t."""
        nu = e.d.abs().median().clamp(min=self.eps)
        w = (self.beta * e.advantage * e.d / nu).sigmoid()
        total = (w * e.d.abs()).sum()
        return w * e.d * (e.d.abs().sum() / total if total > 0 else 1.0)
