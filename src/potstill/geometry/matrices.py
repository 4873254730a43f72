"""Which tensors are measured, and what is left out and why."""

import re
from collections import Counter
from dataclasses import dataclass
from typing import Literal, get_args

from potstill.errors import ConfigError, unknown
from potstill.geometry.inputs import Checkpoint, Folder

Only = Literal["attention", "all"]
Kind = Literal["attention", "other"]

OUTSIDE = re.compile(r"(^|\.)(lm_head|embed\w*|wte|wpe|\w*embeddings?\w*)(\.|$)")
ATTENTION = re.compile(r"attn|attention")


@dataclass(frozen=True, slots=True, kw_only=True)
class Name:
    """A weight matrix of a linear layer."""

    matrix: str
    """Its name in the file."""
    layer: int
    """The first number in the name; -1 where there is none."""
    module: str
    """q_proj, down_proj, ..."""
    kind: Kind
    """`attention` is what the paper averages over."""
    m: int
    """Rows: outputs."""
    n: int
    """Columns: inputs."""


def choose(w0: Folder, checkpoints: list[Checkpoint], only: str = "all") -> tuple[list[Name], dict[str, int]]:
    """The matrices that W0 and every checkpoint share, by layer, and how many tensors were left out for which reason.

    Raises:
        ConfigError: none is left, or an unknown `only`.
    """
    if only not in get_args(Only):
        raise ConfigError(unknown("set of matrices", only, get_args(Only)))
    chosen: list[Name] = []
    left: Counter[str] = Counter()
    for name, shape in w0.shapes.items():
        why = _left_out(name, shape, checkpoints)
        found = None if why else _name(name, shape)
        if found and only == "attention" and found.kind != "attention":
            why = "not attention"
        if why or found is None:
            left[why or ""] += 1
        else:
            chosen.append(found)
    for point in checkpoints:
        if new := len(point.weights.shapes.keys() - w0.shapes.keys()):
            left["not in W0"] = max(left["not in W0"], new)
    if not chosen:
        last = checkpoints[-1].weights
        raise ConfigError(
            f"{w0.path} and {last.path} share no matrix to measure (left out: "
            f"{'; '.join(f'{n} {why}' for why, n in left.items())}). Compare checkpoints of one model; an adapter needs "
            f"the base it was trained on. Tensors are named, for example, {next(iter(w0.shapes), None)!r} and "
            f"{next(iter(last.shapes), None)!r}"
        )
    return sorted(chosen, key=lambda n: n.layer), dict(left)


def mismatched(w0: Folder, checkpoints: list[Checkpoint], only: str = "all") -> dict[str, str]:
    """Matrices of W0 that a checkpoint has in another shape, or that a whole model lacks: name -> what is wrong.

    An adapter leaves out what it was not meant for, so what it lacks is no fault.
    """
    out: dict[str, str] = {}
    for name, shape in w0.shapes.items():
        if _outside(name, shape) or (only == "attention" and not ATTENTION.search(name)):
            continue
        for point in checkpoints:
            other = point.weights.shapes.get(name)
            if other is None and isinstance(point.weights, Folder):
                out[name] = f"{point.weights.path} does not have it"
            elif other is not None and other != shape:
                out[name] = f"its shape is {list(shape)} in {w0.path} and {list(other)} in {point.weights.path}"
    return out


def _left_out(name: str, shape: tuple[int, ...], checkpoints: list[Checkpoint]) -> str | None:
    if why := _outside(name, shape):
        return why
    others = [point.weights.shapes.get(name) for point in checkpoints]
    if None in others:
        return "not in every checkpoint"
    return "of another shape in a checkpoint" if any(s != shape for s in others) else None


def _outside(name: str, shape: tuple[int, ...]) -> str | None:
    if OUTSIDE.search(name):
        return "embeddings or output layer"
    return "not a matrix (norms, biases)" if len(shape) != 2 or min(shape) < 2 else None


def _name(name: str, shape: tuple[int, ...]) -> Name:
    number = re.search(r"(?:^|\.)(\d+)\.", name)
    return Name(
        matrix=name,
        layer=int(number[1]) if number else -1,
        module=name.removesuffix(".weight").rpartition(".")[2],
        kind="attention" if ATTENTION.search(name) else "other",
        m=shape[0],
        n=shape[1],
    )
