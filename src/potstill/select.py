"""Which tokens learn: the same for every method, between its targets and the learner.

    H_t  = entropy of the student's distribution, nats
    D_t  = exp(d_t) - d_t - 1,   d_t = log pi_T(y_t | h_t) - log pi_old(y_t | h_t)         estimates KL(student || teacher)
    s_t  = H_t;  D_t;  h_t + D_t' - h_t D_t'  with both scaled to 0..1 (TIP, arXiv:2604.14084);  or chance
    keep the floor(keep m) largest s_t of the m tokens with a weight, at least one; weight 0 on the others

Scaling is to the range within the batch, cut at its 98th percentile. TIP takes the whole divergence for D; one number per
token from the teacher gives this estimate of it.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from potstill.credit import PerToken, k3
from potstill.seeds import derive, uniforms
from potstill.types import Target

By = Literal["entropy", "divergence", "tip", "random"]
LARGEST = 10.0
"""Nats: a larger |d_t| ranks as this one."""


def select(targets: Sequence[Target], by: By, keep: float) -> list[Target]:
    """The targets with weight 0 on all but the tokens that score highest over the whole batch."""
    scores = torch.cat([_scores(t, by) for t in targets]) if by != "tip" else _tip(targets)
    weighted = torch.cat([t.weight for t in targets]) != 0
    count = max(int(keep * int(weighted.sum())), 1)
    best = scores.masked_fill(~weighted, -torch.inf).topk(min(count, len(scores))).indices
    kept = torch.zeros_like(scores)
    kept[best] = 1.0
    parts = kept.split([len(t.weight) for t in targets])
    return [replace(t, weight=t.weight * part) for t, part in zip(targets, parts, strict=True)]


def _tip(targets: Sequence[Target]) -> Float[Tensor, " N"]:
    h = _scaled(torch.cat([_scores(t, "entropy") for t in targets]))
    d = _scaled(torch.cat([_scores(t, "divergence") for t in targets]))
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
    return k3((torch.from_numpy(said.sampled) - torch.tensor(r.old_logp)).clamp(-LARGEST, LARGEST))


def _scaled(values: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    top = values.clamp(max=values.quantile(0.98).item())
    return (top - top.min()) / (top.max() - top.min()).clamp(min=1e-12)
