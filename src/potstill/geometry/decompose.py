"""Singular values and leading singular vectors, by three routes that agree.

    svd       LAPACK on W itself: the reference, and several times as slow as the others
    gram      eigenvectors of the smaller Gram matrix, W W^T or W^T W
    lanczos   block Lanczos on the same Gram matrix, which it need not form: the choice for k << p

The last two square the singular values. In double precision this costs nothing that is seen here: the value s_i keeps
a relative error of about 1e-16 (s_1 / s_i)^2, and the k leading triplets are computed anew from W (`_refined`), which
leaves 1e-16 s_1 / s_i. A Gram matrix in single precision would inflate small spectral shifts several times.

W is [m, n], p = min(m, n); values descend; all results are double, on the device of W.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float64
from torch import Tensor

from potstill.errors import ConfigError, unknown
from potstill.geometry.checks import Matrix, checked, finite, moved, rank_within
from potstill.seeds import derive

Route = Literal["auto", "svd", "gram", "lanczos"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Decomposition:
    """W's k leading singular triplets, W v_i = s_i u_i, and the values that follow them as far as they are known."""

    u: Float64[Tensor, "m k"]
    s: Float64[Tensor, " r"]
    """Descending. All p by `svd` and `gram`; min(k + 1, p) by `lanczos`, so that the gap behind s_k is known."""
    v: Float64[Tensor, "n k"]
    tolerance: float
    """Values up to this one are zero within the precision of the weights."""

    def next(self, k: int) -> float:
        """s_{k+1}, or 0 where there is none."""
        return self.s[k].item() if k < len(self.s) else 0.0

    def gap(self, k: int) -> float:
        """s_k - s_{k+1}: an update of spectral norm e turns the k-subspace by at most about e / gap (Wedin)."""
        return self.s[k - 1].item() - self.next(k)

    def gap_ratio(self, k: int) -> float:
        """s_k / s_{k+1}; inf where s_{k+1} = 0. Near 1, which k directions lead is decided by noise."""
        return self.s[k - 1].item() / self.next(k) if self.next(k) > 0 else float("inf")

    def defined(self, k: int, what: str) -> None:
        """Raise ConfigError unless the k leading directions are held here and s_k is above zero."""
        moved(self.s[0].item(), what)
        rank_within(k, self.u.shape[1], f"{what} needs that many singular vectors and values")
        rank = int((self.s > self.tolerance).sum())
        rank_within(k, rank, f"{what} is undefined beyond the rank, which is {rank} here")


def decompose(
    w: Matrix, k: int, route: Route = "auto", gram_matrix: Float64[Tensor, "p p"] | None = None
) -> Decomposition:
    """The k leading singular triplets of `w`.

    Args:
        w: [m, n] weights or update, any floating type.
        k: 1 .. p.
        route: `auto` takes Lanczos for k <= p / 16 and the Gram matrix beyond.
        gram_matrix: `gram(w)`, where the caller has it already.

    Raises:
        ConfigError: not a finite matrix, k outside 1 .. p, or an unknown route.
    """
    checked(w)
    finite(w)
    if route not in get_args(Route):
        raise ConfigError(unknown("route", route, get_args(Route)))
    p = min(w.shape)
    rank_within(k, p, f"a matrix of shape {list(w.shape)} has {p} singular values")
    if route == "auto":
        route = "lanczos" if 16 * k <= p else "gram"

    wide = _wide(w)
    if route == "svd":
        u, s, vh = torch.linalg.svd(wide, full_matrices=False)
        v = vh.T
    else:
        kept = min(k + 1, p)
        if route == "gram":
            values, vectors = torch.linalg.eigh(gram(wide) if gram_matrix is None else gram_matrix)
            u, s = vectors[:, -kept:].flip(1), values.flip(0).clamp_min(0).sqrt()
        else:
            u, s = lanczos(lambda x: (x @ wide) @ wide.T if gram_matrix is None else x @ gram_matrix.T, p, kept, wide)
        u, s, v = _refined(wide, u, s)
    if wide.shape != w.shape:
        u, v = v, u
    return Decomposition(u=u[:, :k].contiguous(), s=s, v=v[:, :k].contiguous(), tolerance=_tolerance(w, s))


def singular_values(w: Matrix) -> Float64[Tensor, " p"]:
    """All p singular values of `w` [m, n], descending.

    By the Gram matrix: a value that is exactly zero comes out as up to about 1e-8 s_1.

    Raises:
        ConfigError: not a finite matrix.
    """
    checked(w)
    finite(w)
    return torch.linalg.eigvalsh(gram(w)).flip(0).clamp_min(0).sqrt()


def decompose_product(b: Matrix, a: Matrix, scale: float = 1.0) -> Decomposition:
    """All singular triplets of the low-rank update scale * B A, through its r x r core, in O((m + n) r^2).

    With B = Q_b R_b and A^T = Q_a R_a, the core scale * R_b R_a^T has the singular values of the product.

    Args:
        b: [m, r], LoRA's B.
        a: [r, n], LoRA's A.
        scale: LoRA's alpha / r.

    Raises:
        ConfigError: not finite matrices, or B and A do not fit together.
    """
    checked(b)
    checked(a)
    finite(b, a)
    if b.shape[1] != a.shape[0]:
        raise ConfigError(
            f"B {list(b.shape)} and A {list(a.shape)} have no product: their inner sizes are the adapter's rank and "
            "must agree. Pass lora_B.weight first, then lora_A.weight"
        )
    (q_b, r_b), (q_a, r_a) = torch.linalg.qr(b.detach().double()), torch.linalg.qr(a.detach().double().T)
    u, s, vh = torch.linalg.svd(scale * r_b @ r_a.T, full_matrices=False)
    padded = torch.zeros(min(b.shape[0], a.shape[1]), dtype=s.dtype, device=s.device)
    padded[: len(s)] = s
    return Decomposition(u=q_b @ u, s=padded, v=q_a @ vh.T, tolerance=_tolerance(b, s))


