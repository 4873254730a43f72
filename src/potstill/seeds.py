"""Random numbers that depend on *what* they are for, never on when they are drawn.

Every stream is keyed by names and integers (run seed, step, prompt id, sample, anchor, continuation), so neither
the order of arrival nor the size of a batch changes a number, and no two streams overlap.
"""

import hashlib

import numpy as np
from jaxtyping import Float32


def derive(*key: str | int) -> int:
    """A 63-bit seed from a key; equal keys give equal seeds, on every machine."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def uniforms(seed: int, count: int) -> Float32[np.ndarray, " count"]:
    """`count` numbers in [0, 1). A longer draw starts with the shorter one."""
    return np.random.Generator(np.random.Philox(seed)).random(count, dtype=np.float32)
