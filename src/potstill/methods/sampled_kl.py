"""On-policy distillation by policy gradient on the sampled token (thinkingmachines.ai/blog/on-policy-distillation).

    y ~ pi_old(. | x),   h_t = (x, y_<t)
    d_t = log pi_T(y_t | h_t) - log pi_old(y_t | h_t)           > 0: the teacher likes the token more than the student
    A_t = sum_{i >= t} gamma^(i - t) d_i
    L   = -1/N sum_t A_t pi_theta(y_t | h_t) / pi_old(y_t | h_t)      clipped as in methods/token_credit.py

gamma = 0 treats every token as its own problem: in expectation the gradient of sum_t KL(pi(.|h_t) || pi_T(.|h_t)) with
the prefixes held fixed. gamma = 1 is the gradient of the KL between whole answers. They are different objectives that
other libraries call by one name.
"""

from typing import Literal

from pydantic import Field

from potstill.credit import PerToken, discounted
from potstill.methods.token_credit import Evidence, TokenCredit


class SampledKL(TokenCredit):
    """Reverse KL estimated from the sampled token alone; needs one number per token from the teacher."""

    name: Literal["sampled_kl"] = "sampled_kl"
    gamma: float = Field(0.0, ge=0, le=1)
    """How much a token answers for the divergence that follows it."""

    def credit(self, e: Evidence) -> PerToken:
        """A_t."""
        return discounted(e.d, self.gamma)
