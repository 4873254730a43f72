"""Divergences with their gradients from one pass over the vocabulary.

With S = softmax(z), m = beta T + (1 - beta) S and D as in `potstill.divergence`:

    beta = 0   D = KL(T || S)                                  dD/dz = S - T
    beta = 1   D = KL(S || T)                                  dD/dz = S (log S - log T - D)
    between    D = beta KL(T || m) + (1 - beta) KL(S || m)     dD/dz = (1 - beta) S (log S - log m - KL(S || m))

`divergence.jsd` is the definition; this is held to it, and so is `kernel`, which does the same on CUDA. The student gives every
token some probability, the teacher may not.
"""

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

TINY = torch.finfo(torch.float32).tiny
Kernel = Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]


@cache
def _kernel(device: torch.device) -> Kernel | None:
    """The kernel, if it runs there: Triton may be missing, or the C compiler that it calls at its first launch."""
    try:
        from potstill.learners.kernel import matched as kernel

        for beta in (0.0, 0.5, 1.0):
            kernel(torch.zeros(1, 2, device=device), torch.zeros(1, 2, device=device), beta)
    except Exception as error:
        warnings.warn(f"divergences are computed without the Triton kernel, more slowly: {error}", stacklevel=2)
        return None
    return kernel


class _Matched(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Float[Tensor, "*batch V"],
        logp: Float[Tensor, "*batch V"],
        teacher_logp: Float[Tensor, "*batch V"],
        beta: float,
    ) -> Float[Tensor, "*batch"]:
        if logp.is_cuda and logp.dtype == torch.float32 and (kernel := _kernel(logp.device)):
            value, ctx.gradient = kernel(logp, teacher_logp, beta)
            return value
        s = logp.exp()
        if beta == 1:
            gap = (logp - teacher_logp).mul_(s)
            value = gap.sum(-1)
            gradient = gap.addcmul_(s, value[..., None], value=-1)
        else:
            t = teacher_logp.exp()
            known = teacher_logp.clamp(min=-1e4) if teacher_logp.amin() == -torch.inf else teacher_logp  # 0 log 0 = 0
            if beta == 0:
                value = (known - logp).mul_(t).sum(-1)
                gradient = s.sub_(t)
            else:
                log_m = torch.lerp(s, t, beta).clamp_(min=TINY).log_()
                gap = (logp - log_m).mul_(s)
                away = gap.sum(-1)
                value = beta * torch.sub(known, log_m, out=log_m).mul_(t).sum(-1) + (1 - beta) * away
                gradient = gap.addcmul_(s, away[..., None], value=-1).mul_(1 - beta)
        ctx.gradient = gradient
        return value

    @staticmethod
    def backward(ctx: Any, *grads: Float[Tensor, "*batch"]) -> tuple[Tensor, None, None, None]:
        return ctx.gradient.mul_(grads[0][..., None]), None, None, None


def matched(
    logits: Float[Tensor, "*batch V"],
    logp: Float[Tensor, "*batch V"],
    teacher_logp: Float[Tensor, "*batch V"],
    beta: float,
) -> Float[Tensor, "*batch"]:
    """`jsd(logits, teacher_logp, beta)`, nats.

    Args:
        logits: Of the student; the gradient goes to them.
        logp: The same normalised, without gradient.
        teacher_logp: Normalised, without gradient.
        beta: 0: forward KL, 1: reverse KL, between: generalised Jensen-Shannon divergence.
    """
    value: Float[Tensor, "*batch"] = _Matched.apply(logits, logp, teacher_logp, beta)
    return value
