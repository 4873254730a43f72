"""The second moment of each layer's inputs, E[x x^T], from the texts that a run has kept in rollouts/.

It is what noise gradients need: a sum of delta^T x with errors delta that know nothing has E[dW^T dW] = t m E[x x^T].
The model is W0, the texts are prompts with the student's answers, the first `TOKENS` tokens of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from potstill.geometry.inputs import Inputs
from potstill.geometry.matrices import Name
from potstill.run import Run
from potstill.types import Prompt

TOKENS = 1024
"""Of a sample. A [1024, n] sample of inputs is kept for each group of matrices with the same inputs, in fp32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Moments:
    """Inputs of linear layers."""

    samples: dict[str, Float32[Tensor, "tokens n"]]
    """By the name of the first matrix that reads them."""
    first: dict[str, str]
    """Matrix -> the first that reads the same inputs: k_proj -> q_proj."""
    told: str
    """Where they come from, in words."""

    def of(self, matrix: str) -> Float[Tensor, "n n"] | None:
        """E[x x^T] of one matrix; None where it was not seen (an expert that nothing was routed to)."""
        if matrix not in self.first:
            return None
        x = self.samples[self.first[matrix]].double()
        return x.T @ x / len(x)


def input_moments(inputs: Inputs, names: Sequence[Name]) -> Moments | None:
    """Run W0 over a run's texts; None where there is no run, no kept text, or a single point only.

    Raises:
        ModelError: W0 cannot be loaded.
    """
    if inputs.run is None or not inputs.run.rollout_steps:
        return None
    if len(inputs.checkpoints) < 2 and not inputs.run.trajectory:  # no course, whose noise would need them
        return None
    from potstill import models

    loaded = models.load(str(inputs.w0.path))
    first: dict[str, str] = {}
    seen: dict[str, list[Tensor]] = {}
    wanted = {n.matrix for n in names}
    layers = [
        (f"{name}.weight", module)
        for name, module in loaded.model.named_modules()
        if f"{name}.weight" in wanted and isinstance(module, torch.nn.Linear)
    ]
    read = 0
    for ids in _texts(inputs.run, loaded.tokens.tokenizer, loaded.tokens.context):
        _listen(loaded.model, layers, ids, first, seen)
        read += len(ids)
        if read >= TOKENS:
            break
    samples = {name: torch.cat(parts)[:TOKENS].float() for name, parts in seen.items()}
    return Moments(samples=samples, first=first, told=f"{min(read, TOKENS)} tokens of {inputs.label}'s rollouts")


def _texts(run: Run, tokenizer: Any, context: int) -> Any:
    """Prompts with answers, as token ids."""
    from potstill import chat

    for step in run.rollout_steps:
        for row in run.rollouts(step):
            prompt = chat.prompt_ids(tokenizer, Prompt(id=row["id"], messages=tuple(row["messages"])))
            answer = tokenizer.encode("".join(row["pieces"]), add_special_tokens=False)
            yield list(islice([*prompt, *answer], context))


def _listen(
    model: Any,
    layers: Sequence[tuple[str, torch.nn.Module]],
    ids: Sequence[int],
    first: dict[str, str],
    seen: dict[str, list[Tensor]],
) -> None:
    """One forward pass; adds to `seen` what each group of layers with one input tensor was given."""
    given: dict[str, Tensor] = {}
    hooks = [
        module.register_forward_pre_hook(lambda _, args, name=name: given.__setitem__(name, args[0]))
        for name, module in layers
    ]
    with torch.no_grad():
        model(input_ids=torch.tensor([list(ids)], device=model.device), use_cache=False)
    for hook in hooks:
        hook.remove()
    owner: dict[int, str] = {}
    for name, x in given.items():
        same = owner.setdefault(id(x), name)
        if first.setdefault(name, same) == name:
            seen.setdefault(name, []).append(x.detach().flatten(0, -2).cpu())
