"""What every diagnostic asks of its matrices before it computes anything."""

import math

import torch
from jaxtyping import Shaped
from torch import Tensor

from potstill.errors import ConfigError

Matrix = Shaped[Tensor, "..."]
"""[m, n] = [out, in], as `torch.nn.Linear` stores it. Not annotated as two-dimensional: `checked` says it in words."""


def checked(*matrices: Matrix) -> None:
    """Raise ConfigError unless all are floating-point, two-dimensional and of one shape. `finite` looks at the values."""
    first = matrices[0]
    for w in matrices:
        if w.ndim != 2 or w.numel() == 0:
            raise ConfigError(
                f"a tensor of shape {list(w.shape)} is not a weight matrix: the geometry is that of [out, in] matrices. "
                "Leave out norms and biases, and reshape convolutions to two dimensions"
            )
        if (
            not w.is_floating_point() or w.element_size() < 2
        ):  # torch calls float8 floating, but its scales lie elsewhere
            raise ConfigError(
                f"weights of type {w.dtype} cannot be compared: quantised codes are not numbers on one scale. "
                "Dequantise the checkpoint first, or take its bf16 original"
            )
        if w.shape != first.shape:
            raise ConfigError(
                f"matrices of shapes {list(first.shape)} and {list(w.shape)} have no difference. "
                "Compare checkpoints of one model, with fused or split projections in both"
            )


def finite(*matrices: Matrix) -> None:
    """Raise ConfigError if an entry is nan or infinite."""
    for w in matrices:
        # A sum of squares is finite exactly where all entries are; in double it cannot overflow for fp32 weights.
        if not math.isfinite(torch.linalg.vector_norm(w, dtype=torch.float64).item()):
            raise not_finite(w)


def not_finite(w: Matrix) -> ConfigError:
    """The error for a matrix with nan or infinite entries."""
    bad = int((~torch.isfinite(w)).sum())
    return ConfigError(
        f"a matrix with {bad} nan or infinite weights has no geometry. "
        "Take an earlier checkpoint, or load the file again if it was cut short"
    )


def rank_within(k: int, limit: int, why: str) -> None:
    """Raise ConfigError unless 1 <= k <= limit."""
    if not 1 <= k <= limit:
        raise ConfigError(f"k = {k} must lie in 1 .. {limit}: {why}. Choose a smaller k, or min(k, {limit})")


def moved(norm: float, what: str) -> None:
    """Raise ConfigError where a matrix is zero and `what` has no meaning."""
    if norm == 0:
        raise ConfigError(
            f"the matrix is zero in every entry, so {what} is undefined. Leave it out: if it is an update, the weights "
            "were frozen or both checkpoints are the same"
        )
