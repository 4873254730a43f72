"""Credit for single tokens: what turns log-ratios and verdicts into advantages. No gradients here."""

import torch
from jaxtyping import Float
from torch import Tensor

PerToken = Float[Tensor, " T"]


def discounted(values: PerToken, gamma: float) -> PerToken:
    """s_t = values_t + gamma s_{t+1}: a token answers for what follows it, less and less."""
    total = values.new_zeros(())
    out = torch.empty_like(values)
    for t in range(len(values) - 1, -1, -1):
        total = values[t] + gamma * total
        out[t] = total
    return out
