"""A difference of powers instead of logarithms: bounded, and of the same sign (PowerOPD, arXiv:2606.17199).

    A_t = pi_T(y_t | h_t)^alpha - pi_old(y_t | h_t)^alpha        between -1 and 1
    L as in methods/token_credit.py

A token that the teacher finds impossible costs at most 1, where its log-ratio would be unbounded. The paper finds every
alpha from 0.1 to 500 better than the log-ratio, and shorter answers with larger ones; which it recommends is not known to
us, and 1 is our choice.
"""

from typing import Literal

from pydantic import Field

from potstill.credit import PerToken
from potstill.methods.token_credit import Evidence, TokenCredit


class PowerOPD(TokenCredit):
    """Bounded credit from the teacher alone."""

    name: Literal["poweropd"] = "poweropd"
    alpha: float = Field(1.0, gt=0)
    """The power."""

    def credit(self, e: Evidence) -> PerToken:
        """A_t."""
        return (self.alpha * e.teacher_logp).exp() - (self.alpha * e.old_logp).exp()
