"""One matrix of one checkpoint as a row of numbers, each beside its null or floor.

    X            the number                        X_null, X_null_sd   mean and spread of its random draws
    X_chance     its value by chance, by formula   X_perm              mean for the update's entries in random places

    srank, hill, e16, part_ratio     null: the update's own entries, permuted
    density, nss, ang*               null: the update rotated, its leading singular values in random directions
    ov_*, recall_*                   null: a Gaussian update on W0 that changes as many bf16 weights

`docs/geometry.md` lists the columns.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, stdev
from typing import Any

import torch
from jaxtyping import Float, Float64

from potstill.geometry.angles import angles_between, rotation
from potstill.geometry.cache import Origin
from potstill.geometry.checks import Matrix, checked, finite
from potstill.geometry.decompose import Decomposition, decompose
from potstill.geometry.floors import isotropic_shift, isotropic_stable_rank, storage
from potstill.geometry.inputs import Update
from potstill.geometry.masks import MaskOverlap, overlap_with
from potstill.geometry.matrices import Name
from potstill.geometry.nulls import isotropic_update, overlap_null, permuted_update, rotation_matched_update
from potstill.geometry.sparsity import changed_mask, update_sparsity
from potstill.geometry.spectrum import shift_between
from potstill.geometry.subspace import projection_energy
from potstill.geometry.update import KS, UpdateSummary, summarise_product, summarise_update
from potstill.seeds import derive

Row = dict[str, Any]
SIDES = {"left": "U", "right": "V"}
MASKS = {"princ": "principal", "low": "low", "princ_notlow": "principal_not_low"}
MAP = 64
"""Bins along each side of a density map."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the numbers depend on besides the weights."""

    k: int = 512
    """Dimension of the weights' leading subspaces."""
    ks: tuple[int, ...] = (16, 64, 128)
    """Smaller ones, to show how much depends on k."""
    rank: int = 64
    """Of the principal mask and of the projection energy."""
    fraction: float = 0.3
    """Share of weights in each mask."""
    nulls: int = 2
    """Draws of each null but the rotated update, which costs a decomposition and is drawn once."""
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A row, and what the trajectory and the page need besides."""

    row: Row
    top: Decomposition | None
    """Leading triplets of dW; None where nothing moved."""
    d1: Decomposition | None
    rotated: Decomposition | None
    """W0 + the rotated update."""


def measure_update(name: Name, w0: Matrix, origin: Origin, update: Update, key: int, settings: Settings) -> Measured:
    """All numbers of one update that need no other checkpoint.

    Args:
        name: of the matrix.
        w0: [m, n] as stored.
        origin: its decomposition and masks.
        update: the checkpoint's matrix.
        key: seed of the nulls.
        settings: as above.

    Raises:
        ConfigError: weights that are not finite, or of a rank below k.
    """
    w1, dw = update.w1, update.dw
    checked(w0, w1)
    finite(w1)
    norm, norm0 = (torch.linalg.vector_norm(w, dtype=torch.float64).item() for w in (dw, w0))
    sparsity = update_sparsity(w0, w1)
    row: Row = {
        "numel": dw.numel(),
        "changed": round((1 - sparsity) * dw.numel()),
        "sp_bf16": sparsity,
        "density": 1 - sparsity,
        "fro": norm,
        "rel_fro": norm / norm0,
    }
    if norm == 0:
        return Measured(row=row, top=None, d1=None, rotated=None)
    seeds = [derive(key, i) for i in range(settings.nulls)]
    summary = _summarise(update)
    row |= _shape(summary, dw, seeds)
    d1 = decompose(w1, origin.k, route="gram")
    other = w0.float() + _rotated(summary.top, norm, name, key).to(w0.device)
    rotated = decompose(other, origin.k, route="gram")
    row["density_null"] = 1 - update_sparsity(w0, other)
    row |= _spectrum(origin.d, d1, rotated) | {"nss_chance": isotropic_shift(norm, norm0, name.m, name.n)}
    row |= _rotation(origin, d1, rotated, settings)
    row |= _overlaps(w0, origin, update, seeds)
    row |= {"proj": projection_energy(dw, origin.d, origin.rank), "proj_chance": origin.rank**2 / dw.numel()}
    held = storage(w0, dw)
    row |= {"rms": held.rms, "half_spacing": held.half_spacing, "storage_ratio": held.ratio}
    return Measured(row=row, top=summary.top, d1=d1, rotated=rotated)


def sizes(m: int, n: int) -> tuple[int, ...]:
    """The K of `KS` that leave at least half of the smaller side out."""
    return tuple(k for k in KS if 2 * k <= min(m, n)) or (1,)


def _summarise(update: Update) -> UpdateSummary:
    ks = sizes(update.dw.shape[0], update.dw.shape[1])
    return summarise_product(*update.factors, ks=ks) if update.factors else summarise_update(update.dw, ks)


def _rotated(top: Decomposition, norm: float, name: Name, key: int) -> Float[torch.Tensor, "m n"]:
    """The update's leading singular values in random directions, and the rest of its norm without any structure."""
    s = top.s[: max(KS)]
    rest = math.sqrt(max(norm**2 - s.square().sum().item(), 0.0))
    leading = rotation_matched_update(s, name.m, name.n, derive(key, "rotated")).float()
    return leading.cpu() + isotropic_update(name.m, name.n, rest, derive(key, "rest"))


