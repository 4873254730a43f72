"""Distillation from a teacher that only writes text, by chunk agreement (OmniOPD, arXiv:2606.01476).

    H_t   = -sum_v pi_old(v | h_t) log pi_old(v | h_t)           of the distribution that produced y_t         (Eq. 6)
    c     = C tokens from each of the M positions of largest H, none overlapping                               (Eq. 7)
    k_c   = sum_i phi(y_c, u_i),   u_1..u_N ~ pi_T(. | x, y_<c)  N texts; the teacher never sees y_c            (Eq. 3)
    p_c   = exp( mean_{t in c} log pi_old(y_t | h_t) )                                                         (Eq. 4)
    w_c   = (k_c + alpha p_c) / (N + alpha)                      in [0, 1]; no gradient                        (Eq. 5)
    L     = 1/n [ - sum_c w_c sum_{t in c} log pi_theta(y_t | h_t)
                  + beta sum_{t in no c} KL( pi_ref(. | h_t) || pi_theta(. | h_t) ) ]                          (Eq. 8)

n counts all response tokens, for both terms: dividing each by its own count would change the exchange rate beta by
|U| / (M C). pi_ref is the student's frozen initial weights. Read as a policy gradient, w_c is a reward without a
baseline: the loss never pushes a chunk down, it only reinforces some less than others.

The paper leaves open, and we take: the anchor is the first token of its chunk; overlapping chunks are skipped
(`overlap`); ties go to the earlier position; C counts student tokens (`unit`); phi sees texts stripped of white space.
The defaults are the paper's, for answers of thousands of tokens. Short answers need short chunks, or the one wrong
character in a chunk drowns in the right ones: see docs/omniopd.md.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from pydantic import Field, field_validator

from potstill.chunks import Overlap, Scheduler, chunk_prior, chunk_target, plan_chunks
from potstill.divergence import forward_kl
from potstill.errors import ConfigError, TeacherError, TrainingError
from potstill.methods.base import Method, Metrics, Need, Policy
from potstill.seeds import derive
from potstill.similarity import get as similarity
from potstill.types import Ask, Audit, Batch, Feedback, Reviewed, Rollout, Target, Wants


class OmniOPD(Method):
    """Chunks at the student's most uncertain tokens, weighed by how alike the teacher would have gone on."""

    name: Literal["omniopd"] = "omniopd"
    chunks: int = Field(10, gt=0)
    """M, at most this many chunks per rollout."""
    continuations: int = Field(10, gt=0)
    """N, teacher samples per chunk."""
    chunk_length: int = Field(50, gt=0)
    """C, tokens per chunk."""
    alpha: float = Field(1.0, ge=0)
    """Weight of the student's own belief, in samples."""
    beta: float = Field(0.1, ge=0)
    """Weight of the KL to the initial student outside the chunks. At 0 the paper's run collapses (Table 6)."""
    similarity: Literal["edit", "rouge1", "exact", "token_f1", "embedding"] = "edit"
    """phi. `edit`: characters; `exact` suits chunks of a few tokens."""
    scheduler: Scheduler = "peak_entropy"
    """Where chunks go: at the largest entropies, at even distances, or at random."""
    overlap: Overlap = "skip"
    """Where two anchors are closer than C: take the next position, merge the chunks, or draw another position."""
    unit: Literal["student", "teacher"] = "student"
    """Whose tokens the teacher's C counts."""

    @field_validator("similarity")
    @classmethod
    def _installed(cls, name: str) -> str:
        similarity(name)
        return name

    @property
    def wants(self) -> Wants:
        """Text."""
        return Wants.TEXT

    @property
    def needs(self) -> frozenset[Need]:
        """Entropies to choose the chunks, the initial student to stay close to, a teacher that samples."""
        needs: set[Need] = set()
        if self.scheduler == "peak_entropy":
            needs.add("entropy")
        if self.beta > 0:
            needs.add("reference")
        if self.continuations > 1:
            needs.add("variety")
        return frozenset(needs)

    def check(self, max_tokens: int) -> None:
        """Chunks must fit into an answer."""
        if self.chunk_length > max_tokens:
            raise ConfigError(
                f"method.chunk_length = {self.chunk_length} is longer than the longest answer, rollouts.max_tokens = "
                f"{max_tokens}, so nothing would be audited. Lower the one or raise the other"
            )

    def asks(self, rollout: Rollout) -> list[Ask]:
        """One question per chunk, in ascending order: how would you go on here, N times?"""
        if rollout.entropy is None and "entropy" in self.needs:
            raise TrainingError(
                f"omniopd chooses chunks by entropy, but rollout {rollout.key} has none: its sampler does not return "
                'them. Use a sampler that does, or set method.scheduler = "uniform"'
            )
        plan = plan_chunks(
            rollout.entropy or [0.0] * len(rollout.response_ids),
            self.chunks,
            self.chunk_length,
            scheduler=self.scheduler,
            overlap=self.overlap,
            seed=derive(rollout.seed, "chunks"),
        )
        return [
            Ask(
                rollout=rollout,
                view=rollout.prompt,
                wants=Wants.TEXT,
                start=chunk.start,
                length=chunk.length,
                n=self.continuations,
                unit=self.unit,
            )
            for chunk in plan
        ]

    def audit(self, feedback: Feedback) -> Audit:
        """k_c, p_c and w_c of one chunk (Eq. 3-5). Raises TeacherError when answers are missing."""
        ask = feedback.ask
        assert ask.length is not None and ask.rollout.old_logp is not None
        if len(feedback.texts) != self.continuations:
            raise TeacherError(
                f"teacher {feedback.teacher!r} returned {len(feedback.texts)} of {self.continuations} continuations for "
                f"rollout {ask.rollout.key} at token {ask.start}; a missing answer would count as disagreement. "
                "Let the teacher repeat failed requests, or lower method.continuations"
            )
        phi = similarity(self.similarity)
        mine = ask.rollout.text(ask.start, ask.length)
        alike = tuple(phi(mine.strip(), text.strip()) for text in feedback.texts)
        k_sem = sum(alike)
        pi_bar = chunk_prior(ask.rollout.old_logp[ask.start : ask.start + ask.length])
        return Audit(
            start=ask.start,
            length=ask.length,
            text=mine,
            continuations=feedback.texts,
            similarity=alike,
            k_sem=k_sem,
            pi_bar=pi_bar,
            target=chunk_target(k_sem, pi_bar, self.continuations, self.alpha),
        )

    def targets(self, group: Sequence[Reviewed]) -> list[Target]:
        """w_c on audited tokens, the anchor on all others; a rollout too short to audit is only anchored."""
        out: list[Target] = []
        for r in group:
            length = len(r.rollout.response_ids)
            audits = tuple(self.audit(f) for f in sorted(r.feedback, key=lambda f: f.ask.start))
            inside, target = torch.zeros(length), torch.zeros(length)
            seen = {key: torch.full((length,), torch.nan) for key in ("agreement", "prior", "target", "spread")}
            for a in audits:
                tokens = slice(a.start, a.start + a.length)
                inside[tokens], target[tokens] = 1.0, a.target
                seen["agreement"][tokens] = a.k_sem / len(a.similarity)
                seen["prior"][tokens] = a.pi_bar
                seen["target"][tokens] = a.target
                seen["spread"][tokens] = float(np.std(a.similarity))
            info = {**seen, "audited": inside}
            out.append(Target(source=r, weight=inside, anchor=1 - inside, advantage=target, info=info, audits=audits))
        return out

    def loss(self, policy: Policy, batch: Batch) -> tuple[torch.Tensor, Metrics]:
        """Eq. 8, both terms over one count."""
        assert batch.advantage is not None and batch.anchor is not None
        chunks = -(batch.weight * batch.advantage * policy.logp(batch.labels)).sum() / batch.n_tokens
        if self.beta == 0:
            return chunks, {"chunk_loss": chunks.detach()}
        kl = forward_kl(policy.logp_all(), policy.reference.logp_all())
        drift = (batch.anchor * kl).sum() / batch.n_tokens
        return chunks + self.beta * drift, {"chunk_loss": chunks.detach(), "reference_kl": drift.detach()}
