"""Random updates to hold beside the real one: what a number would be if the update had no direction of its own.

    density_matched_update   as many changed bf16 weights on the user's own W0    -> mask overlap, sparsity
    permuted_update          the user's entries in random places                  -> mask overlap, stable rank
    rotation_matched_update  the user's singular values, random directions        -> overlap, energy, rotation
    isotropic_update         the user's Frobenius norm, nothing else              -> spectral shift, stable rank
    noise_trajectory         zero-mean gradients through the layer's own inputs   -> locking, stable rank over time

Each is reproducible from its seed and lies on the device of what it was made from (`isotropic_update`: the CPU).
Draw several and compare with `against`.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float32, Float64, UInt8
from torch import Tensor

from potstill.errors import ConfigError
from potstill.geometry.checks import Matrix, checked, finite
from potstill.geometry.masks import MaskOverlap, WeightMasks, overlap_with
from potstill.geometry.sparsity import changed_mask, next_bf16
from potstill.seeds import derive

Bits = UInt8[np.ndarray, " bytes"]
"""A mask, eight weights to a byte."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Against:
    """A value beside draws of its null."""

    value: float
    mean: float
    sd: float
    """Over the draws, with n - 1."""
    z: float
    """(value - mean) / sd; nan where all draws agree."""
    ratio: float
    """value / mean; nan for a mean of 0."""


def against(value: float, draws: Sequence[float]) -> Against:
    """How far `value` lies from at least two draws of a null."""
    if len(draws) < 2:
        raise ConfigError(f"{len(draws)} draw of a null has no spread: a z score needs two or more. Use more seeds")
    x = torch.tensor(draws, dtype=torch.float64)
    mean, sd = x.mean().item(), x.std().item()
    return Against(
        value=value,
        mean=mean,
        sd=sd,
        z=(value - mean) / sd if sd else math.nan,
        ratio=value / mean if mean else math.nan,
    )


def _gaussian(name: str, seed: int, *shape: int) -> Float32[Tensor, "..."]:
    # Drawn on the CPU whatever the device, so that a seed means the same numbers everywhere.
    return torch.randn(*shape, generator=torch.Generator().manual_seed(derive("geometry", name, seed)))


def isotropic_update(m: int, n: int, frobenius: float, seed: int) -> Float32[Tensor, "m n"]:
    """Independent Gaussian entries, scaled to the given Frobenius norm."""
    z = _gaussian("isotropic", seed, m, n)
    return z * (frobenius / torch.linalg.vector_norm(z, dtype=torch.float64).item())


def density_matched_update(w0: Matrix, density: float, seed: int) -> Float32[Tensor, "m n"]:
    """sigma Z with Gaussian Z, so small that bf16(w0 + sigma Z) differs from bf16(w0) in the given share of entries.

    An entry changes where sigma |z| exceeds the distance from w0 to the rounding boundary on z's side. So sigma is a
    quantile of distance / |z| over the entries: no search, and exact but for ties and fp32 rounding.

    Args:
        w0: [m, n] the user's weights, bf16 or fp32.
        density: share of changed weights, in (0, 1): 1 - update_sparsity of the run.
        seed: of Z.

    Raises:
        ConfigError: not a finite matrix, or a density outside (0, 1).
    """
    checked(w0)
    finite(w0)
    count = round(density * w0.numel())
    if not 0 < density < 1 or count == 0:
        raise ConfigError(
            f"a density of {density} cannot be matched: it must lie in (0, 1) and change at least one of {w0.numel()} "
            "weights. Where nothing or everything changed, mask overlaps are fixed and need no null"
        )
    z = _gaussian("density", seed, *w0.shape).to(w0.device)
    stored = w0.bfloat16()
    boundary = (stored.float() + next_bf16(stored, z).float()) / 2
    needed = (boundary - w0.float()).abs() / z.abs()
    sigma = needed.reshape(-1).kthvalue(count).values
    return z * torch.nextafter(sigma, torch.full_like(sigma, math.inf))


def overlap_null(w0: Matrix, masks: WeightMasks, density: float, seed: int) -> MaskOverlap:
    """The mask overlaps of one `density_matched_update`; compare each with `against`.

    Raises:
        ConfigError: as `density_matched_update`.
    """
    return overlap_with(masks, w0, w0.float() + density_matched_update(w0, density, seed))