def gram(w: Matrix) -> Float64[Tensor, "p p"]:
    """The smaller of W W^T and W^T W in double precision; of a square matrix, W W^T.

    Only the blocks on and below the diagonal are multiplied, the others mirrored.
    """
    wide = _wide(w)
    p, block = wide.shape[0], 512
    out = torch.empty(p, p, dtype=torch.float64, device=w.device)
    for i in range(0, p, block):
        rows = wide[i : i + block] @ wide[: i + block].T
        out[i : i + block, : i + block] = rows
        out[: i + block, i : i + block] = rows.T
    return out


def _wide(w: Tensor) -> Float64[Tensor, "p q"]:
    """W or W^T, whichever has no more rows than columns, in double and outside of autograd."""
    wide = w.detach().double()
    return wide if w.shape[0] <= w.shape[1] else wide.T


def lanczos(
    apply: Callable[[Tensor], Tensor], p: int, k: int, like: Tensor
) -> tuple[Float64[Tensor, "p k"], Float64[Tensor, " k"]]:
    """The k leading eigenvectors of a symmetric positive semi-definite p x p operator G and the roots of their values.

    Block Lanczos with full reorthogonalisation (Golub & Underwood 1977), started from a seeded Gaussian block. The
    basis Q grows until every wanted Ritz pair (theta, y) has a residual ||G y - theta y|| below 1e-8 theta, or below
    the rounding error of G; values are then off by its square. Unlike a randomised SVD with a few power iterations it
    does not mix directions across a narrow gap. Where the spectrum is so flat that Q would have to span the whole
    space, it does, and the result is exact. Of a value that occurs *exactly* more than 8 times, copies beyond the
    eighth may be missed; the Gram route has them.

    Args:
        apply: x -> x G for rows x [b, p].
        p: size of G.
        k: 1 .. p.
        like: a tensor on the wanted device.
    """
    # Vectors are rows: BLAS multiplies a few long rows two to four times as fast as a few long columns.
    block = min(p, 8)
    seeded = torch.Generator().manual_seed(derive("lanczos", p))
    start = torch.randn(p, block, generator=seeded, dtype=torch.float64).to(like.device)
    q = torch.linalg.qr(start).Q.T.contiguous()
    t = torch.zeros(0, 0, dtype=torch.float64, device=like.device)
    next_check = 2 * k
    while True:
        d, b = q.shape[0], q.shape[0] - t.shape[0]
        image = apply(q[-b:])
        inside = image @ q.T
        t = torch.cat([torch.cat([t, t.new_zeros(d - b, b)], 1), inside])  # its lower triangle is that of Q G Q^T
        fresh, coupling = _orthonormal(image - inside @ q, q)
        if d >= next_check or len(fresh) == 0:
            theta, y = torch.linalg.eigh(t)
            theta, y = theta.flip(0)[:k].clamp_min(0), y.flip(1)[:, :k]
            residual = torch.linalg.vector_norm(coupling @ y[-b:], dim=0)
            if len(fresh) == 0 or bool((residual <= 1e-8 * theta + 1e-14 * theta[0]).all()):
                return q.T @ y, theta.sqrt()
            next_check = d + max(block, d // 6)
        q = torch.cat([q, fresh])


def _orthonormal(x: Float64[Tensor, "b p"], q: Float64[Tensor, "d p"]) -> tuple[Tensor, Tensor]:
    """x = C^T Y up to rounding, with rows Y orthonormal and orthogonal to `q`; at most p - d rows are left to find.

    `x` has been projected once; the second time comes after a QR, which may fill up a deficient block with directions
    that `q` holds already.
    """
    y, c = torch.linalg.qr(x.T)
    y = y.T - (y.T @ q.T) @ q
    y, again = torch.linalg.qr(y.T)
    room = q.shape[1] - q.shape[0]
    return y.T[:room], (again @ c)[:room]


def _refined(
    wide: Float64[Tensor, "p n"], u: Float64[Tensor, "p k"], s: Float64[Tensor, " r"]
) -> tuple[Float64[Tensor, "p k"], Float64[Tensor, " r"], Float64[Tensor, "n k"]]:
    """Rayleigh-Ritz on W itself: the SVD of U^T W repairs values and gives orthonormal right vectors.

    The Gram matrix's rounding may leave the values behind them above zero where these are zero: keep them in order.
    """
    mix, values, vh = torch.linalg.svd(u.T @ wide, full_matrices=False)
    return u @ mix, torch.cat([values, s[len(values) :].minimum(values[-1])]), vh.T


def _tolerance(w: Tensor, s: Tensor) -> float:
    # Weights are rarely exact to more than single precision, whatever type a difference of them is stored in.
    eps = torch.finfo(torch.float64 if w.dtype == torch.float64 else torch.float32).eps
    return 4 * max(w.shape) ** 0.5 * eps * s[0].item()
