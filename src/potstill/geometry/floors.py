"""What a number would be without any signal, where a formula says it: no random draw needed.

decay floor       1 - prod_t (1 - lr_t wd)                      spectral shift of decoupled weight decay alone
isotropic shift   ||dW||_F / (sqrt(max(m, n)) ||W0||_F)         spectral shift of a random update of the same norm
isotropic rank    m n / (sqrt m + sqrt n)^2                     stable rank of a random update
storage           RMS(dW) against half a bf16 spacing of W0     below about 2, the stored update is mostly rounding
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float32
from torch import Tensor

from potstill.errors import ConfigError
from potstill.geometry.checks import Matrix, checked, finite
from potstill.geometry.sparsity import next_bf16


def weight_decay_floor(learning_rates: Sequence[float], weight_decay: float) -> float:
    """1 - prod_t (1 - lr_t wd), about wd sum_t lr_t: how much AdamW shrinks every singular value by decay alone.

    It is the spectral shift of a run without gradients, held in fp32. On weights stored in bf16 a floor below 2^-9
    cannot show by itself: it moves no weight by half a spacing.

    Args:
        learning_rates: of every optimiser step, from the run's log.
        weight_decay: decoupled, per unit of learning rate.

    Raises:
        ConfigError: lr * wd outside [0, 1), which would not be a decay.
    """
    rates = [lr * weight_decay for lr in learning_rates]
    if any(not 0 <= rate < 1 for rate in rates):
        raise ConfigError(
            f"lr * weight_decay must lie in [0, 1) at every step, here it spans {min(rates)} .. {max(rates)}: anything "
            "else is no decay. Pass the logged learning rates and the optimiser's weight_decay"
        )
    return -math.expm1(math.fsum(math.log1p(-rate) for rate in rates))


def isotropic_shift(dw_norm: float, w0_norm: float, m: int, n: int) -> float:
    """Expected spectral shift of a small Gaussian update, from Frobenius norms.

    To first order s_i moves by u_i^T dW v_i, of variance ||dW||_F^2 / (m n); there are min(m, n) of them, so one draw
    scatters by 1 / sqrt(2 min(m, n)) of the value. Holds while ||dW||_2 is small against the spacing of the values.
    """
    return dw_norm / (math.sqrt(max(m, n)) * w0_norm)


def isotropic_stable_rank(m: int, n: int) -> float:
    """Stable rank of an m x n matrix of independent Gaussian entries, for large m and n; n / 4 of a square one."""
    return m * n / (math.sqrt(m) + math.sqrt(n)) ** 2


def half_spacing(w: Matrix) -> Float32[Tensor, "m n"]:
    """Half the distance from each |bf16(w)| to the next larger bf16 number: moves below it mostly do not show."""
    magnitude = w.bfloat16().abs()
    return (next_bf16(magnitude, torch.ones_like(magnitude)).float() - magnitude.float()) / 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Storage:
    """Whether bf16 can hold an update of this size."""

    rms: float
    """Root mean square entry of dW."""
    half_spacing: float
    """Median over the weights of W0."""
    ratio: float
    """rms / half_spacing."""
    warning: str | None
    """What to say beside spectral metrics of bf16 files; None where the storage is fine enough."""


def storage(w0: Matrix, dw: Matrix) -> Storage:
    """Compare dW with the bf16 spacing at W0, both [m, n].

    Rounding noise in a stored update inflates its stable rank and Hill estimate and lowers its similarity over time;
    as a growing update rises above the spacing, this looks like contraction.

    Raises:
        ConfigError: matrices that do not fit.
    """
    checked(w0, dw)
    finite(w0, dw)
    rms = torch.linalg.vector_norm(dw, dtype=torch.float64).item() / math.sqrt(dw.numel())
    spacing = half_spacing(w0).median().item()
    coarse = rms < 2 * spacing
    warning = (
        f"RMS(dW) = {rms:.1e} is below twice half a bf16 spacing of the weights ({spacing:.1e}): in bf16 files stable "
        "rank and Hill come out too high and similarity too low. Use the optimiser's fp32 masters"
    )
    return Storage(
        rms=rms,
        half_spacing=spacing,
        ratio=rms / spacing if spacing else math.inf,
        warning=warning if coarse else None,
    )