def _shape(summary: UpdateSummary, dw: Matrix, seeds: Sequence[int]) -> Row:
    ks = tuple(summary.energy)

    def numbers(of: UpdateSummary) -> Row:
        row: Row = {"srank": of.stable_rank, "part_ratio": of.participation_ratio, "e16": of.energy.get(16)}
        return row | {f"hill_k{k}": value for k, value in of.hill.items()}

    own = numbers(summary)
    row = own | {"s1": summary.spectral, "srank_chance": isotropic_stable_rank(*dw.shape)}
    row |= {f"gap_ratio_k{k}": value for k, value in summary.gap_ratio.items()}
    return row | _drawn(own, [numbers(summarise_update(permuted_update(dw, seed), ks)) for seed in seeds])


def _drawn(own: Mapping[str, Any], draws: Sequence[Mapping[str, Any]]) -> Row:
    """Mean and spread of the finite draws of every number that there is; Hill's estimate may be undefined in some."""
    row: Row = {}
    for name, value in own.items():
        values = [draw[name] for draw in draws if math.isfinite(draw[name])] if value is not None else []
        if len(values) > 1:
            row |= {f"{name}_null": fmean(values), f"{name}_null_sd": stdev(values)}
    return row


def _spectrum(d0: Decomposition, d1: Decomposition, rotated: Decomposition) -> Row:
    shift, null = asdict(shift_between(d0.s, d1.s)), asdict(shift_between(d0.s, rotated.s))
    names = {"shift": "nss", "scale": "nss_scale", "shape": "nss_shape", "signed": "nss_signed"}
    return {new: shift[old] for old, new in names.items()} | {f"{new}_null": null[old] for old, new in names.items()}


def _rotation(origin: Origin, d1: Decomposition, rotated: Decomposition, settings: Settings) -> Row:
    ks = [k for k in settings.ks if k < origin.k] + [origin.k]
    row: Row = {"k": origin.k}
    for own, null in zip(rotation(origin.d, d1, ks), rotation(origin.d, rotated, ks), strict=True):
        at = f"_k{own.k}" if own.k < origin.k else ""
        row[f"gap{at}"] = own.gap
        for side, letter in SIDES.items():
            for short, long in (("med", "median"), ("mean", "mean"), ("max", "max")):
                column = f"ang{letter}_{short}{at}"
                row[column] = getattr(own, f"{side}_{long}")
                row[f"{column}_null"] = getattr(null, f"{side}_{long}")
    return row


def _overlaps(w0: Matrix, origin: Origin, update: Update, seeds: Sequence[int]) -> Row:
    def numbers(of: MaskOverlap) -> Row:
        row: Row = {}
        for short, long in MASKS.items():
            found = getattr(of, long)
            row |= {f"ov_{short}": found.overlap, f"recall_{short}": found.recall}
        return row

    found = overlap_with(origin.masks, w0, update.w1)
    own = numbers(found)
    row = dict(own)
    for short, long in MASKS.items():
        one = getattr(found, long)
        row |= {f"ov_{short}_chance": one.share, f"ceiling_{short}": one.ceiling, f"lift_{short}": one.lift}
        row |= {f"energy_{short}": one.energy, f"energy_{short}_chance": one.share}
    if 0 < found.density < 1:  # else the overlaps are fixed and need no null
        row |= _drawn(own, [numbers(overlap_null(w0, origin.masks, found.density, seed)) for seed in seeds])
    moved = [overlap_with(origin.masks, w0, w0.float() + permuted_update(update.dw, seed)) for seed in seeds]
    for short, long in MASKS.items():
        row[f"ov_{short}_perm"] = fmean(getattr(one, long).overlap for one in moved)
    return row


def example(name: Name, w0: Matrix, origin: Origin, update: Update, measured: Measured) -> Row:
    """What the paper draws of a single matrix: the whole vectors of angles and values, and where the weights changed."""
    assert measured.d1 and measured.rotated
    angles = {}
    for what, d in (("angles", measured.d1), ("angles_null", measured.rotated)):
        left, right = angles_between(origin.d, d, origin.k)
        angles[what] = {"U": left.tolist(), "V": right.tolist()}
    mask = changed_mask(w0, update.w1)
    maps = {"changed": mask, "principal": mask & origin.masks.principal, "low": mask & origin.masks.low}
    return {
        "matrix": name.matrix,
        "k": origin.k,
        **angles,
        "s0": origin.d.s[: origin.k].tolist(),
        "s1": measured.d1.s[: origin.k].tolist(),
        "s_null": measured.rotated.s[: origin.k].tolist(),
        "maps": {what: density_map(one).tolist() for what, one in maps.items()},
    }


def density_map(mask: Matrix, bins: int = MAP) -> Float64[torch.Tensor, "rows columns"]:
    """Share of true entries in a grid of at most `bins` x `bins` cells."""
    pool: Callable[..., torch.Tensor] = torch.nn.functional.adaptive_avg_pool2d
    grid = [min(bins, size) for size in mask.shape]
    return pool(mask[None, None].double(), grid)[0, 0].cpu()
