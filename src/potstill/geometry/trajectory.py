"""One matrix along a row of checkpoints: do its updates keep their directions, and would noise have kept them too?

sim_V      Sim_16 of dW_t with the last dW, input side; _U the output side; 16 / n, 16 / m by chance
sim{K}_V   the same for other K
later_V    Sim_16 of dW_t with all that came after it, dW_T - dW_t: no step is counted twice
null       the same for a walk of noise gradients through the layer's inputs (`nulls.noise_trajectory`), or through
           white inputs where the layer's own are not known; srank_noise: its stable rank
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from potstill.geometry.checks import Matrix
from potstill.geometry.decompose import Decomposition, decompose, decompose_product
from potstill.geometry.inputs import Update
from potstill.geometry.nulls import isotropic_update, noise_trajectory
from potstill.geometry.rows import SIDES, Row, sizes
from potstill.geometry.subspace import similarity, similarity_matrix
from potstill.seeds import derive

K = 16
"""Of the paper."""
Bases = dict[str, Matrix]
"""Side (U or V) -> leading vectors: [m, k] or [n, k], as many as there are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trajectory:
    """What the checkpoints of one matrix say together."""

    columns: list[Row]
    """For each checkpoint."""
    similarity: dict[str, dict[int, Float64[Tensor, "t t"]]]
    """Side -> K -> every checkpoint with every other; empty where one did not move."""


def bases(top: Decomposition | None) -> Bases | None:
    """The leading vectors of an update up to its rank; None where nothing moved."""
    if top is None:
        return None
    rank = min(int((top.s > top.tolerance).sum()), top.u.shape[1])
    return {"U": top.u[:, :rank], "V": top.v[:, :rank]}


def later(early: Update, last: Update) -> Decomposition | None:
    """The leading triplets of dW_T - dW_t; None where nothing moved in between."""
    if early.factors and last.factors:
        (b, a, scale), (b_last, a_last, scale_last) = early.factors, last.factors
        found = decompose_product(torch.cat([scale_last * b_last, -scale * b], 1), torch.cat([a_last, a]))
        return found if found.s[0].item() > 1e-6 * scale_last * b_last.norm().item() * a_last.norm().item() else None
    change = last.dw - early.dw
    return decompose(change, min(K, *change.shape)) if bool(change.any()) else None


def follow(
    found: Sequence[Bases | None],
    after: Sequence[Bases | None],
    steps: Sequence[int | float],
    shape: tuple[int, int],
    key: int,
    covariance: Float[Tensor, "n n"] | None = None,
) -> Trajectory:
    """Similarities over time, beside those of noise.

    Args:
        found: leading vectors of dW_t at each checkpoint.
        after: those of dW_T - dW_t, for all checkpoints but the last.
        steps: of the checkpoints, as far as a walk of noise goes by them (`recorded.noise_times`).
        shape: (m, n).
        key: seed of the noise.
        covariance: of the layer's inputs, where known.
    """
    columns: list[Row] = [{} for _ in found]
    if len(found) < 2:
        return Trajectory(columns=columns, similarity={})
    k = min(K, sizes(*shape)[-1])
    walk, null_after = _noise(shape, steps, k, key, covariance)
    null_found = [bases(d) for d, _ in walk]
    for t, own in enumerate(found):
        for side, d in zip("UV", shape, strict=True):
            columns[t][f"sim_{side}_chance"] = k / d
            if own is None:
                continue
            null, last_null = null_found[t], null_found[-1]
            columns[t] |= {
                f"sim_{side}": _sim(own, found[-1], side, k),
                f"sim_{side}_null": _sim(null, last_null, side, k),
            }
            columns[t] |= {f"sim{w}_{side}": _sim(own, found[-1], side, w) for w in sizes(*shape)}
            columns[t] |= {f"sim{w}_{side}_null": _sim(null, last_null, side, w) for w in sizes(*shape) if w <= k}
            if t < len(after):
                columns[t][f"later_{side}"] = _sim(own, after[t], side, k)
                columns[t][f"later_{side}_null"] = _sim(null, null_after[t], side, k)
        if own is not None:
            columns[t]["srank_noise"] = walk[t][1]
        if own is not None and covariance is not None and own["V"].shape[1] >= k:
            columns[t]["inputs"] = _alignment(own["V"][:, :k], covariance)
    return Trajectory(columns=columns, similarity=_matrices([b for b in found if b], len(found), shape))


def _sim(a: Bases | None, b: Bases | None, side: str, k: int) -> float:
    """nan where one of them did not move, or not in k directions."""
    if a is None or b is None or min(a[side].shape[1], b[side].shape[1]) < k:
        return math.nan
    return min(similarity(a[side][:, :k], b[side][:, :k]), 1.0)  # rounding may exceed it


def _alignment(v: Float64[Tensor, "n k"], covariance: Float[Tensor, "n n"]) -> float:
    """nan for inputs that lie in fewer than k directions: few tokens, in the first layer."""
    own = bases(decompose(covariance, v.shape[1]))
    return similarity(v, own["V"]) if own and own["V"].shape[1] == v.shape[1] else math.nan


def _matrices(found: list[Bases], count: int, shape: tuple[int, int]) -> dict[str, dict[int, Float64[Tensor, "t t"]]]:
    if len(found) < count:
        return {}
    top = min(b["V"].shape[1] for b in found)
    ks = [k for k in sizes(*shape) if k <= top]
    return {side: {k: similarity_matrix([b[side] for b in found], k) for k in ks} for side in SIDES.values()}


def _noise(
    shape: tuple[int, int], steps: Sequence[int | float], k: int, key: int, covariance: Float[Tensor, "n n"] | None
) -> tuple[list[tuple[Decomposition, float]], list[Bases | None]]:
    """A walk of noise at each step, decomposed, with its stable rank; and leading vectors of what follows each point."""
    walk = list(_white(shape, steps, key) if covariance is None else noise_trajectory(covariance, shape[0], steps, key))
    found = [decompose(dw, k) for dw in walk]
    ranks = [(dw.double().norm() / d.s[0]).item() ** 2 for dw, d in zip(walk, found, strict=True)]
    return list(zip(found, ranks, strict=True)), [bases(decompose(walk[-1] - dw, k)) for dw in walk[:-1]]


def _white(shape: tuple[int, int], steps: Sequence[int | float], key: int) -> Iterator[Float[Tensor, "m n"]]:
    """As `noise_trajectory` with C = 1, without its eigenvectors."""
    dw, before = torch.zeros(shape), 0.0
    for t in steps:
        dw = dw + isotropic_update(*shape, math.sqrt((t - before) * math.prod(shape)), derive(key, f"{t:g}"))
        before = t
        yield dw
