"""What all methods that give credit to single tokens share: evidence in, advantages out, a clipped policy gradient.

    r_t = pi_theta(y_t | h_t) / pi_old(y_t | h_t)
    l_t = max(-A_t r_t, -A_t clip(r_t, 1 - clip_low, 1 + clip_high))       A_t >= 0     PPO, arXiv:1707.06347
        = min(that, -A_t dual_clip)                                        A_t < 0      arXiv:1912.09729
    L   = 1/N sum_t l_t                                   N = tokens of the whole batch (`mean` = "token")
        = 1/R sum_i 1/T_i sum_t l_t                       R = answers of the whole batch (`mean` = "sequence")
    L  += mu / N sum over the teacher's own tokens of -log pi_theta(y_t | h_t)                  (`phased`)

With one update per batch (`learner.updates` = 1) r_t is 1 but for rounding, and the clip never acts.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from potstill.credit import PerToken, agrees
from potstill.divergence import forward_kl, with_rest
from potstill.methods.base import Method, Metrics, Need, Policy, whole
from potstill.phased import Phased
from potstill.types import Ask, Batch, Reviewed, Rollout, Target, Wants


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """All that is known about one of the student's answers. Log-probs in nats; what nobody was asked for is 0."""

    rollout: Rollout
    advantage: float
    """A_i."""
    old_logp: PerToken
    teacher_logp: PerToken
    d: PerToken
    """teacher_logp - old_logp, at most `limit` in size."""
    gap: PerToken
    """teacher_logp - ref_logp, at most `limit` in size."""