def packed_masks(w0: Matrix, w1: Matrix, seed: int) -> dict[str, Bits]:
    """The changed weights of w0 -> w1, and those of a random update on w0 that changes as many: eight to a byte.

    Both are what `compare` needs for the overlap of two runs' masks: two random updates share weights as well, because
    small ones change first.
    """
    changed = changed_mask(w0, w1)
    random, density = changed, changed.double().mean().item()
    if 0 < density < 1:
        random = changed_mask(w0, w0.float() + density_matched_update(w0, density, seed))
    return {name: np.packbits(m.cpu().numpy().reshape(-1)) for name, m in (("changed", changed), ("random", random))}


def permuted_update(dw: Matrix, seed: int) -> Matrix:
    """The entries of `dw` [m, n] in random order: its histogram without its structure.

    Raises:
        ConfigError: not a matrix.
    """
    checked(dw)
    generator = torch.Generator().manual_seed(derive("geometry", "permuted", seed))
    order = torch.randperm(dw.numel(), generator=generator).to(dw.device)
    return dw.reshape(-1)[order].view(dw.shape)


def rotation_matched_update(s: Float[Tensor, " r"], m: int, n: int, seed: int) -> Float64[Tensor, "m n"]:
    """U diag(s) V^T with Haar-random U [m, r] and V [n, r]: any spectral statistic is kept, any direction lost.

    Args:
        s: singular values of the user's update, all or its leading ones, r <= min(m, n).
        m: rows.
        n: columns.
        seed: of U and V.

    Raises:
        ConfigError: more values than the matrix has.
    """
    if len(s) > min(m, n):
        raise ConfigError(f"{len(s)} singular values do not fit into a {m} x {n} matrix: it has {min(m, n)}")
    u, v = (_haar(name, seed, d, len(s)).to(s.device) for name, d in (("left", m), ("right", n)))
    return (u * s.double()) @ v.T


def _haar(name: str, seed: int, d: int, r: int) -> Float64[Tensor, "d r"]:
    """QR of a Gaussian matrix; with R's diagonal made positive, Q is uniform (Mezzadri 2007)."""
    q, upper = torch.linalg.qr(_gaussian(name, seed, d, r).double())
    return q * upper.diagonal().sign()


def noise_trajectory(
    covariance: Matrix, m: int, steps: Sequence[int | float], seed: int
) -> Iterator[Float64[Tensor, "m n"]]:
    """dW_t at each step of pure noise: the sum of t gradients delta^T x whose errors delta know nothing of the inputs x.

        dW_t - dW_s = sqrt(t - s) Z C^(1/2),  Z [m, n] fresh standard Gaussian,  C = E[x x^T]

    By the central limit theorem this is the law of SGD on white errors through inputs of second moment C. Nothing is
    learned, yet E[dW^T dW] = t m C at every t: with a steep C the right subspace locks, the stable rank stays flat,
    and ||dW_t||_F grows as sqrt(t). Left vectors and non-overlapping windows do not lock beyond the built-in
    resemblance of a sum to its beginning.

    Args:
        covariance: [n, n] C, the layer's input second moment; its scale only sets the norm.
        m: rows of the matrix.
        steps: of the checkpoints, increasing; or how far the walk has come by then (`recorded.noise_times`).
        seed: of the noise.

    Raises:
        ConfigError: a covariance that is not a finite square matrix, steps that do not increase from above 0.
    """
    checked(covariance)
    finite(covariance)
    if covariance.shape[0] != covariance.shape[1]:
        raise ConfigError(f"a second moment of inputs is n x n, this is {list(covariance.shape)}. Pass E[x x^T], not x")
    if not steps or any(t <= s for s, t in zip([0, *steps], steps, strict=False)):
        raise ConfigError(f"steps {list(steps)} must increase from above 0: each window adds its own noise")
    values, vectors = torch.linalg.eigh(covariance.double())
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    return _random_walk(root, m, list(steps), seed)


def _random_walk(
    root: Float64[Tensor, "n n"], m: int, steps: list[int | float], seed: int
) -> Iterator[Float64[Tensor, "m n"]]:
    dw, before = root.new_zeros(m, root.shape[0]), 0.0
    for t in steps:
        z = _gaussian(f"noise {t:g}", seed, m, root.shape[0]).to(root.device, torch.float64)
        dw = dw + math.sqrt(t - before) * (z @ root)
        before = t
        yield dw
