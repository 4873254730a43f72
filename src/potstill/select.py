"""Which tokens learn: the same for every method, between its targets and the learner.

    H_t  = entropy of the student's distribution, nats
    D_t  = exp(d_t) - d_t - 1,   d_t = log pi_T(y_t | h_t) - log pi_old(y_t | h_t)         estimates KL(student || teacher)
    s_t  = H_t;  D_t;  -d_t (where the student is surest beyond the teacher);  or chance
         = h_t + D_t' - h_t D_t'  with both scaled to 0..1 (TIP, arXiv:2604.14084)
    keep the floor(keep m) largest s_t of the m tokens with a weight, at least one; weight 0 on the others

m counts the tokens of the batch, or of one answer (`over`). Losses are means over the tokens that are kept, so what is
left counts 1 / keep times as much as before. Over answers it counts m / kept times as much in each: the rescaling of
arXiv:2606.07082, Sec. 5, by which an answer weighs what it did whatever floor() took from it.

Scaling is to the range of the batch's m tokens, cut at their 98th percentile. TIP takes the whole divergence for D; one
number per token from the teacher gives this estimate of it.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from potstill.credit import PerToken, k3
from potstill.seeds import derive, uniforms
from potstill.types import Target

By = Literal["entropy", "divergence", "gap", "tip", "random"]
Over = Literal["batch", "answer"]
LARGEST = 10.0
"""Nats: a larger |d_t| ranks as this one."""


def select(targets: Sequence[Target], by: By, keep: float, over: Over = "batch") -> list[Target]:
    """The targets with weight 0 on all but the tokens that score highest over the whole batch, or in each answer."""
    scores = torch.cat([_scores(t, by) for t in targets]) if by != "tip" else _tip(targets)
    lengths = [len(t.weight) for t in targets]
    weights = torch.cat([t.weight for t in targets])
    parts = [len(scores)] if over == "batch" else lengths
    kept = torch.cat([_best(s, w, keep) for s, w in zip(scores.split(parts), weights.split(parts), strict=True)])
    if over == "answer":
        kept = torch.cat([_rescaled(k, w) for k, w in zip(kept.split(lengths), weights.split(lengths), strict=True)])
        kept *= kept.count_nonzero() / kept.sum().clamp(min=1e-12)  # the loss is divided by the tokens kept
    return [replace(t, weight=t.weight * k) for t, k in zip(targets, kept.split(lengths), strict=True)]


def _best(scores: Float[Tensor, " N"], weights: Float[Tensor, " N"], keep: float) -> Float[Tensor, " N"]:
    """1 on the share `keep` of the weighted tokens that score highest."""
    weighted = weights != 0
    count = max(int(keep * int(weighted.sum())), 1)
    kept = torch.zeros_like(scores)
    kept[scores.masked_fill(~weighted, -torch.inf).topk(min(count, len(scores))).indices] = 1.0
    return kept


def _rescaled(kept: PerToken, weights: PerToken) -> PerToken:
    """m / kept on the tokens of an answer that are kept, of its m with a weight."""
    return kept * (weights.count_nonzero() / kept.sum())


def _tip(targets: Sequence[Target]) -> Float[Tensor, " N"]:
    weighted = torch.cat([t.weight for t in targets]) != 0
    h = _scaled(torch.cat([_scores(t, "entropy") for t in targets]), weighted)
    d = _scaled(torch.cat([_scores(t, "divergence") for t in targets]), weighted)
    return h + d - h * d


def _scores(target: Target, by: By) -> PerToken:
    r = target.rollout
    if by == "random":
        return torch.from_numpy(uniforms(derive(r.seed, "select"), len(r.response_ids)))
    if by == "entropy":
        return torch.tensor(r.entropy or [0.0] * len(r.response_ids))
    said = target.source.said()
    if said is None or r.old_logp is None:  # a row that the teacher wrote has no weight to select
        return torch.zeros(len(r.response_ids))
    d = (torch.from_numpy(said.sampled) - torch.tensor(r.old_logp)).clamp(-LARGEST, LARGEST)
    return -d if by == "gap" else k3(d)


def _scaled(values: Float[Tensor, " N"], weighted: Bool[Tensor, " N"]) -> Float[Tensor, " N"]:
    """To 0..1 by the range of the weighted tokens, whose largest 2 % count as the largest of the others."""
    known = values[weighted].sort().values
    if not len(known):
        return values
    top = known[math.ceil(0.98 * len(known)) - 1]
    return ((values.clamp(max=top) - known[0]) / (top - known[0]).clamp(min=1e-12)).clamp(min=0)
