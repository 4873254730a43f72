"""What all methods that give credit to single tokens share: evidence in, advantages out, a clipped policy gradient.

    r_t = pi_theta(y_t | h_t) / pi_old(y_t | h_t)
    l_t = max(-A_t r_t, -A_t clip(r_t, 1 - clip_low, 1 + clip_high))       A_t >= 0     PPO, arXiv:1707.06347
        = min(that, -A_t dual_clip)                                        A_t < 0      arXiv:1912.09729
        = -mu log pi_theta(y_t | h_t)                     on tokens that the teacher wrote (`phased`)
    L   = 1/N sum_t l_t                                   N = trained tokens of the whole batch (`mean` = "token")
        = 1/R sum_i 1/T_i sum_t l_t                       R = answers, T_i = trained tokens of one (`mean` = "sequence")

With one update per batch (`learner.updates` = 1), float32 and no dropout r_t is 1 but for rounding, and the clip never
acts. Updates are over the whole batch; it is not split into minibatches.
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
from potstill.methods.base import Method, Metrics, Need, Policy, weighed, whole
from potstill.phased import Phased
from potstill.types import Ask, Batch, Feedback, Reviewed, Rollout, Target, Wants


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """All that is known about what the student wrote of an answer. In nats; what nobody was asked for is 0."""

    rollout: Rollout
    advantage: float
    """A_i."""
    old_logp: PerToken
    teacher_logp: PerToken
    d: PerToken
    """teacher_logp - old_logp, at most `limit` in size."""
    gap: PerToken
    """teacher_logp - ref_logp, at most `limit` in size."""
    entropy: PerToken
    """Of the distribution that produced the token."""


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
        if self.examples and self.examples.tries > 1:
            needs.add("variety")
        if self.refers_to == "start":
            needs.add("reference")
        return frozenset(needs)

    @property
    def corrects(self) -> bool:
        """As long as its scores enter; for its own answers it is asked only while there are some."""
        return self.scores

    @property
    def examples(self) -> Phased | None:
        """The schedule of the teacher's own answers."""
        return self.phased if self.phased.share else None

    def asks(self, rollout: Rollout) -> list[Ask]:
        """How likely was every token of the student? What else would the teacher have written in its own answer?"""
        asks: list[Ask] = []
        if self.phased.loss == "topk" and (_example(rollout) or rollout.guided):
            asks += whole(rollout, Wants.TOPK, k=self.phased.top_k)
        elif self.scores and not _example(rollout):
            asks += whole(rollout, Wants.SAMPLED)
        if self.refers_to and not _example(rollout):
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
        mine = [r for r in group if not _example(r.rollout)]
        advantages = self.advantages([r.rollout.verdict for r in mine])
        known = [(r, a.item()) for r, a in zip(mine, advantages, strict=True) if r.rollout.response_ids]
        theirs = [r for r in group if _example(r.rollout) and r.rollout.response_ids]
        return [self._corrected(r, a) for r, a in known] + [self._imitated(r) for r in theirs]

    def evidence(self, r: Reviewed, advantage: float) -> Evidence:
        """What was said about an answer, in one place; a beginning that the teacher wrote is left out."""
        own = slice(r.rollout.guided, None)
        assert r.rollout.old_logp is not None
        old = torch.tensor(r.rollout.old_logp[own])

        def said(feedback: Feedback | None) -> PerToken | None:
            return None if feedback is None or feedback.sampled is None else torch.from_numpy(feedback.sampled[own])

        def ratio(a: PerToken | None, b: PerToken | None) -> PerToken:
            return torch.zeros_like(old) if a is None or b is None else (a - b).clamp(-self.limit, self.limit)

        teacher, reference = said(r.said()), said(r.said("reference"))
        known = weighed(r.said(), r.rollout)[own]
        return Evidence(
            rollout=r.rollout,
            advantage=advantage,
            old_logp=old,
            teacher_logp=torch.zeros_like(old) if teacher is None else teacher,
            d=ratio(teacher, old) * known,
            gap=ratio(teacher, reference) * known,
            entropy=torch.zeros_like(old) if r.rollout.entropy is None else torch.tensor(r.rollout.entropy[own]),
        )

    def _corrected(self, r: Reviewed, advantage: float) -> Target:
        e = self.evidence(r, advantage)
        given, said = r.rollout.guided, r.said() if self.scores else None
        known = weighed(said, r.rollout)[given:]
        worth = self.credit(e) * known
        info = {name: values.masked_fill(known == 0, torch.nan) for name, values in self.info(e, worth).items()}
        if said is not None and said.aligned is not None:
            info["aligned"] = known

        def behind(values: PerToken, fill: float) -> Float[Tensor, " whole"]:
            return torch.cat([values.new_full((given,), fill), values])

        ids, logp, taught = _top(r)
        return Target(
            source=r,
            weight=behind(known, 0.0),
            advantage=behind(worth, 0.0),
            imitate=behind(torch.zeros_like(worth), self.phased.weight) * taught if given else None,
            info={name: behind(values, torch.nan) for name, values in info.items()},
            teacher_ids=ids,
            teacher_logp=logp,
        )

    def _imitated(self, r: Reviewed) -> Target:
        nothing = torch.zeros(len(r.rollout.response_ids))
        ids, logp, taught = _top(r)
        return Target(
            source=r,
            weight=nothing,
            advantage=nothing,
            imitate=taught * self.phased.weight,
            teacher_ids=ids,
            teacher_logp=logp,
        )

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
        loss = self.averaged(batch.weight * per_token, batch)
        seen = log_ratio.detach()
        metrics: Metrics = {
            "ratio_max": (seen.exp() * mine).max(),
            "ratio_outside": (ratio != clipped).to(logp.dtype).sum() / batch.n_tokens,
            "mismatch": seen.abs().sum() / batch.n_tokens,
        }
        if batch.imitate is not None:
            example = self.averaged(batch.imitate * self._imitation(policy, batch, logp), batch)
            loss, metrics["example_loss"] = loss + example, example.detach()
        return loss, metrics

    def averaged(self, weighted: Float[Tensor, "B T"], batch: Batch) -> Float[Tensor, ""]:
        """The mean over the trained tokens of the whole batch, or over answers of the mean over theirs."""
        if self.mean == "token":
            return weighted.sum() / batch.n_tokens
        return (weighted / batch.of_answer).sum() / batch.n_rollouts

    def _imitation(self, policy: Policy, batch: Batch, logp: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
        if batch.teacher_ids is None or batch.teacher_logp is None:
            return -logp
        return forward_kl(with_rest(policy.logp_at(batch.teacher_ids)), with_rest(batch.teacher_logp))


def _example(rollout: Rollout) -> bool:
    """Whether the answer is to be imitated: nobody knows how likely the student found it."""
    return rollout.old_logp is None


def _top(r: Reviewed) -> tuple[Tensor | None, Tensor | None, PerToken]:
    """The teacher's likeliest tokens and their log-probs, where it was asked for them; and 1 where they are known."""
    said = r.said()
    if said is None or said.topk_ids is None or said.topk_logp is None:
        return None, None, weighed(None, r.rollout)
    return torch.from_numpy(said.topk_ids), torch.from_numpy(said.topk_logp), weighed(said, r.rollout)
