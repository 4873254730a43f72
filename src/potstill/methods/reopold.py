"""A floor under the teacher's signal, then only uncertain tokens (REOPOLD, arXiv:2603.11137).

    d_t = log pi_T(y_t | h_t) - log pi_old(y_t | h_t)
    A_t = max(d_t, floor) m_t,   floor = log(lam / (1 - lam))
    m_t = 1 if d_t >= floor, else 0                                          up to step `switch`
    m_t = 1 if H_t is among the `keep` share of largest entropies, else 0    from then on
    L as in methods/token_credit.py

H_t is the entropy of the distribution that produced y_t; shares are taken over the tokens of one answer here, the paper
does not say over what as far as we know. keep = 0.2 is the paper's better value; lam and switch are ours.
"""

import math
from typing import Literal

import torch
from pydantic import Field

from potstill.credit import PerToken
from potstill.methods.base import Need
from potstill.methods.token_credit import Evidence, TokenCredit


class REOPOLD(TokenCredit):
    """The teacher's signal without its depths; later on uncertain tokens only."""

    name: Literal["reopold"] = "reopold"
    lam: float = Field(0.1, gt=0, lt=1)
    """Places the floor: 0.1 is -2.2 nats."""
    keep: float = Field(0.2, gt=0, le=1)
    """Share of tokens that learn in the second phase."""
    switch: int = Field(100, ge=0)
    """Steps of the first phase."""

    @property
    def needs(self) -> frozenset[Need]:
        """H_t."""
        return super().needs | {"entropy"}

    def credit(self, e: Evidence) -> PerToken:
        """A_t."""
        floor = math.log(self.lam / (1 - self.lam))
        if e.rollout.policy_version < self.switch:
            learns = e.d >= floor
        else:
            learns = torch.zeros_like(e.entropy, dtype=torch.bool)
            learns[e.entropy.topk(math.ceil(self.keep * len(e.entropy))).indices] = True
        return e.d.clamp(min=floor) * learns
