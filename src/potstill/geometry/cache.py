"""What is needed of W0 for every checkpoint: its spectrum, leading vectors and masks, kept on disk and used again.

A file is named by the content of the matrix and the parameters, so it cannot go stale: another W0 has another name.
Vectors are kept in double: about 33 MB for a 4096 x 4096 matrix and k = 512, and 4 MB for its two masks.
"""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool
from safetensors.torch import load_file, save_file
from torch import Tensor

from potstill.geometry.checks import Matrix, checked, moved
from potstill.geometry.decompose import Decomposition, decompose
from potstill.geometry.masks import WeightMasks, weight_masks
from potstill.run import writing

VERSION = 1
"""Of the file's layout; part of its name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """One matrix of W0, decomposed."""

    d: Decomposition
    """All p singular values, and max(k, rank) vectors of each side."""
    k: int
    """Dimension of the subspace whose rotation is measured."""
    rank: int
    """Of the rank reduction behind the principal mask."""
    masks: WeightMasks


def default_folder() -> Path:
    """$XDG_CACHE_HOME/potstill or ~/.cache/potstill."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "potstill" / "geometry"


@dataclass(slots=True)
class Cache:
    """Decompositions of W0 in a folder."""

    folder: Path
    hits: int = 0
    misses: int = 0

    def origin(self, w0: Matrix, k: int, rank: int, fraction: float) -> Origin:
        """The decomposition and masks of `w0` [m, n], from disk if they are there.

        k and rank are cut to half of min(m, n): of larger subspaces a part cannot turn, because two of them meet.

        Raises:
            ConfigError: not a finite matrix other than zero.
            TrainingError: the disk is full.
        """
        checked(w0)
        half = min(w0.shape) // 2
        k, rank = min(k, half), min(rank, half)
        file = self.folder / f"{_digest(w0, k, rank, fraction)}.safetensors"
        if file.is_file():
            self.hits += 1
            return _load(file, w0, rank)
        self.misses += 1
        made = _make(w0, k, rank, fraction)
        _save(file, made)
        return made


def _make(w0: Matrix, k: int, rank: int, fraction: float) -> Origin:
    d = decompose(w0, max(k, rank), route="gram")  # the route that has all values
    moved(d.s[0].item(), "the geometry of an update relative to W0")
    k = min(k, int((d.s > d.tolerance).sum()))
    return Origin(d=d, k=k, rank=rank, masks=weight_masks(w0, rank, fraction, of=d))


def _digest(w0: Matrix, k: int, rank: int, fraction: float) -> str:
    digest = hashlib.blake2b(
        repr((VERSION, str(w0.dtype), tuple(w0.shape), k, rank, fraction)).encode(), digest_size=16
    )
    digest.update(w0.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _save(file: Path, made: Origin) -> None:
    tensors = {
        "u": made.d.u,
        "s": made.d.s,
        "v": made.d.v,
        "tolerance": torch.tensor(made.d.tolerance, dtype=torch.float64),
        "k": torch.tensor(made.k),
        "principal": _packed(made.masks.principal),
        "low": _packed(made.masks.low),
    }
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: t.cpu().contiguous() for name, t in tensors.items()}, temporary)
        temporary.replace(file)


def _load(file: Path, w0: Matrix, rank: int) -> Origin:
    # Copied out of the mapped file: BLAS rounds by the alignment of its arguments, and numbers must come out the same.
    t = {name: tensor.clone() for name, tensor in load_file(file, device=str(w0.device)).items()}
    d = Decomposition(u=t["u"], s=t["s"], v=t["v"], tolerance=t["tolerance"].item())
    masks = WeightMasks(principal=_unpacked(t["principal"], w0), low=_unpacked(t["low"], w0))
    return Origin(d=d, k=int(t["k"].item()), rank=rank, masks=masks)


def _packed(mask: Bool[Tensor, "m n"]) -> Tensor:
    return torch.from_numpy(np.packbits(mask.cpu().numpy().reshape(-1)))


def _unpacked(bits: Tensor, like: Matrix) -> Bool[Tensor, "m n"]:
    flat = np.unpackbits(bits.cpu().numpy(), count=like.numel()).astype(bool)
    return torch.from_numpy(flat).view(like.shape).to(like.device)
