"""Distillation from a teacher that only writes text, by chunk agreement (OmniOPD, arXiv:2606.01476).

    H_t   = -sum_v pi_old(v | h_t) log pi_old(v | h_t)           of the distribution that produced y_t         (Eq. 6)
    c     = C tokens from each of the M positions of largest H, none overlapping                               (Eq. 7)
    k_c   = sum_i phi(y_c, u_i),   u_1..u_N ~ pi_T(. | x, y_<c)  N texts; the teacher never sees y_c            (Eq. 3)
    p_c   = exp( mean_{t in c} log pi_old(y_t | h_t) )                                                         (Eq. 4)
    w_c   = (k_c + alpha p_c) / (N + alpha)                      in [0, 1]; no gradient                        (Eq. 5)
    L     = 1/n [ - sum_c w_c sum_{t in c} log pi_theta(y_t | h_t)
                  + beta sum_{t in no c} KL( pi_ref(. | h_t) || pi_theta(. | h_t) ) ]                          (Eq. 8)

n counts all response tokens, for both terms: dividing each by its own count would change the exchange rate beta by
|U| / (M C). With `dagger` it also counts the continuations, each by its share 1/N. pi_ref is the student's frozen initial
weights. Read as a policy gradient, w_c is a reward without a baseline: the loss never pushes a chunk down, it only
reinforces some less than others.

The paper leaves open, and we take: the anchor is the first token of its chunk; overlapping chunks are skipped
(`overlap`); ties go to the earlier position; C counts student tokens (`unit`); phi sees texts stripped of white space.
The defaults are the paper's, for answers of thousands of tokens. Short answers need short chunks, or the one wrong
character in a chunk drowns in the right ones: see docs/omniopd.md.

Not in the paper, all off by default, to learn more from the same answers:

    w_c - b_c in place of w_c, b_c a control variate                                                           (baseline)
      mean           the mean of w over the group's chunks; holds w_c itself and what depends on it, so it is biased
      leave_one_out  the same without c and without later chunks of the same answer, which depend on y_c; 0 if none is left
      own            1/(J (N + alpha)) sum_ij phi(v_j, u_i),  v_1..v_J ~ pi_old(. | x, y_<c), the student's own
    - dagger * sum_c 1/N sum_i log pi_theta(u_i | x, y_<c)       added to the sum: imitation, as in method dagger (dagger)
    min(pi_theta(y_t) / pi_old(y_t), cap) w_c                    for several updates on one rollout         (max_ratio)
    N_c = the first n with sd Beta(1 + k_c, 1 + n - k_c) <= sd   at most N, 2 more each time                   (narrow)

`leave_one_out` and `own` leave the expected gradient as it is where the places of the chunks do not depend on what is
written in them; with "peak_entropy" they do, a little. `max_ratio` corrects each token by itself, as PPO does: exact for
chunks of one token. `narrow` stops where the answers agree, so it pushes w_c towards 0 and 1.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field, field_validator

from potstill.errors import ConfigError
from potstill.methods.audited import Audited, audit, branches_of, by_chunk, demand, imitated, info_of
from potstill.methods.base import Metrics, Policy
from potstill.similarity import get as similarity
from potstill.types import Ask, Audit, Batch, Feedback, Reviewed, Rollout, Target

ROUND = 2
"""Continuations asked for at once where N is found one after the other: two that agree can already be enough."""


class OmniOPD(Audited):
    """Chunks at the student's most uncertain tokens, weighed by how alike the teacher would have gone on."""

    name: Literal["omniopd"] = "omniopd"
    alpha: float = Field(1.0, ge=0)
    """Weight of the student's own belief, in samples."""
    beta: float = Field(0.1, ge=0)
    """Weight of the KL to the initial student outside the chunks. At 0 the paper's run collapses (Table 6)."""
    similarity: Literal["edit", "rouge1", "exact", "token_f1", "embedding"] = "edit"
    """phi. `edit`: characters; `exact` suits chunks of a few tokens."""
    baseline: Literal["none", "mean", "leave_one_out", "own"] = "none"
    """What is subtracted from a chunk's weight, so that it can also be pushed down."""
    alternatives: int = Field(1, gt=0)
    """J, the student's own continuations per chunk, for baseline = "own". They cost no teacher token."""
    dagger: float = Field(0.0, ge=0)
    """Weight of the likelihood of the teacher's continuations: the mix with method dagger."""
    max_ratio: float | None = Field(None, ge=1)
    """Weigh tokens by pi_theta / pi_old, at most this, for learner.updates > 1 or rollouts.ahead; unset: as if on-policy."""
    narrow: float = Field(0.0, ge=0, lt=0.223)
    """Stop asking about a chunk when its agreement is known to this standard deviation; 0: always ask N times. Two texts of
    which one agrees leave 0.224, so above that two would always do."""

    @field_validator("similarity")
    @classmethod
    def _installed(cls, name: str) -> str:
        similarity(name)
        return name

    @property
    def imitates(self) -> bool:
        """In the mix with dagger."""
        return self.dagger > 0

    @property
    def asks_again(self) -> bool:
        """Until the agreement is known, if that is to be found out."""
        return self.narrow > 0

    @property
    def stands_age(self) -> bool:
        """With the ratio."""
        return self.max_ratio is not None

    def check(self, max_tokens: int, *, group: int, updates: int) -> None:
        """Chunks must fit, and each field must be able to do something."""
        super().check(max_tokens, group=group, updates=updates)
        if self.alternatives > 1 and self.baseline != "own":
            raise ConfigError(
                f"method.alternatives = {self.alternatives} are the student's own continuations for a baseline, but "
                f'baseline = "{self.baseline}" asks for none. Remove it, or set baseline = "own"'
            )
        if self.baseline in ("mean", "leave_one_out") and self.chunks * group == 1:
            raise ConfigError(
                f'method.baseline = "{self.baseline}" compares the chunks of a prompt\'s answers, but method.chunks = 1 and '
                'rollouts.group = 1 leave only one. Raise either, or use baseline = "own"'
            )
        if self.max_ratio and updates == 1:
            raise ConfigError(
                f"method.max_ratio = {self.max_ratio:g} bounds the ratio of later updates on a batch, but "
                "learner.updates = 1, so every ratio is 1. Raise updates, set rollouts.ahead, or remove max_ratio"
            )
        most = (self.continuations - 1) // ROUND * ROUND  # texts after the last round that could end it early
        narrowest = _deviation(0.0, most)
        if self.narrow and (most == 0 or self.narrow < narrowest):
            raise ConfigError(
                f"method.narrow = {self.narrow:g} never ends the asking before method.continuations = {self.continuations}: "
                f"after {most} texts the standard deviation is {narrowest:.3f} at best, so all are always asked for, in more "
                "requests. Raise either, or remove narrow"
            )

    def asks(self, rollout: Rollout) -> list[Ask]:
        """One question per chunk, in ascending order: how would you go on here, N times?"""
        n = min(ROUND, self.continuations) if self.narrow else self.continuations
        asks = self.anchors(rollout, n=n, ids=self.dagger > 0)
        if self.baseline == "own":
            asks += [replace(ask, of="student", n=self.alternatives, ids=False, unit="student") for ask in asks]
        return asks

    def more(self, said: Sequence[Feedback]) -> list[Ask]:
        """The same question again where the answers so far leave the agreement open."""
        if not self.narrow:
            return []
        about: dict[tuple[str, int], list[Feedback]] = {}
        for feedback in said:
            about.setdefault(feedback.ask.rollout.key, []).append(feedback)
        open_ = [chunk for mine in about.values() for chunk in by_chunk(mine) if not self._known(chunk)]
        return [replace(c[-1].ask, first=n, n=min(ROUND, self.continuations - n)) for c in open_ for n in [_texts(c)]]

    def _known(self, said: Sequence[Feedback]) -> bool:
        """Whether enough texts are there: N, or a Beta posterior (from an even prior) that is narrow enough."""
        n, k = _texts(said), audit(said, similarity(self.similarity), self.alpha).k_sem
        return n >= self.continuations or _deviation(k, n) <= self.narrow

    def audits(self, r: Reviewed) -> list[Audit]:
        """The chunks of one rollout; without baseline, or with the student's own. Raises TeacherError if texts are missing.

        Where texts were asked for one after the other, those that came count.
        """
        phi, out = similarity(self.similarity), []
        own = {f.ask.start: f.texts for f in r.feedback if f.ask.of == "student"}
        for chunk in by_chunk(r.feedback):
            if not self.narrow:
                demand(chunk, self.continuations)
            a = audit(chunk, phi, self.alpha)
            if self.baseline == "own":
                pairs = [phi(v.strip(), u.strip()) for v in own[a.start] for u in a.continuations]
                a = replace(a, baseline=sum(pairs) / len(own[a.start]) / (len(a.similarity) + self.alpha))
            out.append(a)
        return out

    def _with_baseline(self, group: Sequence[Sequence[Audit]]) -> list[list[Audit]]:
        """The means over chunks of a group, which have to see all of it."""
        if self.baseline in ("none", "own"):
            return [list(audits) for audits in group]
        everything = [a.target for audits in group for a in audits]

        def others(i: int, j: int) -> list[float]:
            return [a.target for k, audits in enumerate(group) for a in (audits if k != i else audits[:j])]

        return [
            [
                replace(a, baseline=_mean(everything if self.baseline == "mean" else others(i, j)))
                for j, a in enumerate(row)
            ]
            for i, row in enumerate(group)
        ]

    def targets(self, group: Sequence[Reviewed]) -> list[Target]:
        """w_c - b_c on audited tokens, the anchor on all others; a rollout too short to audit is only anchored."""
        out: list[Target] = []
        for r, audits in zip(group, self._with_baseline([self.audits(r) for r in group]), strict=True):
            info = info_of(audits, len(r.rollout.response_ids))
            advantage = torch.zeros(len(r.rollout.response_ids))
            for a in audits:
                advantage[a.start : a.start + a.length] = a.target - a.baseline
            if self.baseline != "none":
                info["baseline"] = torch.where(info["audited"] > 0, info["target"] - advantage, torch.nan)
            out.append(
                Target(
                    source=r,
                    weight=info["audited"],
                    anchor=1 - info["audited"],
                    advantage=advantage,
                    info=info,
                    audits=tuple(audits),
                    continuations=tuple(c for chunk in by_chunk(r.feedback) for c in branches_of(chunk)),
                )
            )
        return out

    def loss(self, policy: Policy, batch: Batch) -> tuple[torch.Tensor, Metrics]:
        """Eq. 8, both terms over one count, and what was added to it."""
        assert batch.advantage is not None
        logp, credit, seen = policy.logp(batch.labels), batch.weight * batch.advantage, Metrics()
        if self.max_ratio:
            ratio = (logp.detach() - batch.old_logp).exp()
            credit = credit * ratio.clamp(max=self.max_ratio)
            seen = {
                "ratio_max": (ratio * (batch.weight != 0)).max(),
                "ratio_outside": ((ratio > self.max_ratio) & (batch.weight != 0)).sum() / batch.n_tokens,
            }
        chunks = -(credit * logp).sum() / batch.n_tokens
        loss, seen["chunk_loss"] = chunks, chunks.detach()
        if self.beta > 0:
            drift = self.drift(policy, batch)
            loss, seen["reference_kl"] = loss + self.beta * drift, drift.detach()
        if self.dagger > 0:
            imitation = imitated(policy, batch)
            loss, seen["imitation_loss"] = loss + self.dagger * imitation, imitation.detach()
        return loss, seen


def _deviation(k: float, n: int) -> float:
    """Standard deviation of Beta(1 + k, 1 + n - k)."""
    a, b = 1 + k, 1 + n - k
    return math.sqrt(a * b / (a + b + 1)) / (a + b)


def _texts(said: Sequence[Feedback]) -> int:
    return sum(len(f.texts) for f in said)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
