"""Which weights moved, as far as bf16 can tell (arXiv:2606.07082 section 3.1, appendix C.3).

    a = bf16(W0), b = bf16(W+), round to nearest even
    unchanged <=> |b - a| <= eta max(|a|, |b|), eta = 1e-3

The smallest relative gap between distinct finite bf16 numbers is 2^-8, so every eta below it says the same as a = b,
which is what is computed: numerically, so that +0 equals -0. The sparsity of a model is the sum of unchanged weights
over the sum of weights, that of `update_sparsity` weighted by the sizes of its matrices.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import BFloat16, Bool, Float, Shaped, UInt16
from torch import Tensor

from potstill.geometry.checks import Matrix, checked, finite, not_finite

CHUNK = 1 << 18
"""Weights counted at a time: both halves stay in the cache."""


def changed_mask(w0: Matrix, w1: Matrix) -> Bool[Tensor, "m n"]:
    """True where bf16(w1) differs from bf16(w0), both [m, n].

    Raises:
        ConfigError: different shapes, not two-dimensional, not finite.
    """
    checked(w0, w1)
    finite(w0, w1)
    return w0.bfloat16() != w1.bfloat16()


def update_sparsity(w0: Matrix, w1: Matrix) -> float:
    """The share of weights, 0 .. 1, that are the same in bf16 before and after; 1 - sparsity is the update's density.

    One pass over both matrices, bounded by memory; fp32 weights are rounded on the way. Without the rounding the
    sparsity of anything that Adam touched would be about 0.

    Raises:
        ConfigError: different shapes, not two-dimensional, not finite.
    """
    checked(w0, w1)
    if w0.device.type != "cpu":
        return 1 - changed_mask(w0, w1).sum().item() / w0.numel()
    # On the CPU numpy compares 16-bit codes several times as fast as torch compares bf16 numbers.
    pairs = zip(w0.detach().reshape(-1).split(CHUNK), w1.detach().reshape(-1).split(CHUNK), strict=True)
    scratch = np.empty(CHUNK, np.uint16), np.empty(CHUNK, np.bool_)
    return 1 - sum(_count_changed(a, b, *scratch) for a, b in pairs) / w0.numel()


def _count_changed(
    w0: Shaped[Tensor, " c"],
    w1: Shaped[Tensor, " c"],
    codes: UInt16[np.ndarray, " chunk"],
    mask: Bool[np.ndarray, " chunk"],
) -> int:
    """Changed weights in one chunk, through scratch arrays that stay in the cache.

    Twice a code drops its sign. Twice (a | b) is 0 only where both are zeros, perhaps of different sign, and reaches
    0xFF00, all exponent bits, wherever a or b is not finite (and for some finite pairs, so that is then looked at).
    """
    a, b = _codes(w0), _codes(w1)
    codes, mask = codes[: len(a)], mask[: len(a)]
    np.bitwise_or(a, b, out=codes)
    np.add(codes, codes, out=codes)
    if codes.max() >= 0xFF00:
        for w in (w0, w1):
            if not torch.isfinite(w).all():
                raise not_finite(w)
    np.not_equal(a, b, out=mask)
    if codes.min() == 0:
        mask &= codes != 0
    return int(np.count_nonzero(mask))


def _codes(w: Shaped[Tensor, " c"]) -> UInt16[np.ndarray, " c"]:
    return w.bfloat16().view(torch.int16).numpy().view(np.uint16)


def next_bf16(w: BFloat16[Tensor, "m n"], direction: Float[Tensor, "m n"]) -> BFloat16[Tensor, "m n"]:
    """The neighbouring bf16 number of each entry, above it where `direction` > 0 and below it elsewhere.

    `torch.nextafter` steps in fp32 and rounds back to where it started.
    """
    up = direction > 0
    zero = torch.where(up, 0.0, -0.0).to(w)
    start = torch.where(w == 0, zero, w)
    away = up == ~start.signbit()  # codes count up away from zero, on both sides of it
    return (start.view(torch.int16) + (2 * away - 1).to(torch.int16)).view(torch.bfloat16)


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """How far two runs moved the same weights."""

    jaccard: float
    """|A and B| / |A or B|; nan where both are empty."""
    chance: float
    """p q / (p + q - p q), the value for independent masks of these densities p and q."""


def mask_jaccard(a: Bool[Tensor, "m n"], b: Bool[Tensor, "m n"]) -> Agreement:
    """Run-to-run overlap of two update masks ("The Path Not Taken", arXiv:2511.08567)."""
    p, q = a.double().mean().item(), b.double().mean().item()
    either = int((a | b).sum())
    expected = p * q / (p + q - p * q) if either else float("nan")
    return Agreement(jaccard=int((a & b).sum()) / either if either else float("nan"), chance=expected)
