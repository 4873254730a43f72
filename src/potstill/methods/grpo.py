"""Reinforcement learning from verdicts, without a teacher (GRPO, arXiv:2402.03300).

    A_i = (R_i - mean R) / std R over the answers to the prompt  R: the verifier's score; `std` off: no division
    A_t = A_i
    L as in methods/token_credit.py, + kl times the same mean of k_t
    k_t = exp(x) - x - 1,   x = log pi_ref(y_t | h_t) - log pi_theta(y_t | h_t)          pi_ref: the initial student

Where all answers to a prompt score alike A_i is 0 and nothing is learnt from them; `rollouts.resample` asks other prompts
instead (DAPO's dynamic sampling, arXiv:2503.14476). clip_high > clip_low is DAPO's asymmetric clip; `mean` = "sequence"
divides by each answer's length first, as GRPO does, "token" does not, as DAPO.
"""

from collections.abc import Sequence
from typing import Literal

from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from potstill.credit import PerToken, group_advantage
from potstill.methods.base import Metrics, Need, Policy
from potstill.methods.token_credit import Evidence, TokenCredit
from potstill.types import Batch


class GRPO(TokenCredit):
    """Every token is worth what its whole answer is, compared with the other answers."""

    name: Literal["grpo"] = "grpo"
    std: bool = True
    """Divide by the standard deviation of the group."""
    kl: float = Field(0.0, ge=0)
    """Weight of the KL to the initial student."""

    @property
    def scores(self) -> bool:
        """The teacher has no say."""
        return False

    @property
    def needs(self) -> frozenset[Need]:
        """Verdicts of several answers; with `kl` the initial student."""
        needs: set[Need] = {"verdict", "group", "reference"} if self.kl else {"verdict", "group"}
        return super().needs | needs

    def advantages(self, verdicts: Sequence[float | None]) -> Float[Tensor, " G"]:
        """A_i."""
        return group_advantage(verdicts, std=self.std)

    def credit(self, e: Evidence) -> PerToken:
        """A_t."""
        return e.old_logp.new_full(e.old_logp.shape, e.advantage)

    def loss(self, policy: Policy, batch: Batch) -> tuple[Tensor, Metrics]:
        """The family's loss, and the KL to the initial student."""
        loss, metrics = super().loss(policy, batch)
        if not self.kl:
            return loss, metrics
        x = policy.reference.logp(batch.labels) - policy.logp(batch.labels)
        drift = self.averaged(batch.weight * (x.exp() - x - 1), batch)
        return loss + self.kl * drift, metrics | {"start_kl": drift.detach()}
