"""How far the leading singular subspaces of the *weights* turned (arXiv:2606.07082 section 3.1, "rotation").

    cos theta_i(U) = s_i(U0^T U+),   sin theta_i(U) = s_i((I - U0 U0^T) U+),   likewise V,   k = 512 in the paper

An arc cosine loses every angle below about sqrt(eps), so each angle is atan2 of its sine and cosine, exact at both
ends (Bjorck & Golub 1973; Knyazev & Argentati 2002). The largest angle mostly tells how close s_k and s_{k+1} are:
Wedin's bound is sin theta <= ||dW||_2 / gap. Hence the gap beside it, and several k.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor

from potstill.geometry.checks import Matrix, checked, rank_within
from potstill.geometry.decompose import Decomposition, decompose


def principal_angles(w0: Matrix, w1: Matrix, k: int = 512) -> tuple[Float64[Tensor, " k"], Float64[Tensor, " k"]]:
    """Angles in degrees, ascending, between the k-dimensional leading (left, right) singular subspaces.

    Args:
        w0: [m, n] start.
        w1: [m, n] checkpoint.
        k: 1 .. min(m, n) - 1.

    Raises:
        ConfigError: matrices that do not fit, k too large for them or beyond the rank of w0 or w1.
    """
    checked(w0, w1)
    _leaves_room(k, w0)
    return angles_between(decompose(w0, k), decompose(w1, k), k)


def angles_between(d0: Decomposition, d1: Decomposition, k: int) -> tuple[Float64[Tensor, " k"], Float64[Tensor, " k"]]:
    """As `principal_angles`, from decompositions made before (that of W0 serves all checkpoints)."""
    for d in (d0, d1):
        d.defined(k, "the angle between leading subspaces")
    return subspace_angles(d0.u[:, :k], d1.u[:, :k]), subspace_angles(d0.v[:, :k], d1.v[:, :k])


def subspace_angles(a: Float64[Tensor, "d k"], b: Float64[Tensor, "d k"]) -> Float64[Tensor, " k"]:
    """Principal angles between the column spans of two orthonormal bases, in degrees, ascending."""
    inside = a.T @ b
    cosine = torch.linalg.svdvals(inside)
    sine = torch.linalg.svdvals(b - a @ inside).flip(0)
    return torch.atan2(sine, cosine).rad2deg()


@dataclass(frozen=True, slots=True, kw_only=True)
class Rotation:
    """Angles in degrees at one k, left (output side) and right (input side)."""

    k: int
    gap: float
    """s_k - s_{k+1} of W0."""
    left_median: float
    left_mean: float
    left_max: float
    right_median: float
    right_mean: float
    right_max: float


def rotation(d0: Decomposition, d1: Decomposition, ks: Sequence[int] = (16, 64, 128, 512)) -> list[Rotation]:
    """Summaries of `angles_between` for each k of `ks`."""
    out = []
    for k in ks:
        left, right = angles_between(d0, d1, k)
        out.append(
            Rotation(
                k=k,
                gap=d0.gap(k),
                left_median=left.quantile(0.5).item(),
                left_mean=left.mean().item(),
                left_max=left[-1].item(),
                right_median=right.quantile(0.5).item(),
                right_mean=right.mean().item(),
                right_max=right[-1].item(),
            )
        )
    return out


def _leaves_room(k: int, w: Matrix) -> None:
    limit = max(min(w.shape) - 1, 1)
    rank_within(
        k, limit, f"of a matrix of shape {list(w.shape)} the subspace of {limit + 1} is all there is and cannot turn"
    )
