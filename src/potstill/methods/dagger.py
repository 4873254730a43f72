"""Imitation of what the teacher writes at the states that the student visits (DAgger, arXiv:1011.0686).

    y ~ pi_old(. | x);   c = chunks of y, as in omniopd, each with its anchor t_c
    u_1..u_N ~ pi_T(. | x, y_<t_c)                                  up to C tokens; the teacher never sees the chunk
    L = 1/n [ - sum_c 1/N sum_i sum_j log pi_theta(u_ij | x, y_<t_c, u_i,<j)
              + beta sum_{t in no c} KL( pi_ref(. | h_t) || pi_theta(. | h_t) ) ]

The first term is, up to a constant, the forward KL from teacher to student at prefixes that the student wrote, estimated
from text alone. `omniopd` pays for the same texts and learns from them only how much to trust the student's own chunk;
here they are the labels. n counts the tokens of the KL term and those of the continuations, each by its share 1/N. Where
the teacher ends its answer, the student's end token is learnt too. Texts that the teacher wrote twice are computed once.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field

from potstill.methods.audited import Audited, audit, branches_of, by_chunk, demand, imitated, info_of
from potstill.methods.base import Metrics, Policy
from potstill.similarity import edit
from potstill.types import Ask, Batch, Reviewed, Rollout, Target


class Dagger(Audited):
    """Likelihood of the teacher's continuations after the student's own prefixes."""

    name: Literal["dagger"] = "dagger"
    continuations: int = Field(1, gt=0)
    """N, teacher samples per chunk. Another chunk teaches more than another sample."""
    beta: float = Field(0.0, ge=0)
    """Weight of the KL to the initial student outside the chunks. The labels are the teacher's: no collapse to prevent."""

    @property
    def imitates(self) -> bool:
        """Yes."""
        return True

    def asks(self, rollout: Rollout) -> list[Ask]:
        """One question per chunk; the answers are wanted in the student's tokens."""
        return self.anchors(rollout, n=self.continuations, ids=True)

    def targets(self, group: Sequence[Reviewed]) -> list[Target]:
        """The continuations as branches; of the rollout itself only the anchor term."""
        out: list[Target] = []
        for r in group:
            length, chunks = len(r.rollout.response_ids), by_chunk(r.feedback)
            for chunk in chunks:
                demand(chunk, self.continuations)
            audits = tuple(audit(chunk, edit, alpha=0.0) for chunk in chunks)  # to look at; nothing is learnt from them
            info = info_of(audits, length)
            del info["target"]  # there is none: the labels are the teacher's
            out.append(
                Target(
                    source=r,
                    weight=torch.zeros(length),
                    anchor=1 - info["audited"] if self.beta > 0 else None,
                    info=info,
                    audits=audits,
                    continuations=tuple(c for chunk in chunks for c in branches_of(chunk)),
                )
            )
        return out

    def loss(self, policy: Policy, batch: Batch) -> tuple[torch.Tensor, Metrics]:
        """Both terms over one count."""
        imitation = imitated(policy, batch)
        seen = {"imitation_loss": imitation.detach()}
        if self.beta == 0:
            return imitation, seen
        drift = self.drift(policy, batch)
        return imitation + self.beta * drift, {**seen, "reference_kl": drift.detach()}
