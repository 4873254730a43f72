"""OPDVR against the other answers to the prompt: agreement, weighted by the advantage (GRPD, arXiv:2608.24696).

    d_t = log pi_T(y_t | h_t) - log pi_old(y_t | h_t)
    A_i = R_i - mean R over the answers to the prompt            R: the verifier's score; no division by std R
    A_t = |A_i| s max(s d_t, 0),   s = sign A_i

The loss is that of methods/token_credit.py.
"""

from collections.abc import Sequence
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from potstill.credit import PerToken, group_advantage, sign_gate
from potstill.methods.base import Need
from potstill.methods.token_credit import Evidence, TokenCredit


class GRPD(TokenCredit):
    """Only tokens on which teacher and advantage agree, by the size of the advantage."""

    name: Literal["grpd"] = "grpd"

    @property
    def needs(self) -> frozenset[Need]:
        """Verdicts of several answers."""
        return super().needs | {"verdict", "group"}

    def advantages(self, verdicts: Sequence[float | None]) -> Float[Tensor, " G"]:
        """A_i."""
        return group_advantage(verdicts, std=False)

    def credit(self, e: Evidence) -> PerToken:
        """A_t."""
        return abs(e.advantage) * sign_gate(e.advantage, e.d, 1.0, 0.0) * e.d
