"""`fused` as a Triton kernel, for CUDA: value and gradient of a row by one program, in one or two sweeps over the vocabulary.

    sweep 1    D;  for beta > 0 also  A = KL(S || m),  where m = T at beta = 1;  for beta = 0 also  dD/dz = S - T
    sweep 2    dD/dz = (1 - beta) S (log S - log m - A),  without the factor at beta = 1

As operations of torch, every term would be a tensor as large as the logits, written and read again. Triton comes with torch
for CUDA. With TRITON_INTERPRET=1 the kernel also runs on a CPU, slowly: so it is tested where there is no GPU.
"""

from contextlib import nullcontext
from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

BLOCK = 4096
"""Tokens of the vocabulary at a time."""


@triton.jit
@no_type_check
def _log_mean(s, t, BETA: tl.constexpr):
    return tl.log(tl.maximum(s + BETA * (t - s), 1.1754944e-38))


@triton.jit
@no_type_check
def _row(logp, teacher_logp, value, gradient, V, BETA: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    logp += row.to(tl.int64) * V
    teacher_logp += row.to(tl.int64) * V
    gradient += row.to(tl.int64) * V
    toward = tl.zeros([BLOCK], tl.float32)  # KL(T || m), where m = S at beta = 0
    away = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        at = start + tl.arange(0, BLOCK)
        log_s = tl.load(logp + at, mask=at < V, other=-1e4)
        log_t = tl.load(teacher_logp + at, mask=at < V, other=-1e4)
        s, t = tl.exp(log_s), tl.exp(log_t)
        if BETA == 0:
            toward += t * (tl.maximum(log_t, -1e4) - log_s)  # 0 log 0 = 0
            tl.store(gradient + at, s - t, mask=at < V)
        elif BETA == 1:
            away += s * (log_s - log_t)
        else:
            log_m = _log_mean(s, t, BETA)
            toward += t * (tl.maximum(log_t, -1e4) - log_m)
            away += s * (log_s - log_m)
    to, from_ = tl.sum(toward, 0), tl.sum(away, 0)
    tl.store(value + row, from_ if BETA == 1 else to if BETA == 0 else BETA * to + (1 - BETA) * from_)
    if BETA > 0:
        for start in range(0, V, BLOCK):
            at = start + tl.arange(0, BLOCK)
            log_s = tl.load(logp + at, mask=at < V, other=-1e4)
            log_m = tl.load(teacher_logp + at, mask=at < V, other=-1e4)
            s = tl.exp(log_s)
            if BETA < 1:
                log_m = _log_mean(s, tl.exp(log_m), BETA)
            slope = s * (log_s - log_m - from_)
            tl.store(gradient + at, slope if BETA == 1 else (1 - BETA) * slope, mask=at < V)


def matched(
    logp: Float[Tensor, "*batch V"], teacher_logp: Float[Tensor, "*batch V"], beta: float
) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch V"]]:
    """The divergence of each row, nats, and its gradient for the logits. Both log-probs are normalised, in float32."""
    logp, teacher_logp = logp.contiguous(), teacher_logp.contiguous()
    value, gradient = logp.new_empty(logp.shape[:-1]), torch.empty_like(logp)
    if value.numel():
        tensors, how = (logp, teacher_logp, value, gradient), {"BETA": float(beta), "BLOCK": BLOCK, "num_warps": 8}
        # A launch goes to the current device, which need not be the tensors'.
        with torch.cuda.device(logp.device) if logp.is_cuda else nullcontext():
            _row[(value.numel(),)](*tensors, logp.shape[-1], **how)
    return value, gradient
