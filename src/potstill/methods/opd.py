"""On-policy distillation: match the teacher's distribution on what the student writes (GKD, arXiv:2306.13649).

    y ~ pi_old(. | x),   h_t = (x, y_<t)
    S_t = pi_theta(. | h_t)^(1/T_S) / Z,   T_t = pi_T(. | h_t)^(1/T_T) / Z
    L   = 1/N sum_t D_beta(T_t, S_t)                            N = response tokens of the whole batch

    D_0 = KL(T || S), forward;   D_1 = KL(S || T), reverse;   between: the generalised Jensen-Shannon divergence
    D_beta = beta KL(T || m) + (1 - beta) KL(S || m),   m = beta T + (1 - beta) S

The gradient runs through S only, not through the sampling of y. With `top_k`, D runs over the teacher's K likeliest
tokens and one bucket for all others, on both sides, so that it stays a divergence; both temperatures are 1 then.
"""

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator

from potstill.divergence import jsd, overlap, with_rest
from potstill.methods.base import Method, Metrics, Policy, weighed, whole
from potstill.types import Ask, Batch, Reviewed, Rollout, Target, Wants

SOME = 64
"""Tokens whose distributions are made at a time, to be looked at."""


class OPD(Method):
    """Full-vocabulary or top-k divergence to a teacher that shares the student's tokenizer, or is aligned to it."""

    name: Literal["opd"] = "opd"
    reads_hidden: ClassVar[bool] = True
    beta: float = Field(0.5, ge=0, le=1)
    """0: forward KL, covers the teacher. 1: reverse KL, seeks its modes. Between: Jensen-Shannon."""
    top_k: int | None = Field(None, gt=0)
    """Compare only the teacher's K likeliest tokens and the rest as one; unset: the whole vocabulary."""
    teacher_temperature: float = Field(1.0, gt=0)
    """Above 1 flattens the teacher's distribution, below 1 sharpens it."""
    student_temperature: float = Field(1.0, gt=0)
    """The same for the student, in the loss only: rollouts are drawn at 1."""

    @model_validator(mode="after")
    def _tail_is_known(self) -> "OPD":
        if self.top_k and (self.teacher_temperature, self.student_temperature) != (1, 1):
            raise ValueError("top_k cannot go with a temperature: how much the unseen tokens would weigh is not known")
        return self

    @property
    def wants(self) -> Wants:
        """The teacher's distribution, or its top."""
        return Wants.TOPK if self.top_k else Wants.FULL

    def asks(self, rollout: Rollout) -> list[Ask]:
        """One question: what do you think of every token?"""
        return whole(rollout, self.wants, k=self.top_k or 0)

    def targets(self, group: Sequence[Reviewed]) -> list[Target]:
        """Every token of the response counts once, but for those of which the teacher's view is not known."""
        out: list[Target] = []
        for r in group:
            if not r.feedback:
                continue
            f = r.only
            logp = f.logp if f.topk_logp is None else f.topk_logp
            ids = None if f.topk_ids is None else torch.from_numpy(f.topk_ids)
            weight = weighed(f, r.rollout)
            info = {} if f.aligned is None else {"aligned": weight}
            if f.sampled is not None and ids is not None:  # else the loss knows it
                info["teacher_kl"] = _gap(r, torch.from_numpy(f.sampled)).masked_fill(weight == 0, torch.nan)
            out.append(
                Target(
                    source=r,
                    weight=weight,
                    teacher_ids=ids,
                    teacher_logp=None if logp is None else torch.from_numpy(logp),
                    teacher_hidden=None if f.hidden is None else torch.from_numpy(f.hidden),
                    teacher_head=f.head,
                    info=info,
                )
            )
        return out

    def told(self, target: Target) -> dict[str, torch.Tensor]:
        """How far the teacher is from what was written, of every token."""
        ids = torch.tensor(target.rollout.response_ids)[:, None]
        if target.teacher_ids is not None:
            return {}
        if target.teacher_hidden is None or target.teacher_head is None:
            assert target.teacher_logp is not None
            return {"teacher_kl": _gap(target.source, target.teacher_logp.gather(-1, ids)[:, 0])}
        head = target.teacher_head
        logp = [
            head(hidden).log_softmax(-1).cpu().gather(-1, own)
            for hidden, own in zip(target.teacher_hidden.split(SOME), ids.split(SOME), strict=True)
        ]
        return {"teacher_kl": _gap(target.source, torch.cat(logp)[:, 0])}

    def loss(self, policy: Policy, batch: Batch) -> tuple[torch.Tensor, Metrics]:
        """D_beta per token, over N."""
        if batch.teacher_ids is not None:
            assert batch.teacher_logp is not None
            student, teacher = with_rest(policy.logp_at(batch.teacher_ids)), with_rest(batch.teacher_logp)
            loss = (batch.weight * jsd(student, teacher, self.beta)).sum() / batch.n_tokens
            return loss, {"divergence": loss.detach()}
        teacher = batch.teacher_all()
        flat = self.teacher_temperature != 1
        told = (teacher / self.teacher_temperature).log_softmax(-1) if flat else teacher
        divergence = policy.divergence(told, self.beta, self.student_temperature)
        loss = (batch.weight * divergence).sum() / batch.n_tokens
        seen = overlap(policy.logp_all().detach(), teacher)
        seen["teacher_kl"] = batch.old_logp - teacher.gather(-1, batch.labels[..., None])[..., 0]
        means = {name: (batch.weight * value).sum() / batch.n_tokens for name, value in seen.items()}
        return loss, {"divergence": loss.detach(), **means}


def _gap(r: Reviewed, teacher: torch.Tensor) -> torch.Tensor:
    """log pi_old - log pi_T of what was written."""
    return torch.tensor(r.rollout.old_logp) - teacher
