"""Which weights moved, as far as bf16 can tell (arXiv:2606.07082 section 3.1, appendix C.3).

    a = bf16(W0), b = bf16(W+), round to nearest even
    unchanged <=> |b - a| <= eta max(|a|, |b|), eta = 1e-3

The smallest relative gap between distinct finite bf16 numbers is 2^-8, so every eta below it says the same as a = b,
which is what is computed: numerically, so that +0 equals -0. The sparsity of a model is the sum of unchanged weights
over the sum of weights, that of `update_sparsity` weighted by the sizes of its matrices.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import BFloat16, Bool, Float, Int16, Shaped
from torch import Tensor

from potstill.geometry.checks import Matrix, checked, finite, not_finite

CHUNK = 1 << 19
"""Weights counted at a time: what is compared stays in the cache."""
EXPONENT, LARGEST_BIT, SIGN = 0x7F80, 0x4000, -0x8000
"""Of a bf16 code, as a signed 16-bit number: the bits of its exponent, the largest of them, its sign."""


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
    scratch = np.empty(CHUNK, np.int16)
    pairs = zip(_chunks(w0), _chunks(w1), strict=True)
    return 1 - sum(_count_changed(a, b, scratch) for a, b in pairs) / w0.numel()


def _chunks(w: Matrix) -> Iterator[Int16[np.ndarray, " c"]]:
    """bf16 codes, `CHUNK` at a time. Of bf16 weights they are a view, cut in numpy: torch takes longer to cut than to count."""
    flat = w.detach().reshape(-1)
    if flat.dtype == torch.bfloat16:
        whole = _codes(flat)
        return (whole[i : i + CHUNK] for i in range(0, len(whole), CHUNK))
    return map(_codes, flat.split(CHUNK))


def _count_changed(a: Int16[np.ndarray, " c"], b: Int16[np.ndarray, " c"], scratch: Int16[np.ndarray, " chunk"]) -> int:
    """Changed weights in one chunk, through a scratch array that stays in the cache.

    Where bits differ the weight has changed, unless both are zeros of different sign. Each bit that is set in a code of
    w0 or of w1 is set in one of w0 or in a difference; the largest bit of an exponent is not set below 2, so most chunks
    show in two reductions that they are finite.
    """
    differ = np.bitwise_xor(a, b, out=scratch[: len(a)])
    changed = int(np.count_nonzero(differ))
    if (int(np.bitwise_or.reduce(a)) | int(np.bitwise_or.reduce(differ))) & LARGEST_BIT:
        for codes in (a, b):
            if (codes & EXPONENT == EXPONENT).any():
                raise not_finite(torch.from_numpy(codes).view(torch.bfloat16))
    if differ.min() == SIGN:
        changed -= int(np.count_nonzero((differ == SIGN) & ((a == 0) | (b == 0))))
    return changed


def _codes(w: Shaped[Tensor, " c"]) -> Int16[np.ndarray, " c"]:
    return w.bfloat16().view(torch.int16).numpy()


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
