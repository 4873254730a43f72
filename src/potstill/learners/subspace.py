"""Training inside a subspace: what is left of an update when its inputs may only come from K directions.

    W [m, n] a weight matrix, G its gradient, V [n, K] an orthonormal basis, P = V V^T
    grad     G <- G P, then clipping, then Adam               the paper's rule (arXiv:2606.07082, Sec. 4.2)
    step     Adam, then W_new <- W_old + (W_new - W_old) P    the whole step, weight decay included
    coord    W = W_at + B V^T, Adam on B [m, K] with gradient G V; no weight decay       (GaLore's form)

`grad` is no rank-K constraint: Adam divides entry by entry, which leaves the subspace and brings the step back to full
size. So the share of the realised update that lies inside is logged. `step` and `coord` are strict, and their steps are
several times shorter at the same learning rate. Adam's moments are kept when the projection starts, but for B, which has
none. Which of this the paper does is not known, nor which matrices it means; `matrices` says.

V comes from the update so far (`self`), from a recording of another run, from the layer's inputs, or at random. K = 0 is
the control that stops: these weights stay where they were, and the others train on.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from potstill.config import Projection
from potstill.errors import ConfigError
from potstill.geometry.decompose import decompose
from potstill.seeds import derive

Matrices = Mapping[str, Tensor]
ATTENTION = re.compile(r"attn|attention")


def linear_weights(model: Any, only: str) -> dict[str, torch.nn.Linear]:
    """The linear layers by the name of their weight: those of attention, or all but the output layer."""
    found = {f"{n}.weight": m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    head = model.get_output_embeddings()
    return {n: m for n, m in found.items() if m is not head and (only == "linear" or ATTENTION.search(n))}


class Subspace:
    """The bases of one run's matrices, and what they do to a gradient and to a step."""

    def __init__(self, config: Projection, model: Any, seed: int):
        self.config, self.seed = config, seed
        self.layers = linear_weights(model, config.matrices)
        self.start = {n: m.weight.detach().clone() for n, m in self.layers.items()}
        self.bases: dict[str, Tensor] = {}
        self.since: dict[str, Tensor] = {}
        """The weights when the projection started."""
        self.inside: dict[str, Tensor] = {}
        """B of `coord`."""

    @property
    def weights(self) -> dict[str, Tensor]:
        """The matrices as they are now."""
        return {n: m.weight for n, m in self.layers.items()}

    def begin(self, inputs: Matrices) -> None:
        """Choose the bases. `inputs` holds each layer's second moment E[x x^T], [n, n], where `basis` needs it."""
        for name, weight in self.weights.items():
            self.bases[name] = self._basis(name, weight.detach(), inputs).to(weight)
            self.since[name] = weight.detach().clone()
            if self.config.mode == "coord":
                b = torch.zeros(weight.shape[0], self.bases[name].shape[1]).to(weight)
                self.inside[name] = b.requires_grad_()

    def _basis(self, name: str, weight: Float[Tensor, "m n"], inputs: Matrices) -> Float[Tensor, "n K"]:
        k, source = min(self.config.k, *weight.shape), self.config.basis
        if k == 0:
            return weight.new_zeros(weight.shape[1], 0)
        if source == "self":
            moved = weight - self.start[name]
            if not moved.any():
                raise ConfigError(
                    f"{name} has not moved when the projection starts, so it has no subspace. Start it later"
                )
            return decompose(moved, k).v
        if source == "random":
            generator = torch.Generator().manual_seed(derive(self.seed, "basis", name))
            return torch.linalg.qr(torch.randn(weight.shape[1], k, generator=generator)).Q
        if source == "inputs":
            return torch.linalg.eigh(inputs[name].double()).eigenvectors[:, -k:]
        return recorded(Path(source), name, weight.shape[1], k)

    def project_gradients(self) -> None:
        """Before clipping. `coord` takes the matrix's own gradient away, so that the optimiser leaves it alone."""
        for name, weight in self.weights.items() if self.bases else ():
            v = self.bases[name]
            if weight.grad is None:
                continue
            if self.config.mode == "grad":
                weight.grad = weight.grad @ v @ v.T
            if self.config.mode == "coord":
                self.inside[name].grad, weight.grad = weight.grad @ v, None

    @torch.no_grad()
    def project_step(self, before: Matrices) -> None:
        """After the optimiser's step; `before` holds the weights it started from."""
        for name, weight in self.weights.items():
            v = self.bases[name]
            if self.config.mode == "step":
                weight.copy_(before[name] + (weight - before[name]) @ v @ v.T)
            if self.config.mode == "coord":
                weight.copy_(self.since[name] + self.inside[name] @ v.T)

    @torch.no_grad()
    def inside_share(self) -> float:
        """||dW V||^2 / ||dW||^2 of all matrices together, dW being the update since the projection started."""
        within = whole = 0.0
        for name, weight in self.weights.items():
            moved = (weight - self.since[name]).double()
            within += (moved @ self.bases[name].double()).square().sum().item()
            whole += moved.square().sum().item()
        return within / whole if whole else 1.0

    def state(self) -> dict[str, dict[str, Tensor]]:
        """What a resumed run needs."""
        return {
            "bases": self.bases,
            "since": self.since,
            "inside": {n: b.detach() for n, b in self.inside.items()},
        }

    def restore(self, state: Mapping[str, dict[str, Tensor]]) -> None:
        """As `state` left it."""
        self.bases, self.since = dict(state["bases"]), dict(state["since"])
        self.inside = {n: b.clone().requires_grad_() for n, b in state["inside"].items()}


def recorded(path: Path, name: str, n: int, k: int) -> Float[Tensor, "n K"]:
    """The k leading right singular vectors of a matrix from a file of `geometry/`. Raises ConfigError."""
    try:
        with np.load(path) as file:
            found = file.get(f"{name}/v")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"projection.from = {str(path)!r} cannot be read ({error}). Give a geometry/step_*.npz"
        ) from None
    if found is None or found.shape[0] != n or found.shape[1] < k:
        held = "no such matrix" if found is None else f"vectors of shape {list(found.shape)}"
        raise ConfigError(
            f"projection.from = {str(path)!r} holds {held} for {name}, but {k} vectors of length {n} are needed. Record a run "
            "of the same student, with geometry.k at least projection.k"
        )
    return torch.from_numpy(found[:, :k])


def second_moments(layers: Mapping[str, torch.nn.Linear], forward: Iterator[None]) -> dict[str, Tensor]:
    """E[x x^T] of each layer's inputs over the tokens that `forward` sends through the model, one text at a time."""
    sums: dict[str, Tensor] = {}
    tokens: dict[str, int] = {}

    def hook(name: str) -> Any:
        def keep(module: Any, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].detach().flatten(0, -2).double()
            sums[name] = sums.get(name, 0) + x.T @ x
            tokens[name] = tokens.get(name, 0) + len(x)

        return keep

    hooks = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    try:
        for _ in forward:
            pass
    finally:
        for handle in hooks:
            handle.remove()
    return {name: total / tokens[name] for name, total in sums.items()}
