"""How far the singular values of the *weights* moved (arXiv:2606.07082 section 3.1, "spectral drift").

    NSS = ||s(W+) - s(W0)||_2 / ||s(W0)||_2,   all p values, sorted        <= ||dW||_F / ||W0||_F (Mirsky)

Decoupled weight decay shrinks all values by one factor and noise inflates them, two effects that NSS adds up and that
can cancel: with c = <s+, s0> / <s0, s0>, NSS^2 = (c - 1)^2 + (min_c ||s+ - c s0|| / ||s0||)^2, and both are given.
Compare with `floors.weight_decay_floor` and `floors.isotropic_shift`.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor

from potstill.errors import ConfigError
from potstill.geometry.checks import Matrix, checked
from potstill.geometry.decompose import singular_values


@dataclass(frozen=True, slots=True, kw_only=True)
class SpectralShift:
    """The shift and its parts, relative to ||s(W0)||_2."""

    shift: float
    """NSS."""
    scale: float
    """c - 1: below zero where the spectrum shrank as a whole."""
    shape: float
    """NSS once the best common factor c is taken out."""
    signed: float
    """sum(s+ - s0) / sum(s0), the relative change of the nuclear norm."""


def spectral_shift(w0: Matrix, w1: Matrix) -> float:
    """NSS of w0 -> w1, both [m, n]; `shift_between(singular_values(w0), singular_values(w1))` has its parts.

    Raises:
        ConfigError: matrices that do not fit, or w0 = 0.
    """
    checked(w0, w1)
    return shift_between(singular_values(w0), singular_values(w1)).shift


def shift_between(s0: Float64[Tensor, " p"], s1: Float64[Tensor, " p"]) -> SpectralShift:
    """NSS and its parts from all singular values, descending."""
    norm = torch.linalg.vector_norm(s0).item()
    if norm == 0:
        raise ConfigError(
            "W0 is zero in every entry, so nothing can be said relative to its spectrum. Leave this matrix out, or "
            "measure the update itself: stable_rank(w1 - w0)"
        )
    change = s1 - s0
    scale = (change @ s0).item() / norm**2
    return SpectralShift(
        shift=torch.linalg.vector_norm(change).item() / norm,
        scale=scale,
        shape=torch.linalg.vector_norm(change - scale * s0).item() / norm,
        signed=change.sum().item() / s0.sum().item(),
    )