class TokenCredit(Method):
    """A_t for every token of the student's answers; a subclass says how."""

    clip_low: float = Field(0.2, ge=0, lt=1)
    """A ratio below 1 - clip_low earns nothing more. Acts from the second update of a batch on."""
    clip_high: float = Field(0.2, ge=0)
    """A ratio above 1 + clip_high earns nothing more; larger than clip_low lets rare tokens grow (DAPO)."""
    dual_clip: float = Field(3.0, gt=1)
    """Bounds the loss of a token with a negative advantage whose ratio explodes."""
    mean: Literal["token", "sequence"] = "token"
    """`token`: every token weighs the same. `sequence`: every answer does."""
    limit: float = Field(10.0, gt=0)
    """Largest log-ratio taken as it is, nats; it keeps signs."""
    phased: Phased = Phased(share=0)
    """Verified teacher answers at the start of the run."""

    @property
    def scores(self) -> bool:
        """Whether the teacher's log-probs enter the credit."""
        return True

    @property
    def wants(self) -> Wants:
        """log pi_T(y_t | h_t), where it enters; more on the teacher's own answers, if these are learnt by `topk`."""
        if self.examples and self.examples.loss == "topk":
            return Wants.TOPK
        return Wants.SAMPLED if self.scores else Wants.NOTHING

    @property
    def needs(self) -> frozenset[Need]:
        """Verdicts where the teacher's answers are to be verified, the frozen student where credit refers to it."""
        needs: set[Need] = set()
        if self.examples:
            needs.add("verdict")
        if self.refers_to == "start":
            needs.add("reference")
        return frozenset(needs)

    @property
    def examples(self) -> Phased | None:
        """The schedule of the teacher's own answers."""
        return self.phased if self.phased.share else None

    def asks(self, rollout: Rollout) -> list[Ask]:
        """How likely was every token of the student? What else would the teacher have written in its own answer?"""
        asks: list[Ask] = []
        by_student = rollout.author == "student"
        if self.phased.loss == "topk" and (not by_student or rollout.guided):
            asks += whole(rollout, Wants.TOPK, k=self.phased.top_k)
        elif by_student and self.scores:
            asks += whole(rollout, Wants.SAMPLED)
        if by_student and self.refers_to:
            asks += whole(rollout, Wants.SAMPLED, of="reference")
        return asks

    def advantages(self, verdicts: Sequence[float | None]) -> Float[Tensor, " G"]:
        """A_i of the student's answers to one prompt; 0 where the verifier has no say."""
        return torch.zeros(len(verdicts))

    @abstractmethod
    def credit(self, e: Evidence) -> PerToken:
        """A_t, no gradient."""

    def targets(self, group: Sequence[Reviewed]) -> list[Target]:
        """A_t on the student's tokens, likelihood on the teacher's."""
        mine = [r for r in group if r.rollout.author == "student"]
        advantages = self.advantages([r.rollout.verdict for r in mine])
        known = [(r, a.item()) for r, a in zip(mine, advantages, strict=True) if r.rollout.response_ids]
        theirs = [r for r in group if r.rollout.author != "student" and r.rollout.response_ids]
        return [self._corrected(r, a) for r, a in known] + [self._imitated(r) for r in theirs]

    def evidence(self, r: Reviewed, advantage: float) -> Evidence:
        """What was said about an answer, in one place."""
        assert r.rollout.old_logp is not None
        old = torch.tensor(r.rollout.old_logp)
        teacher, reference = r.said(), r.said("reference")
        scores = torch.zeros_like(old) if teacher is None else torch.from_numpy(teacher.sampled)
        gap = torch.zeros_like(old) if reference is None else scores - torch.from_numpy(reference.sampled)
        return Evidence(
            rollout=r.rollout,
            advantage=advantage,
            old_logp=old,
            teacher_logp=scores,
            d=torch.zeros_like(old) if teacher is None else (scores - old).clamp(-self.limit, self.limit),
            gap=gap.clamp(-self.limit, self.limit),
        )

    def _corrected(self, r: Reviewed, advantage: float) -> Target:
        e = self.evidence(r, advantage)
        own = torch.ones_like(e.old_logp)
        own[: r.rollout.guided] = 0.0
        share, worth = self._share(r.rollout), self.credit(e)
        ids, logp = _top(r)
        return Target(
            source=r,
            weight=own * share,
            advantage=worth * own,
            imitate=(1 - own) * share * self.phased.weight if r.rollout.guided else None,
            info={name: torch.where(own > 0, v, torch.nan) for name, v in self.info(e, worth).items()},
            teacher_ids=ids,
            teacher_logp=logp,
        )

    def _imitated(self, r: Reviewed) -> Target:
        every = torch.ones(len(r.rollout.response_ids))
        weight = every * self._share(r.rollout) * self.phased.weight
        ids, logp = _top(r)
        return Target(
            source=r, weight=0 * every, advantage=0 * every, imitate=weight, teacher_ids=ids, teacher_logp=logp
        )

    def _share(self, rollout: Rollout) -> float:
        return 1.0 if self.mean == "token" else 1 / len(rollout.response_ids)

    def info(self, e: Evidence, worth: PerToken) -> dict[str, PerToken]:
        """What to log of an answer: its credit, d, and where the verifier has a say, how often they agree."""
        nothing = torch.full_like(e.d, torch.nan)
        seen: dict[str, PerToken] = {"credit": worth.abs()}
        if self.scores:
            seen["teacher_kl"] = -e.d
        if self.refers_to:
            seen["reference_gap"] = e.gap.abs()
        if self.scores and e.advantage:
            same = agrees(e.advantage, e.d)
            kind = "correct" if e.advantage > 0 else "wrong"
            seen |= {"consensus": same, f"consensus/{kind}": same, f"conflict/{kind}": 1 - same}
            seen |= {"d/consensus": torch.where(same > 0, e.d, nothing)}
            seen |= {"d/conflict": torch.where(same > 0, nothing, e.d)}
        return seen

    def loss(self, policy: Policy, batch: Batch) -> tuple[Tensor, Metrics]:
        """The clipped policy gradient on the student's tokens, and likelihood on the teacher's."""
        assert batch.advantage is not None
        logp = policy.logp(batch.labels)
        mine = (batch.weight != 0).to(logp.dtype)
        log_ratio = (logp - batch.old_logp) * mine
        ratio, a = log_ratio.exp(), batch.advantage
        clipped = ratio.clamp(1 - self.clip_low, 1 + self.clip_high)
        per_token = torch.maximum(-a * ratio, -a * clipped)
        per_token = torch.where(a < 0, torch.minimum(per_token, -a * self.dual_clip), per_token)
        divisor = batch.n_tokens if self.mean == "token" else batch.n_rollouts
        loss = (batch.weight * per_token).sum() / divisor
        seen = log_ratio.detach()
        metrics: Metrics = {
            "ratio_max": (seen.exp() * mine).max(),
            "ratio_outside": (ratio != clipped).to(logp.dtype).sum() / batch.n_tokens,
            "mismatch": seen.abs().sum() / batch.n_tokens,
        }
        if batch.imitate is not None:
            example = (batch.imitate * self._imitation(policy, batch, logp)).sum() / divisor
            loss, metrics["example_loss"] = loss + example, example.detach()
        return loss, metrics

    def _imitation(self, policy: Policy, batch: Batch, logp: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
        if batch.teacher_ids is None or batch.teacher_logp is None:
            return -logp
        return forward_kl(with_rest(policy.logp_at(batch.teacher_ids)), with_rest(batch.teacher_logp))


def _top(r: Reviewed) -> tuple[Tensor | None, Tensor | None]:
    """The teacher's likeliest tokens and their log-probs, where it was asked for them."""
    said = r.said()
    if said is None or said.topk_ids is None or said.topk_logp is None:
        return None, None
    return torch.from_numpy(said.topk_ids), torch.from_numpy(said.topk_logp)
