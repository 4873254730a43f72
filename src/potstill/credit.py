"""Credit for single tokens: what turns log-ratios and verdicts into advantages. No gradients here.

    A_t = f(d_t) c_t + e_t (teacher_logp_t - ref_logp_t) + w A_i

    d_t = teacher_logp_t - old_logp_t     > 0: the teacher likes the sampled token more than the student did
    A_i                                   what the verifier thinks of the whole answer
    c_t, e_t                              may depend on whether the signs of A_i and d_t agree

Nearly every method of the family is a choice of f, c, e and w; docs/methods.md has the table.
"""

from collections.abc import Sequence
from typing import SupportsFloat

import torch
from jaxtyping import Float
from torch import Tensor

PerToken = Float[Tensor, " T"]
Rewards = Sequence[SupportsFloat | None] | Float[Tensor, " G"]
Worth = SupportsFloat | Float[Tensor, ""] | PerToken
"""A_i of an answer, or one number per token of it."""
EPS = 1e-6
"""Keeps the normalised advantage finite where all rewards of a group are almost the same."""


def discounted(values: PerToken, gamma: float) -> PerToken:
    """s_t = values_t + gamma s_{t+1}: a token answers for what follows it, less and less."""
    total = values.new_zeros(())
    out = torch.empty_like(values)
    for t in range(len(values) - 1, -1, -1):
        total = values[t] + gamma * total
        out[t] = total
    return out


def group_advantage(rewards: Rewards, *, std: bool = True) -> Float[Tensor, " G"]:
    """A_i = (R_i - mean R) / (std R + 1e-6) over the answers to one prompt (GRPO, arXiv:2402.03300).

    Equal rewards give exactly 0, whatever rounding does to their mean. None, an answer without a verdict, gets 0 and is
    no part of the statistics. std R is that of a sample (divided by G - 1), as in TRL and verl; `std` off leaves the
    division out (Dr. GRPO, arXiv:2503.20783).
    """
    known = [(i, float(r)) for i, r in enumerate(rewards) if r is not None]
    out = torch.zeros(len(rewards))
    values = torch.tensor([r for _, r in known], dtype=torch.float64)
    if len(known) > 1 and bool((values != values[0]).any()):
        centred = values - values.mean()
        scaled = centred / (values.std() + EPS) if std else centred
        out[[i for i, _ in known]] = scaled.float()
    return out


def outcome(rewards: Rewards) -> Float[Tensor, " G"]:
    """z_i = 2 R_i - 1: +1 for a right answer, -1 for a wrong one, 0 for one without a verdict."""
    return torch.tensor([0.0 if r is None else 2 * float(r) - 1 for r in rewards])


def agrees(advantage: Worth, d: PerToken, margin: float = 0.0) -> Float[Tensor, " T"]:
    """1 where verifier and teacher pull the token the same way, strictly and by more than `margin` nats; else 0."""
    worth = advantage if isinstance(advantage, Tensor) else torch.tensor(float(advantage), dtype=torch.float64)
    sign = worth.sign().to(d.dtype)  # by signs: the product of two small numbers may be 0
    return ((sign * d.sign() > 0) & (d.abs() > margin)).to(d.dtype)


def sign_gate(advantage: Worth, d: PerToken, lam: float, beta: float, margin: float = 0.0) -> Float[Tensor, " T"]:
    """c_t = lam where sign(A_i) = sign(d_t), else beta; also beta where either is 0 (SG-OPD, arXiv:2606.09304)."""
    return torch.full_like(d, beta).masked_fill(agrees(advantage, d, margin) > 0, lam)


def extrapolated(d: PerToken, gap: PerToken, c: PerToken) -> PerToken:
    """d_t + (c_t - 1)(teacher_logp_t - ref_logp_t): beyond the teacher for c > 1, back to the reference for c < 1.

    c = 1 is d itself. With a constant c the optimum is pi_T^c pi_ref^(1 - c) / Z (G-OPD, arXiv:2602.12125).
    """
    return d + (c - 1) * gap


def k3(log_ratio: PerToken) -> PerToken:
    """exp(x) - x - 1 >= 0 of x = log p - log q on tokens drawn from q: an unbiased estimate of KL(q || p), in nats."""
    return log_ratio.exp() - log_ratio - 1
