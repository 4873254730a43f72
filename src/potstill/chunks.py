"""Which parts of a rollout a teacher is asked about, and what its answers are worth (OmniOPD, arXiv:2606.01476)."""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

Scheduler = Literal["peak_entropy", "uniform", "random"]
Overlap = Literal["skip", "merge", "resample"]


class Chunk(NamedTuple):
    """Tokens start .. start + length - 1 of a response; the first one is the anchor."""

    start: int
    length: int


def select_chunks(entropy: Sequence[float], count: int, length: int) -> list[int]:
    """Anchors of at most `count` chunks of `length` tokens, ascending (OmniOPD Eq. 7).

    Greedy non-maximum suppression: positions by falling entropy (nats), each taken if its chunk fits into the response
    and overlaps none taken before. Of equal entropies the earlier position wins. Fewer than `count` are returned where
    no more fit; the last `length` - 1 positions can never be anchors.
    """
    return [chunk.start for chunk in plan_chunks(entropy, count, length)]


def plan_chunks(
    entropy: Sequence[float],
    count: int,
    length: int,
    *,
    scheduler: Scheduler = "peak_entropy",
    overlap: Overlap = "skip",
    seed: int = 0,
    pieces: Sequence[str] | None = None,
) -> list[Chunk]:
    """Chunks of a response, ascending and disjoint.

    `scheduler` ranks the positions: by entropy (Eq. 7), at even distances, or at random from `seed`.
    `overlap` says what happens where two anchors are closer than `length` (the paper names merging and resampling and
    chooses neither): `skip` takes the next position by rank; `merge` takes the `count` first positions and joins
    overlapping chunks into longer ones; `resample` replaces an overlapping anchor by a random position.
    `pieces`, the text of each token: anchors move back to where their word begins, if they stay in the chunk.
    """
    fits = len(entropy) - length + 1
    if fits <= 0:
        return []
    rng = np.random.default_rng(seed)
    if scheduler == "uniform":
        order = sorted({round(i * (fits - 1) / max(count - 1, 1)) for i in range(count)})
    elif scheduler == "random":
        order = rng.permutation(fits).tolist()
    else:
        order = sorted(range(fits), key=lambda t: (-entropy[t], t))
    starts = range(len(entropy)) if pieces is None else word_starts(pieces)
    moved = [starts[t] if t - starts[t] < length else t for t in range(fits)]
    order = list(dict.fromkeys(moved[t] for t in order))

    if overlap == "merge":
        return _merged(sorted(order[:count]), length)
    if overlap == "resample":
        first = _skip_overlaps(order[:count], count, length)
        order = first + [moved[t] for t in rng.permutation(fits).tolist() if moved[t] not in first]
    return [Chunk(t, length) for t in sorted(_skip_overlaps(order, count, length))]


def word_starts(pieces: Sequence[str]) -> list[int]:
    """[T] for each token the position where its word begins: at the start, at white space, or right behind it."""
    out: list[int] = []
    behind = True  # white space, or the beginning
    for t, piece in enumerate(pieces):
        out.append(t if behind or piece[:1].isspace() else out[-1])
        behind = piece[-1:].isspace()
    return out


def _skip_overlaps(order: Sequence[int], count: int, length: int) -> list[int]:
    taken: list[int] = []
    for t in order:
        if len(taken) == count:
            break
        if all(abs(t - other) >= length for other in taken):
            taken.append(t)
    return taken


def _merged(anchors: Sequence[int], length: int) -> list[Chunk]:
    out: list[Chunk] = []
    for t in anchors:
        if out and t < out[-1].start + out[-1].length:
            start = out.pop().start
            out.append(Chunk(start, t + length - start))
        else:
            out.append(Chunk(t, length))
    return out


def chunk_prior(old_logp: Sequence[float]) -> float:
    """pi_bar = (prod_t pi(y_t | h_t))^(1/C) = exp(mean log pi): the student's own belief in a chunk (Eq. 4)."""
    return math.exp(math.fsum(old_logp) / len(old_logp))


def chunk_target(k_sem: float, pi_bar: float, n: int, alpha: float) -> float:
    """(k_sem + alpha pi_bar) / (n + alpha), in [0, 1] (OmniOPD Eq. 5).

    k_sem: sum of the n similarities. pi_bar: the student's prior. alpha: its weight, in samples.
    Raises ValueError where the arguments cannot come from n similarities in [0, 1].
    """
    if n < 1 or not 0 <= k_sem <= n + 1e-9:
        raise ValueError(f"k_sem = {k_sem} cannot be the sum of n = {n} similarities in [0, 1]")
    if alpha < 0 or not 0 <= pi_bar <= 1 + 1e-9:
        raise ValueError(f"alpha = {alpha} must be >= 0 and pi_bar = {pi_bar} a probability")
    return min((k_sem + alpha * pi_bar) / (n + alpha), 1.0)
