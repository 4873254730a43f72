"""What methods for teachers that only write have in common: where they ask, and how the student is held back elsewhere.

    H_t  = -sum_v pi_old(v | h_t) log pi_old(v | h_t)            of the distribution that produced y_t   (OmniOPD Eq. 6)
    c    = C tokens from each of the M positions of largest H, none overlapping                          (Eq. 7)
    U    = the tokens that are in no chunk
    A    = sum_{t in U} KL( pi_ref(. | h_t) || pi_theta(. | h_t) )                                       (Eq. 8, second term)

The first token of a chunk is its anchor; the teacher is asked, N times, how it would go on from there, and never sees the
chunk itself. pi_ref is the student's frozen initial weights.
"""

from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field

from potstill.chunks import Overlap, Scheduler, chunk_prior, chunk_target, plan_chunks
from potstill.errors import ConfigError, TeacherError, TrainingError
from potstill.methods.base import Method, Need, Policy
from potstill.seeds import derive
from potstill.similarity import Similarity
from potstill.types import Ask, Audit, Batch, Continuation, Feedback, Rollout, Wants


class Audited(Method):
    """Asks a teacher to go on from the student's most uncertain tokens."""

    chunks: int = Field(10, gt=0)
    """M, at most this many chunks per rollout."""
    continuations: int = Field(10, gt=0)
    """N, teacher samples per chunk."""
    chunk_length: int = Field(50, gt=0)
    """C, tokens per chunk."""
    beta: float = Field(0.1, ge=0)
    """Weight of the KL to the initial student outside the chunks."""
    scheduler: Scheduler = "peak_entropy"
    """Where chunks go: at the largest entropies, at even distances, or at random."""
    overlap: Overlap = "skip"
    """Where two anchors are closer than C: take the next position, merge the chunks, or draw another position."""
    whole_words: bool = False
    """Move each anchor back to where its word begins: for teachers that go on badly from inside one."""
    unit: Literal["student", "teacher"] = "student"
    """Whose tokens the teacher's C counts."""

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

    def check(self, max_tokens: int, *, group: int, updates: int) -> None:
        """Chunks must fit into an answer."""
        if self.chunk_length > max_tokens:
            raise ConfigError(
                f"method.chunk_length = {self.chunk_length} is longer than the longest answer, rollouts.max_tokens = "
                f"{max_tokens}, so nothing would be audited. Lower the one or raise the other"
            )

    def anchors(self, rollout: Rollout, *, n: int, ids: bool) -> list[Ask]:
        """One question per chunk, in ascending order: how would you go on here, `n` times?"""
        if rollout.entropy is None and "entropy" in self.needs:
            raise TrainingError(
                f"{self.name} chooses chunks by entropy, but rollout {rollout.key} has none: its sampler does not return "
                'them. Use a sampler that does, or set method.scheduler = "uniform"'
            )
        plan = plan_chunks(
            rollout.entropy or [0.0] * len(rollout.response_ids),
            self.chunks,
            self.chunk_length,
            scheduler=self.scheduler,
            overlap=self.overlap,
            seed=derive(rollout.seed, "chunks"),
            pieces=rollout.pieces if self.whole_words else None,
        )
        return [
            Ask(
                rollout=rollout,
                view=rollout.prompt,
                wants=Wants.TEXT,
                start=chunk.start,
                length=chunk.length,
                n=n,
                ids=ids,
                unit=self.unit,
            )
            for chunk in plan
        ]

    def drift(self, policy: Policy, batch: Batch) -> Float[torch.Tensor, ""]:
        """A over the batch's divisor: how far the student is from where it began, where nobody was asked."""
        assert batch.anchor is not None
        kl = policy.divergence(policy.reference.logp_all(), beta=0.0)
        return (batch.anchor * kl).sum() / batch.n_tokens


def by_chunk(said: Sequence[Feedback]) -> list[list[Feedback]]:
    """The teacher's answers about one rollout, chunk by chunk, ascending; those of a chunk in the order of its questions."""
    mine = sorted((f for f in said if f.ask.of == "teacher"), key=lambda f: (f.ask.start, f.ask.first))
    return [list(chunk) for _, chunk in groupby(mine, key=lambda f: f.ask.start)]


def demand(said: Sequence[Feedback], n: int) -> None:
    """Raise TeacherError unless the answers about a chunk hold `n` texts: a missing one would count as disagreement."""
    got, ask = sum(len(f.texts) for f in said), said[0].ask
    if got != n:
        raise TeacherError(
            f"teacher {said[0].teacher!r} returned {got} of {n} continuations for rollout {ask.rollout.key} at token "
            f"{ask.start}; a missing answer would count as disagreement. "
            "Let the teacher repeat failed requests, or lower method.continuations"
        )


def audit(said: Sequence[Feedback], phi: Similarity, alpha: float, baseline: float = 0.0) -> Audit:
    """k_c, p_c and w_c of one chunk (OmniOPD Eq. 3-5), from all texts about it."""
    ask = said[0].ask
    assert ask.length is not None and ask.rollout.old_logp is not None
    texts = tuple(text for f in said for text in f.texts)
    mine = ask.rollout.text(ask.start, ask.length)
    alike = tuple(phi(mine.strip(), text.strip()) for text in texts)
    k_sem = sum(alike)
    pi_bar = chunk_prior(ask.rollout.old_logp[ask.start : ask.start + ask.length])
    return Audit(
        start=ask.start,
        length=ask.length,
        text=mine,
        continuations=texts,
        similarity=alike,
        k_sem=k_sem,
        pi_bar=pi_bar,
        target=chunk_target(k_sem, pi_bar, len(texts), alpha),
        baseline=baseline,
    )


def info_of(audits: Sequence[Audit], length: int) -> dict[str, Float[torch.Tensor, " T"]]:
    """What to log of the chunks of one rollout; nan outside of them. `audited` is 1 inside and 0 outside."""
    info = {key: torch.full((length,), torch.nan) for key in ("agreement", "prior", "target", "spread")}
    info["audited"] = torch.zeros(length)
    for a in audits:
        tokens = slice(a.start, a.start + a.length)
        info["agreement"][tokens] = a.k_sem / len(a.similarity)
        info["prior"][tokens] = a.pi_bar
        info["target"][tokens] = a.target
        info["spread"][tokens] = float(np.std(a.similarity))
        info["audited"][tokens] = 1.0
    return info


def branches_of(said: Sequence[Feedback]) -> list[Continuation]:
    """The continuations of one chunk, equal ones once, each with its share."""
    texts = [ids for f in said for ids in f.ids]
    counts = Counter(ids for ids in texts if ids)
    return [Continuation(start=said[0].ask.start, ids=ids, share=n / len(texts)) for ids, n in counts.items()]


def imitated(policy: Policy, batch: Batch) -> torch.Tensor:
    """- sum_c 1/N sum_i log pi_theta(u_i | x, y_<t_c), over n; 0 for a batch without branches."""
    logp = policy.logp(batch.labels)
    if batch.imitate is None:
        return 0.0 * logp.sum()
    return -(batch.imitate * logp).sum() / batch.n_tokens
