"""Divergences between two next-token distributions, the student's S and the teacher's T.

Functions of logits (log-probabilities are logits too) that reduce the vocabulary axis and nothing else.
Shapes: [..., V] and [..., V] -> [...], in nats. `beta` follows GKD (arXiv:2306.13649): 0 is forward KL, 1 is reverse KL.
A token of probability zero (logit -inf) on either side contributes no nan, in value or gradient.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

Logits = Float[Tensor, "*batch V"]
Nats = Float[Tensor, "*batch"]


def _kl(p: Logits, q: Logits) -> Nats:
    """sum_v P_v (log P_v - log Q_v), with 0 log 0 = 0, of normalised log-probabilities."""
    gap = torch.where(p == -math.inf, 0.0, p - q)
    return (p.exp() * gap).sum(-1)


def forward_kl(student_logits: Logits, teacher_logits: Logits) -> Nats:
    """KL(T || S) = sum_v T_v (log T_v - log S_v). Covers all of the teacher's mass."""
    return _kl(teacher_logits.log_softmax(-1), student_logits.log_softmax(-1))


def reverse_kl(student_logits: Logits, teacher_logits: Logits) -> Nats:
    """KL(S || T) = sum_v S_v (log S_v - log T_v). Seeks the teacher's modes."""
    return _kl(student_logits.log_softmax(-1), teacher_logits.log_softmax(-1))


def jsd(student_logits: Logits, teacher_logits: Logits, beta: float = 0.5) -> Nats:
    """Generalised Jensen-Shannon divergence, GKD Eq. 1.

        m = beta T + (1 - beta) S
        JSD = beta KL(T || m) + (1 - beta) KL(S || m)

    `beta` weighs the teacher in the mixture. JSD / beta tends to forward KL as beta -> 0 and JSD / (1 - beta) to
    reverse KL as beta -> 1; by the field's convention `beta` = 0 and 1 *are* these two, without the vanishing factor.
    KDFlow weighs the student instead. Raises ValueError outside [0, 1].
    """
    if not 0 <= beta <= 1:
        raise ValueError(f"beta must lie in [0, 1], got {beta}: it is the weight of the teacher in the mixture")
    if beta == 0:
        return forward_kl(student_logits, teacher_logits)
    if beta == 1:
        return reverse_kl(student_logits, teacher_logits)
    s, t = student_logits.log_softmax(-1), teacher_logits.log_softmax(-1)
    neither = (s == -math.inf) & (t == -math.inf)  # log(0 + 0) has no gradient; what stands here instead is not used
    m = torch.logaddexp(t + math.log(beta), (s + math.log1p(-beta)).masked_fill(neither, 0.0))
    return beta * _kl(t, m) + (1 - beta) * _kl(s, m)


def entropy(logits: Logits) -> Nats:
    """H = -sum_v P_v log P_v over the whole vocabulary (OmniOPD Eq. 6)."""
    p = logits.log_softmax(-1)
    return -(p.exp() * p.clamp_min(torch.finfo(p.dtype).min)).sum(-1)


def _entropy(logp: Logits) -> Nats:
    """The same of normalised log-probabilities, in fewer passes and without gradient."""
    logp = logp.detach()
    known = logp.clamp_min(torch.finfo(logp.dtype).min) if logp.amin() == -math.inf else logp
    return -logp.exp().mul_(known).sum(-1)


def with_rest(logp: Float[Tensor, "*batch K"]) -> Float[Tensor, "*batch K+1"]:
    """Append a bucket for everything outside the K given tokens: log(1 - sum_k P_k). [..., K] -> [..., K + 1].

    Without it a truncated divergence is no divergence: it can fall below zero, and the student can gain by moving
    its mass out of sight.
    """
    seen = logp.exp().sum(-1, keepdim=True)
    rest = torch.log1p(-seen.clamp(max=1 - 4 * torch.finfo(logp.dtype).eps))
    return torch.cat([logp, rest], -1)


BLOCK = 64
"""Tokens among which the likeliest is looked for first."""


def likeliest(logp: Logits, k: int) -> Int[Tensor, "*batch K"]:
    """The k likeliest tokens, the first of them first.

    They lie in the k blocks whose own likeliest tokens are likeliest, so that only those are sorted: in a large vocabulary
    two to five times faster than to sort it all.
    """
    whole = logp.shape[-1] // BLOCK * BLOCK
    if whole < 2 * k * BLOCK:
        return logp.topk(k, -1).indices
    blocks = logp[..., :whole].unflatten(-1, (-1, BLOCK)).amax(-1).topk(k, -1).indices
    inside = torch.arange(BLOCK, device=logp.device)
    tail = torch.arange(whole, logp.shape[-1], device=logp.device).expand(*logp.shape[:-1], -1)
    some = torch.cat([(blocks[..., None] * BLOCK + inside).flatten(-2), tail], -1)
    return some.gather(-1, logp.gather(-1, some).topk(k, -1).indices)


def overlap(student_logp: Logits, teacher_logp: Logits, k: int = 16) -> dict[str, Nats]:
    """How far two distributions have the same k likeliest tokens (arXiv:2604.13016); k is at most a quarter of V.

    Both are normalised log-probabilities, [..., V] -> [...]. Shares of the k tokens, probability of the shared tokens under
    either, and |H(S) - H(T)| in nats.
    """
    k = min(k, max(student_logp.shape[-1] // 4, 1))
    mine, theirs = likeliest(student_logp, k), likeliest(teacher_logp, k)
    both = (mine[..., :, None] == theirs[..., None, :]).any(-1).to(student_logp.dtype)  # of the student's k, [..., k]
    return {
        "overlap": both.mean(-1),
        "overlap/student": (both * student_logp.gather(-1, mine).exp()).sum(-1),
        "overlap/teacher": (both * teacher_logp.gather(-1, mine).exp()).sum(-1),
        "entropy_gap": (_entropy(student_logp) - _entropy(teacher_logp)).abs(),
    }
