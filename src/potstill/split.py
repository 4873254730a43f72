"""A causal language model in two parts: a body that ends in hidden states, and a head that makes logits of them.

    h = body(ids)  [.., H]        z = head(h) = cap tanh(scale (W h + b) / cap)  [.., V]

H is some hundred to some thousand numbers, V is 30,000 and more. So hidden states are what is kept and sent, and logits are
made of a few rows at a time, where they are needed, and never of padding.

Texts are read in rectangles of similar lengths, chosen so that little is computed for padding, which comes behind a text
and so never needs a mask. Or *packed*: one behind the other in one row, each with positions from 0 on, and attention within
each, which transformers sees by the positions. Then nothing is padded, but a CPU computes all of the attention that is left
out: there it takes twice the time.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

PACKED = 4096
"""Tokens packed into one row; a longer text has its own."""
CALL = 64
"""Padding that costs as much as one more forward pass of a small model on a CPU, in tokens."""
LOGITS = 1 << 22
"""Logits made at once on a CPU: 16 MiB in float32. Larger slices are a little faster, by V = 150,000 a tenth."""
LOGITS_GPU = 1 << 27


@dataclass(frozen=True, slots=True)
class Head:
    """A model's output layer, and what it does to the logits."""

    module: Any
    vocab: int
    """Rows from here on are padding and are cut off."""
    scale: float = 1.0
    cap: float | None = None
    project: Callable[[Tensor], Tensor] | None = None
    """Called in the place of `module`, if given."""

    def __call__(self, hidden: Float[Tensor, "*batch H"]) -> Float[Tensor, "*batch V"]:
        """Logits, in float32."""
        w = self.module.weight
        z = (self.project or self.module)(hidden.to(w.device, w.dtype))[..., : self.vocab].float()
        z = z if self.scale == 1 else z * self.scale
        return z if self.cap is None else (z / self.cap).tanh() * self.cap

    @property
    def at_once(self) -> int:
        """Hidden states that are made into logits at a time."""
        return max((LOGITS if self.module.weight.device.type == "cpu" else LOGITS_GPU) // self.vocab, 1)


@dataclass(frozen=True, slots=True)
class Text:
    """Token ids, and from which position on hidden states are wanted."""

    ids: Sequence[int]
    start: int = 0


@dataclass(frozen=True, slots=True)
class Split:
    """A model's two parts."""

    body: Any
    head: Head
    alone: bool = False
    """Whether the angles of positions depend on the longest text that is read, so that each is read by itself."""

    @classmethod
    def of(cls, model: Any, vocab: int, *, packed: bool = False) -> "Split | None":
        """The parts of a model; None if it is no such pair, or cannot read texts together, or packed: tried on a few tokens."""
        plain = model.get_base_model() if hasattr(model, "get_base_model") else model
        config, output = plain.config.get_text_config(), plain.get_output_embeddings()
        if plain.base_model is plain or output is None:
            return None
        scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)
        head = Head(output, vocab, scale, getattr(config, "final_logit_softcapping", None))
        turns = str(
            [getattr(m, "rope_type", "") for m in plain.base_model.modules()]
        )  # a name, or one for each kind of layer
        split = cls(plain.base_model, head, alone="dynamic" in turns or "longrope" in turns)
        if packed and split.alone:
            return None
        return split if all(split._agrees(model, packed=way) for way in {False, packed}) else None

    def hidden(self, texts: Sequence[Text], *, packed: bool = False) -> Float[Tensor, "N H"]:
        """The wanted hidden states of all texts, one text behind the other."""
        if packed:
            return torch.cat([self._packed(part) for part in rows(texts, PACKED)])
        found: dict[int, Float[Tensor, "n H"]] = {}
        for part in [[i] for i in range(len(texts))] if self.alone else rectangles([len(t.ids) for t in texts]):
            found |= zip(part, self._padded([texts[i] for i in part]), strict=True)
        return torch.cat([found[i] for i in range(len(texts))])

    def _padded(self, texts: Sequence[Text]) -> list[Float[Tensor, "n H"]]:
        ids = pad_sequence([torch.tensor(t.ids) for t in texts], batch_first=True)
        hidden = self._read(ids, torch.arange(ids.shape[1]).expand_as(ids))
        return [h[t.start : len(t.ids)] for h, t in zip(hidden, texts, strict=True)]

    def _packed(self, texts: Sequence[Text]) -> Float[Tensor, "n H"]:
        ids = torch.tensor([i for t in texts for i in t.ids])
        positions = torch.tensor([p for t in texts for p in range(len(t.ids))])
        wanted = torch.tensor([p >= t.start for t in texts for p in range(len(t.ids))])
        hidden = self._read(ids[None], positions[None])[0]
        return hidden[wanted.to(hidden.device)]

    def _read(self, ids: Int[Tensor, "B S"], positions: Int[Tensor, "B S"]) -> Float[Tensor, "B S H"]:
        device = self.head.module.weight.device
        out = self.body(input_ids=ids.to(device), position_ids=positions.to(device), use_cache=False)
        return out.last_hidden_state

    @torch.no_grad()
    def _agrees(self, model: Any, *, packed: bool) -> bool:
        """Whether texts that are read together get the logits that each gets alone."""
        texts = [[1 + (7 * i) % (self.head.vocab - 1) for i in range(a, b)] for a, b in ((0, 3), (3, 8))]
        try:
            got = self.head(self.hidden([Text(t) for t in texts], packed=packed))
        except (TypeError, ValueError, AttributeError, IndexError):  # a model of another kind
            return False
        alone = [model(input_ids=torch.tensor([t], device=got.device), use_cache=False).logits[0] for t in texts]
        want = torch.cat(alone)[:, : self.head.vocab].float()
        close = 1e-4 if self.head.module.weight.dtype == torch.float32 else 3e-2
        return bool((got - want).abs().max() <= close * want.abs().max())


def rectangles(lengths: Sequence[int]) -> list[list[int]]:
    """Texts that are read together, by index: what costs least if each token and its padding costs 1 and a call `CALL`."""
    of = {n: [i for i, length in enumerate(lengths) if length == n] for n in sorted(set(lengths))}
    widths, below = list(of), [0, *accumulate(len(texts) for texts in of.values())]
    best, cut = [0.0], [0]  # cost of all texts of the i smallest widths, and where their last rectangle begins
    for i, width in enumerate(widths, 1):
        costs = [best[j] + (below[i] - below[j]) * width + CALL for j in range(i)]
        best.append(min(costs))
        cut.append(costs.index(best[i]))
    parts, end = [], len(widths)
    while end:
        parts.append([i for width in widths[cut[end] : end] for i in of[width]])
        end = cut[end]
    return parts


def rows(texts: Sequence[Text], width: int) -> Iterator[list[Text]]:
    """Consecutive texts that fit into one row."""
    row: list[Text] = []
    for text in texts:
        if row and sum(len(t.ids) for t in row) + len(text.ids) > width:
            yield row
            row = []
        row.append(text)
    if row:
        yield row
