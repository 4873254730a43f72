"""The shape of one cumulative update dW = W_t - W0: size, stable rank, tail, concentration (arXiv:2606.07082, sec. 4).

    stable rank           ||dW||_F^2 / s_1^2                             r for r equal values
    Hill estimate         [ 1/(k-1) sum_{i<k} log(s_i / s_k) ]^-1        a for s_i = i^(-1/a); of values, not squares
    energy of the top K   sum_{i<=K} s_i^2 / ||dW||_F^2
    participation ratio   (sum s_i^2)^2 / sum s_i^4 = tr(G)^2 / ||G||_F^2,  G the Gram matrix: no decomposition needed

A stable rank of 20 does not say that 20 directions hold the update: the top 16 hold at most 16/20 of it, mostly far
less. The paper does not say which k its Hill estimate uses, and it depends on k strongly: look at several.
dW should come from fp32 masters; `floors.storage` says when bf16 files are too coarse.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from potstill.errors import ConfigError
from potstill.geometry.checks import Matrix, checked, finite, moved, rank_within
from potstill.geometry.decompose import Decomposition, decompose, decompose_product, gram

KS = (4, 8, 16, 32, 64)


def stable_rank(dw: Matrix) -> float:
    """||dW||_F^2 / s_1^2 of an update [m, n], 1 .. min(m, n).

    Raises:
        ConfigError: not a finite matrix, or a zero update.
    """
    checked(dw)
    norm = torch.linalg.vector_norm(dw, dtype=torch.float64).item()
    moved(norm, "the stable rank")
    return (norm / decompose(dw, 1).s[0].item()) ** 2


def hill(dw: Matrix, k: int) -> float:
    """Hill's tail exponent from the k largest singular values of an update [m, n].

    Raises:
        ConfigError: not a finite matrix, k < 2, or s_k numerically zero (a LoRA of rank < k).
    """
    checked(dw)
    rank_within(k, min(dw.shape), "Hill's estimate needs that many singular values")
    d = decompose(dw, k)
    d.defined(k, "Hill's estimate")
    return hill_of(d.s, k)


def hill_of(s: Float64[Tensor, " r"], k: int) -> float:
    """Hill's estimate from the k first of `s`, descending and above zero; inf where these are equal.

    Raises:
        ConfigError: k outside 2 .. r.
    """
    if not 2 <= k <= len(s):
        raise ConfigError(
            f"k = {k} must lie in 2 .. {len(s)}: Hill's estimate averages k - 1 ratios to the k-th value. "
            "Choose another k, or decompose the update with a larger one"
        )
    mean = (s[: k - 1].log() - s[k - 1].log()).mean().item()
    return 1 / mean if mean > 0 else math.inf


def participation_ratio(dw: Matrix) -> float:
    """(sum s_i^2)^2 / sum s_i^4 of an update [m, n]: how many directions share its energy, 1 .. min(m, n).

    Raises:
        ConfigError: not a finite matrix, or a zero update.
    """
    checked(dw)
    finite(dw)
    g = gram(dw)
    moved(g.trace().item(), "the participation ratio")
    return (g.trace() / torch.linalg.vector_norm(g)).item() ** 2


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateSummary:
    """Everything the trajectory figures need of one update; `top` is what later checkpoints are compared with."""

    frobenius: float
    spectral: float
    """s_1."""
    stable_rank: float
    participation_ratio: float
    energy: dict[int, float]
    """K -> share of ||dW||_F^2 in the K leading directions."""
    hill: dict[int, float]
    """k -> estimate; nan beyond the rank."""
    gap_ratio: dict[int, float]
    """K -> s_K / s_{K+1}; near 1 the K-subspace is arbitrary."""
    top: Decomposition


def summarise_update(dw: Matrix, ks: Sequence[int] = KS) -> UpdateSummary:
    """All of the above from one Gram matrix, for each k of `ks` that dW [m, n] has room for.

    Raises:
        ConfigError: not a finite matrix, or a zero update.
    """
    checked(dw)
    finite(dw)
    g = gram(dw)
    square, quartic = g.trace().item(), torch.linalg.vector_norm(g).item() ** 2
    moved(square, "the shape of the update")
    return _summary(decompose(dw, min(max(ks), *dw.shape), gram_matrix=g), square, quartic, ks)


def summarise_product(b: Matrix, a: Matrix, scale: float = 1.0, ks: Sequence[int] = KS) -> UpdateSummary:
    """As `summarise_update` of the low-rank update scale * B A, exactly and without forming it.

    Args:
        b: [m, r].
        a: [r, n].
        scale: LoRA's alpha / r.
        ks: as above; Hill's estimate is nan for k > r.

    Raises:
        ConfigError: matrices that do not fit, or a zero product.
    """
    d = decompose_product(b, a, scale)
    square = d.s.square().sum().item()
    moved(square, "the shape of the update")
    return _summary(d, square, d.s.pow(4).sum().item(), ks)


def _summary(d: Decomposition, square: float, quartic: float, ks: Sequence[int]) -> UpdateSummary:
    ks = [k for k in ks if k <= len(d.s)]
    first, rank = d.s[0].item(), int((d.s > d.tolerance).sum())
    return UpdateSummary(
        frobenius=math.sqrt(square),
        spectral=first,
        stable_rank=square / first**2,
        participation_ratio=square**2 / quartic,
        energy={k: d.s[:k].square().sum().item() / square for k in ks},
        hill={k: hill_of(d.s, k) if k <= rank else math.nan for k in ks if k > 1},
        gap_ratio={k: d.gap_ratio(k) for k in ks if k <= rank},
        top=d,
    )


def growth_exponent(steps: Sequence[int], norms: Sequence[float]) -> float:
    """Slope of log ||dW_t||_F over log t by least squares: 0.5 is diffusion, 1 is straight motion.

    Raises:
        ConfigError: fewer than two different steps, or a step or norm that is not above zero.
    """
    if len(steps) != len(norms) or len(set(steps)) < 2 or min(steps) <= 0 or min(norms) <= 0:
        raise ConfigError(
            f"steps {list(steps)} and norms {list(norms)} have no growth exponent: it needs two or more different "
            "steps after 0, each with a norm above 0. Add a checkpoint, and leave out W0 itself"
        )
    return float(np.polyfit(np.log(steps), np.log(norms), 1)[0])
