"""Does an update keep its early directions? "Subspace locking" (arXiv:2606.07082 section 4.1).

    Sim_K(t, T) = 1/K ||V_K(t)^T V_K(T)||_F^2  in [0, 1],   V_K(t) = the K leading right singular vectors of dW_t

K / n by chance (`chance_similarity`). Right is the input side; U_K gives the output side. Of each checkpoint only its
bases are needed, so keep those ([n, 64] a matrix) and never the dense update.

A cumulative sum resembles its own past, and updates made of noise share the directions of the layer's inputs: a high
similarity is no learning by itself. `window_similarity`, the left side and `nulls.noise_trajectory` tell them apart.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, get_args

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from potstill.errors import ConfigError, unknown
from potstill.geometry.checks import Matrix, checked, finite, moved, rank_within
from potstill.geometry.decompose import Decomposition, decompose

Side = Literal["left", "right"]


def subspace_similarity(dw_a: Matrix, dw_b: Matrix, k: int = 16, side: Side = "right") -> float:
    """Sim_k of two updates [m, n] of one matrix, from their leading left or right singular vectors.

    Raises:
        ConfigError: matrices that do not fit, k beyond the rank of one, an unknown side.
    """
    checked(dw_a, dw_b)
    return similarity(basis(decompose(dw_a, k), k, side), basis(decompose(dw_b, k), k, side))


def basis(d: Decomposition, k: int, side: Side = "right") -> Float64[Tensor, "d k"]:
    """The k leading singular vectors of one side.

    Raises:
        ConfigError: k beyond the rank, or an unknown side.
    """
    if side not in get_args(Side):
        raise ConfigError(unknown("side", side, get_args(Side)))
    d.defined(k, "a leading subspace")
    return d.u[:, :k] if side == "left" else d.v[:, :k]


def similarity(a: Float[Tensor, "d k"], b: Float[Tensor, "d k"]) -> float:
    """1/k ||A^T B||_F^2 of two orthonormal bases: the mean squared cosine of their principal angles."""
    return torch.linalg.vector_norm(a.double().T @ b.double()).item() ** 2 / a.shape[1]


def chance_similarity(k: int, d: int) -> float:
    """k / d, the expectation for independent random k-subspaces of a d-dimensional space."""
    return k / d


def similarity_matrix(bases: Sequence[Float[Tensor, "d kept"]], k: int) -> Float64[Tensor, "t t"]:
    """Sim_k of every checkpoint with every other; the diagonal is 1.

    Args:
        bases: of T checkpoints in order, each [d, >= k], leading vectors first.
        k: columns to compare.

    Raises:
        ConfigError: k larger than a basis.
    """
    for b in bases:
        rank_within(k, b.shape[1], "no more leading vectors were kept")
    stacked = torch.stack([b[:, :k].double() for b in bases])
    return torch.einsum("adi,bdj->abij", stacked, stacked).square().sum((-1, -2)) / k


def increments(updates: Iterable[Matrix]) -> Iterator[Matrix]:
    """dW_1, dW_2 - dW_1, dW_3 - dW_2, ...: what each window between checkpoints added."""
    before: Tensor | None = None
    for dw in updates:
        yield dw if before is None else dw - before
        before = dw


def window_similarity(early: Matrix, late: Matrix, k: int = 16, side: Side = "right") -> float:
    """Sim_k of dW_early with what came after, dW_late - dW_early: no step is counted on both sides.

    Raises:
        ConfigError: as `subspace_similarity`; also where nothing moved in between.
    """
    checked(early, late)
    return subspace_similarity(late - early, early, k, side)


def input_alignment(v: Float[Tensor, "n k"], covariance: Matrix) -> float:
    """Sim_k of an update's right vectors with the k leading eigenvectors of the layer's input second moment E[x x^T].

    Raises:
        ConfigError: a covariance that is not finite, or whose rank is below k.
    """
    checked(covariance)
    return similarity(v, basis(decompose(covariance, v.shape[1]), v.shape[1]))


def projection_energy(dw: Matrix, d0: Decomposition, k: int) -> float:
    """||U_k^T dW V_k||_F^2 / ||dW||_F^2 with the leading vectors of W0; k^2 / (m n) by chance. No rounding, no mask.

    Raises:
        ConfigError: not a finite matrix, a zero update, or k beyond the rank of W0.
    """
    checked(dw)
    finite(dw)
    inside = basis(d0, k, "left").T @ dw.double() @ basis(d0, k, "right")
    norm = torch.linalg.vector_norm(dw, dtype=torch.float64).item()
    moved(norm, "the share of its energy in a subspace")
    return (torch.linalg.vector_norm(inside).item() / norm) ** 2
