"""Do updates prefer principal weights or small ones? (arXiv:2606.07082 section 3.1 and appendix C.3; LIFT, 2506.00772)

    M       = weights that changed in bf16
    M_princ = the fraction alpha of entries largest in |W0^(r)|, W0^(r) the rank-r truncated SVD: reduce the rank first
    M_low   = the fraction alpha of entries smallest in |W0|
    Overlap(M*, M) = |M* and M| / |M|,   alpha by chance,   at most min(1, alpha / density)

A small weight has a small bf16 spacing, so *any* update of little more than rounding size shows on small weights
first: an overlap means nothing without `nulls.overlap_null` at the same density. `energy` does not depend on rounding.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor

from potstill.errors import ConfigError
from potstill.geometry.checks import Matrix, checked
from potstill.geometry.decompose import Decomposition, decompose
from potstill.geometry.sparsity import changed_mask


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightMasks:
    """Masks that depend on W0 alone; worth keeping over a row of checkpoints."""

    principal: Bool[Tensor, "m n"]
    low: Bool[Tensor, "m n"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Overlap:
    """One mask M* against the changed weights M."""

    share: float
    """|M*| / numel: the overlap of a random M."""
    overlap: float
    """|M* and M| / |M|; nan where nothing changed."""
    ceiling: float
    """min(1, share / density), the largest overlap that so many changes leave room for."""
    recall: float
    """|M* and M| / |M*|."""
    lift: float
    """overlap / share; 1 by chance."""
    energy: float
    """The part of ||dW||_F^2 on M*; nan for a zero update."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskOverlap:
    """What `mask_overlap` found."""

    density: float
    """|M| / numel = 1 - sparsity."""
    principal: Overlap
    low: Overlap
    principal_not_low: Overlap


def mask_overlap(w0: Matrix, w1: Matrix, rank: int = 64, fraction: float = 0.3) -> MaskOverlap:
    """Overlap of the update w0 -> w1 with the principal and the low-magnitude weights of w0.

    The paper's appendix names fraction = 0.5; its figure 3 fits 0.3 only.

    Args:
        w0: [m, n] start.
        w1: [m, n] checkpoint.
        rank: r of the rank reduction.
        fraction: alpha, in (0, 1].

    Raises:
        ConfigError: matrices that do not fit, a rank above min(m, n), a fraction outside (0, 1].
    """
    checked(w0, w1)
    return overlap_with(weight_masks(w0, rank, fraction), w0, w1)


def weight_masks(w0: Matrix, rank: int, fraction: float, of: Decomposition | None = None) -> WeightMasks:
    """M_princ and M_low of `w0` [m, n], each with exactly round(fraction * m n) entries.

    `of` is a decomposition of w0 with at least `rank` vectors, where the caller has one.
    """
    checked(w0)
    if not 0 < fraction <= 1:
        raise ConfigError(
            f"fraction = {fraction} must lie in (0, 1]: it is the share of weights in each mask, e.g. 0.3"
        )
    d = decompose(w0, rank) if of is None else of
    count = round(fraction * w0.numel())
    reduced = ((d.u[:, :rank] * d.s[:rank]) @ d.v[:, :rank].T).float()
    return WeightMasks(principal=largest(reduced.abs_(), count), low=largest(-w0.abs(), count))


def largest(x: Matrix, count: int) -> Bool[Tensor, "m n"]:
    """The `count` largest entries of `x`, exactly: bf16 weights tie often, and ties are taken at even distances."""
    flat = x.reshape(-1)
    if count == 0:
        return torch.zeros_like(x, dtype=torch.bool)
    threshold = flat.kthvalue(flat.numel() - count + 1).values
    mask = flat > threshold
    missing = count - int(mask.sum())
    ties = (flat == threshold).nonzero()[:, 0]
    mask[ties[torch.arange(missing, device=x.device) * len(ties) // missing]] = True
    return mask.view(x.shape)


def overlap_with(masks: WeightMasks, w0: Matrix, w1: Matrix) -> MaskOverlap:
    """As `mask_overlap`, with masks of w0 made before.

    Raises:
        ConfigError: matrices that do not fit.
    """
    changed = changed_mask(w0, w1)
    energy = (w1.double() - w0.double()).square_()
    return MaskOverlap(
        density=changed.double().mean().item(),
        principal=_overlap(masks.principal, changed, energy),
        low=_overlap(masks.low, changed, energy),
        principal_not_low=_overlap(masks.principal & ~masks.low, changed, energy),
    )


def _overlap(mask: Tensor, changed: Tensor, energy: Tensor) -> Overlap:
    size, moved, both = int(mask.sum()), int(changed.sum()), int((mask & changed).sum())
    share, total = size / mask.numel(), energy.sum().item()
    overlap = both / moved if moved else math.nan
    return Overlap(
        share=share,
        overlap=overlap,
        ceiling=min(1.0, size / moved) if moved else math.nan,
        recall=both / size if size else math.nan,
        lift=overlap / share if size else math.nan,
        energy=energy[mask].sum().item() / total if total else math.nan,
    )
