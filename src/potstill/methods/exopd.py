"""Beyond the teacher, along the line from a reference through it (ExOPD, arXiv:2602.12125).

    d_t = log pi_T(y_t | h_t) - log pi_old(y_t | h_t)
    A_t = d_t + (lam - 1) (log pi_T - log pi_ref)(y_t | h_t)
    L as in methods/token_credit.py

The optimum is pi_T^lam pi_ref^(1 - lam) / Z: lam = 1 is the teacher, lam > 1 lies beyond it, lam < 1 between it and the
reference. The paper uses 1.25 throughout and finds 1.5 unstable. pi_ref is the initial student ("start"), or the teacher
before its RL ("base", table [reference]), which the paper calls reward correction.
"""

from typing import Literal

import torch
from pydantic import Field

from potstill.credit import PerToken, extrapolated
from potstill.methods.token_credit import Evidence, TokenCredit


class ExOPD(TokenCredit):
    """The teacher's signal, extrapolated from a reference."""

    name: Literal["exopd"] = "exopd"
    lam: float = Field(1.25, ge=0)
    """How far along the line: 0 the reference, 1 the teacher."""
    reference: Literal["start", "base"] = "start"
    """Where the line starts: the initial student, or the model of [reference]."""

    @property
    def refers_to(self) -> Literal["start", "base"] | None:
        """pi_ref."""
        return self.reference

    def credit(self, e: Evidence) -> PerToken:
        """A_t."""
        return extrapolated(e.d, e.gap, torch.full_like(e.d, self.lam))
