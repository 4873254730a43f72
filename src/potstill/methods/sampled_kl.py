"""On-policy distillation by policy gradient on the sampled token (thinkingmachines.ai/blog/on-policy-distillation).

    y ~ pi_old(. | x),   h_t = (x, y_<t)
    d_t = log pi_T(y_t | h_t) - log pi_old(y_t | h_t)           > 0: the teacher likes the token more than the student
    A_t = sum_{i >= t} gamma^(i - t) d_i                         no gradient
    r_t = min(pi_theta(y_t | h_t) / pi_old(y_t | h_t), cap)
    L   = -1/N sum_t r_t A_t                                     N = response tokens of the whole batch

gamma = 0 treats every token as its own problem: in expectation the gradient of sum_t KL(pi(.|h_t) || pi_T(.|h_t)) with
the prefixes held fixed. gamma = 1 is the gradient of the KL between whole answers. They are different objectives that
other libraries call by one name.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field

from potstill.credit import discounted
from potstill.methods.base import Method, Metrics, Policy, whole
from potstill.types import Ask, Batch, Reviewed, Rollout, Target, Wants


class SampledKL(Method):
    """Reverse KL estimated from the sampled token alone; needs one number per token from the teacher."""

    name: Literal["sampled_kl"] = "sampled_kl"
    gamma: float = Field(0.0, ge=0, le=1)
    """How much a token answers for the divergence that follows it."""
    cap: float = Field(2.0, gt=0)
    """Upper bound on the importance ratio; above it a token has no gradient."""

    @property
    def wants(self) -> Wants:
        """log pi_T(y_t | h_t)."""
        return Wants.SAMPLED

    def asks(self, rollout: Rollout) -> list[Ask]:
        """One question: how likely was every token?"""
        return whole(rollout, self.wants)

    def targets(self, group: Sequence[Reviewed]) -> list[Target]:
        """A_t of every token."""
        out: list[Target] = []
        for r in group:
            if not r.feedback:
                continue
            d = torch.from_numpy(r.only.sampled) - torch.tensor(r.rollout.old_logp)
            out.append(
                Target(
                    source=r,
                    weight=torch.ones_like(d),
                    advantage=discounted(d, self.gamma),
                    info={"teacher_kl": -d},
                )
            )
        return out

    def loss(self, policy: Policy, batch: Batch) -> tuple[torch.Tensor, Metrics]:
        """-r_t A_t, over N."""
        assert batch.advantage is not None and batch.old_logp is not None
        ratio = (policy.logp(batch.labels) - batch.old_logp).exp()
        capped = ratio.clamp(max=self.cap)
        loss = -(batch.weight * capped * batch.advantage).sum() / batch.n_tokens
        return loss, {"ratio_max": (ratio.detach() * batch.mask).max()}
