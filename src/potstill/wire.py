"""What `potstill serve` and a teacher of `kind = "potstill"` send each other over HTTP.

    GET  /about     who is served                                   JSON: About
    GET  /head      W [V, H], and b [V] where there is one          safetensors
    POST /hidden    texts -> h [N, H], one text behind the other    safetensors both ways
    POST /write     trunks and rows -> what was written             JSON both ways: Order, list of Written

    z_n = cap tanh(scale (W h_n + b) / cap)     is left to whoever asked: H numbers a token are sent, never V

Hidden states and weights travel as they are in memory, so nothing is rounded. Every answer names the weights that it came
from in the header WEIGHTS: a server may be started again with other ones.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Shaped
from pydantic import BaseModel, Field, TypeAdapter
from safetensors.torch import load, save
from torch import Tensor

from potstill.decode import Decoding, Row, Written, common
from potstill.split import Head, Text

KEYS = ("POTSTILL_KEY",)
"""Environment variables that hold the key, on both sides."""
WEIGHTS = "Potstill-Weights"
LOOKED_AT = 4096
"""Numbers of each matrix that its fingerprint looks at."""


class Message(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False):
    """A JSON object on the wire."""


class About(Message):
    """A model that is served."""

    model: str
    """Its name, as the server was started with."""
    tokenizer: str
    """`models.fingerprint`."""
    vocab: int
    """V."""
    width: int
    """H."""
    context: int
    """Tokens of the longest text."""
    cells: int
    """Texts times tokens of the longest that one request for hidden states may have."""
    scale: float
    cap: float | None


class Branch(Message):
    """A row to write: the first `shared` tokens of a trunk, and then its own."""

    trunk: int = Field(ge=0)
    shared: int = Field(ge=0)
    own: tuple[int, ...]
    limit: int = Field(ge=1)
    seed: int = Field(ge=0)


class Order(Message):
    """Everything that is to be written for one request."""

    trunks: tuple[tuple[int, ...], ...]
    rows: tuple[Branch, ...]
    eos: tuple[int, ...]
    temperature: float = Field(ge=0)
    top_p: float = Field(gt=0, le=1)

    @classmethod
    def of(cls, trunks: Sequence[tuple[int, ...]], rows: Sequence[Row], eos: Sequence[int], how: Decoding) -> "Order":
        """With prefixes that lie in their trunks, as most do, said by their length alone."""
        branches: list[Branch] = []
        for r in rows:
            shared = common(trunks[r.trunk], r.prefix)
            branches.append(Branch(trunk=r.trunk, shared=shared, own=r.prefix[shared:], limit=r.limit, seed=r.seed))
        return cls(
            trunks=tuple(trunks), rows=tuple(branches), eos=tuple(eos), temperature=how.temperature, top_p=how.top_p
        )

    def prefixed(self) -> list[Row]:
        """The rows with their whole prefixes."""
        return [
            Row(trunk=b.trunk, prefix=(*self.trunks[b.trunk][: b.shared], *b.own), limit=b.limit, seed=b.seed)
            for b in self.rows
        ]


_WRITTEN = TypeAdapter(list[Written])


def pack_written(written: Sequence[Written]) -> bytes:
    """As JSON; its numbers come back as they were."""
    return _WRITTEN.dump_json(list(written))


def unpack_written(body: bytes) -> list[Written]:
    """Raises ValueError."""
    return _WRITTEN.validate_json(body)


def pack_texts(texts: Sequence[Text]) -> bytes:
    """Token ids one text behind the other, with lengths, and where the wanted hidden states begin."""
    ids = torch.tensor([i for t in texts for i in t.ids], dtype=torch.int32)
    lengths = torch.tensor([len(t.ids) for t in texts], dtype=torch.int32)
    return pack(ids=ids, lengths=lengths, starts=torch.tensor([t.start for t in texts], dtype=torch.int32))


def unpack_texts(body: bytes) -> list[Text]:
    """Raises SafetensorError, ValueError."""
    found = load(body)
    if found.keys() != {"ids", "lengths", "starts"}:
        raise ValueError(f"there should be ids, lengths and starts, and there are {', '.join(sorted(found))}")
    lengths: list[int] = found["lengths"].tolist()
    if min(lengths, default=0) < 0 or sum(lengths) != len(found["ids"]):
        raise ValueError(f"{len(found['ids'])} ids are no texts of {sum(lengths)} in all")
    parts = found["ids"].split(lengths)
    return [Text(ids.tolist(), start) for ids, start in zip(parts, found["starts"].tolist(), strict=True)]


def pack(**tensors: Shaped[Tensor, "..."]) -> bytes:
    """Tensors by name, as they are in memory."""
    return save({name: t.contiguous().cpu() for name, t in tensors.items()})


def unpack(body: bytes) -> Mapping[str, Shaped[Tensor, "..."]]:
    """Raises SafetensorError."""
    return load(body)


def output_layer(tensors: Mapping[str, Float[Tensor, "..."]], about: About, device: str) -> Head:
    """The head of a model that is elsewhere. Raises ValueError if there is no W [V, H], or what else there is is no b [V]."""
    found = {name: list(t.shape) for name, t in tensors.items()}
    if {"bias": [about.vocab]} | found != {"weight": [about.vocab, about.width], "bias": [about.vocab]}:
        raise ValueError(f"an output layer {found} where a weight [{about.vocab}, {about.width}] was asked for")
    # Made without memory of its own, and then given the weights: they are the largest matrix of most models.
    module = torch.nn.Linear(about.width, about.vocab, bias="bias" in tensors, device="meta")
    module.load_state_dict(tensors, assign=True)
    return Head(module.requires_grad_(False).to(device), about.vocab, about.scale, about.cap)


def weights_of(model: Any) -> str:
    """A name for the weights of a model: of some numbers of each matrix, so that large ones take no time."""
    seen = hashlib.blake2b(digest_size=8)
    for name, parameter in model.named_parameters():
        numbers = parameter.detach().flatten()
        some = numbers[:: max(len(numbers) // LOOKED_AT, 1)].contiguous().cpu()
        seen.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
        seen.update(some.view(torch.uint8).numpy().tobytes())
    return seen.hexdigest()
