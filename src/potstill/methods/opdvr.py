"""The teacher's signal where its sign is the verdict's, nothing elsewhere (OPDVR, arXiv:2608.24696).

    d_t = log pi_T(y_t | h_t) - log pi_old(y_t | h_t)
    z   = 2 R - 1                                               R: the verifier's score
    A_t = z max(z d_t, 0)                       z = +1: only what the teacher raises; z = -1: only what it lowers
    L as in methods/token_credit.py

The same as `sgopd` with lam = 1, beta = 0 and outcome signs. It ends in a region, not at the teacher. For a score between
0 and 1 only the sign of z counts.
"""

from collections.abc import Sequence
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from potstill.credit import PerToken, outcome, sign_gate
from potstill.methods.base import Need
from potstill.methods.token_credit import Evidence, TokenCredit


class OPDVR(TokenCredit):
    """Only tokens on which teacher and verdict agree."""

    name: Literal["opdvr"] = "opdvr"

    @property
    def needs(self) -> frozenset[Need]:
        """Verdicts."""
        return super().needs | {"verdict"}

    def advantages(self, verdicts: Sequence[float | None]) -> Float[Tensor, " G"]:
        """z."""
        return outcome(verdicts)

    def credit(self, e: Evidence) -> PerToken:
        """A_t."""
        return sign_gate(e.advantage, e.d, 1.0, 0.0) * e.d
