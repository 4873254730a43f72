"""Loading causal language models and their tokenizers, and checking that two of them fit together.

A path is a folder in Hugging Face format, a hub name, a peft adapter's folder, a `.gguf` file, or `lab/NAME` for a
bundled model. The *vocabulary* of a model is its tokenizer's: rows of the output layer beyond `len(tokenizer)` are
padding, and are cut off wherever logits are used, so that models padded to different sizes agree.
"""

import hashlib
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils.logging import disable_progress_bar

from potstill import chat
from potstill.config import DType
from potstill.errors import ModelError, require
from potstill.lab import model_path
from potstill.types import Finish

disable_progress_bar()

PROBES = ("The quick brown fox, 12*34=408;\n\t#", "naïve — 你好 🙂", "def f(x):\n    return x  # y")


@dataclass(frozen=True, slots=True)
class Tokens:
    """A tokenizer and what the run needs to know of it."""

    name: str
    tokenizer: Any
    vocab: int
    """Ids below this are tokens; the model's output rows from here on are padding."""
    eos: tuple[int, ...]
    """Ids that end a response; the first is the one to teach."""
    context: int
    """Longest prompt and response together, in tokens."""

    def names(self, ids: tuple[int, ...]) -> list[str]:
        """The tokens behind ids, for messages."""
        return self.tokenizer.convert_ids_to_tokens(list(ids))


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model with its tokenizer, in evaluation mode."""

    model: Any
    tokens: Tokens

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.device


def resolve(path: str) -> str:
    """A local folder for `lab/NAME`; anything else as it is."""
    return str(model_path(path.removeprefix("lab/"))) if path.startswith("lab/") else path


def source(path: str) -> tuple[str, dict[str, str]]:
    """Arguments of transformers' `from_pretrained`: the folder or hub name, and `gguf_file` where it is one."""
    path = resolve(path)
    if path.endswith(".gguf"):
        file = Path(path)
        if not file.is_file():
            raise ModelError(f"there is no file {path}. A GGUF model is given by the path of its .gguf file")
        require("gguf", "gguf", "a .gguf model")
        return str(file.parent), {"gguf_file": file.name}
    if path.startswith((".", "/", "~")) and not Path(path).expanduser().is_dir():
        raise ModelError(f"there is no folder {path}. Give a Hugging Face folder, a hub name, a .gguf file or lab/NAME")
    if path.startswith("models/") and not Path(path).is_dir():  # never a hub name: no organisation is called `models`
        raise ModelError(f"there is no folder {path} here. `make models` fetches the models that the recipes name")
    return str(Path(path).expanduser()) if path.startswith("~") else path, {}


def adapter_base(path: str) -> str | None:
    """The base model of a peft adapter's folder; None if `path` is no such folder."""
    file = Path(path) / "adapter_config.json"
    return json.loads(file.read_text())["base_model_name_or_path"] if file.is_file() else None


def load_tokens(path: str, eos: tuple[str, ...] | None = None) -> Tokens:
    """The tokenizer of a model, without its weights. `eos` overrides the tokens that end a response. Raises ModelError."""
    where, gguf = source(path)
    base = adapter_base(where)
    if base and not (Path(where) / "tokenizer_config.json").is_file():
        return replace(load_tokens(base, eos), name=path)  # an adapter that brings no tokenizer uses its base's
    try:
        tokenizer = AutoTokenizer.from_pretrained(where, **gguf)
        where, gguf = source(base) if base else (where, gguf)
        config = AutoConfig.from_pretrained(where, **gguf)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{path} cannot be loaded as a causal language model: {_first_line(error)}. "
            "Give a Hugging Face folder (config.json, safetensors, tokenizer), a hub name, a .gguf file or lab/NAME"
        ) from None
    size = config.get_text_config().vocab_size
    special = tokenizer.added_tokens_decoder
    beyond = [t for t, i in tokenizer.get_vocab().items() if i >= size and not (i in special and special[i].special)]
    if beyond:  # a special token without a row is common (an image token in a text model) and never written
        raise ModelError(
            f"the tokenizer of {path} has {len(tokenizer)} tokens but the model only {size} rows, so some tokens have no "
            f"logit, such as {beyond[0]!r}. The folder mixes two models, or tokens were added without resizing; call "
            "resize_token_embeddings"
        )
    vocab = min(max(tokenizer.get_vocab().values()) + 1, size)
    context = getattr(config.get_text_config(), "max_position_embeddings", None) or 1 << 30
    return Tokens(path, tokenizer, vocab, _eos(path, where, tokenizer, eos), context)


def _eos(path: str, where: str, tokenizer: Any, names: tuple[str, ...] | None) -> tuple[int, ...]:
    if names is not None:
        ids = {name: tokenizer.get_vocab().get(name) for name in names}
        if missing := [name for name, found in ids.items() if found is None]:
            raise ModelError(
                f"{path} has no token {missing[0]!r}, so it cannot end a response. Give tokens of its vocabulary"
            )
        return tuple(ids.values())
    found = [tokenizer.eos_token_id]
    try:
        listed = GenerationConfig.from_pretrained(where).eos_token_id
        found += listed if isinstance(listed, list) else [listed]
    except OSError:  # a model without generation_config.json is fine: the tokenizer's own EOS ends a response
        pass
    known = tuple(dict.fromkeys(token for token in found if token is not None))
    if not known:
        raise ModelError(
            f"{path} names no end-of-sequence token, so its answers would never end. Name it: eos = ['<|im_end|>']"
        )
    return known


@contextmanager
def adapting() -> Iterator[None]:
    """Without peft's warning that merging an adapter on one end of a tied model is not simple: `merge` sees to it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
        yield


def merge(adapted: Any) -> Any:
    """A model with its adapter added to its weights. What one matrix did for both ends is two, if only one end changes."""
    plain = adapted.get_base_model()
    ends = [plain.get_input_embeddings(), plain.get_output_embeddings()]
    at_an_end = any(hasattr(end, "base_layer") for end in ends)
    inner = [getattr(end, "base_layer", end) for end in ends]
    if at_an_end and inner[0].weight is inner[1].weight:
        inner[1].weight = torch.nn.Parameter(inner[1].weight.detach().clone(), requires_grad=False)
        plain.config.get_text_config().tie_word_embeddings = plain.config.tie_word_embeddings = False
    return adapted.merge_and_unload()


def load(path: str, *, dtype: DType = "float32", device: str = "cpu", eos: tuple[str, ...] | None = None) -> Loaded:
    """A model in evaluation mode, gradients off. Raises ModelError."""
    tokens = load_tokens(path, eos)
    where, gguf = source(path)
    base = adapter_base(where)
    kind = getattr(torch, dtype)
    model: Any
    try:
        if base:
            from peft import PeftModel

            with adapting():
                model = merge(PeftModel.from_pretrained(load(base, dtype=dtype).model, where))
        else:
            model = AutoModelForCausalLM.from_pretrained(where, dtype=kind, **gguf)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(
            f"the weights of {path} cannot be loaded: {_first_line(error)}. Is the folder complete?"
        ) from None
    if gguf:
        model = _without_quantization(model)
        model.name_or_path = path  # what an adapter trained on it will name as its base
    # Already of the right type. `.to(dtype)` would also round what transformers keeps in float32: the rotary frequencies.
    return Loaded(model.to(device=device).eval().requires_grad_(False), tokens)


def _without_quantization(model: Any) -> Any:
    """A GGUF model is dequantised on loading but still says that it is quantised, and then refuses to be saved."""
    config = type(model.config).from_dict(
        {k: v for k, v in model.config.to_dict().items() if k != "quantization_config"}
    )
    plain = type(model)._from_config(config, dtype=model.dtype)
    plain.load_state_dict(model.state_dict())
    return plain


def same_tokenizer(a: Tokens, b: Tokens) -> str | None:
    """None if both read and write the same ids; else what differs, in words."""
    if a.vocab != b.vocab:
        return f"{a.name} has {a.vocab} tokens, {b.name} has {b.vocab}"
    x, y = a.tokenizer.get_vocab(), b.tokenizer.get_vocab()
    if x != y:
        differ = [t for t in x if y.get(t) != x[t]]
        return f"{len(differ)} of {a.vocab} tokens have other ids, such as {differ[0]!r}: {x[differ[0]]} and {y.get(differ[0])}"
    for probe in PROBES:
        if a.tokenizer.encode(probe, add_special_tokens=False) != b.tokenizer.encode(probe, add_special_tokens=False):
            return f"both have the same tokens, but cut {probe!r} differently"
    return None


def fingerprint(tokens: Tokens) -> str:
    """Equal where `same_tokenizer` finds no difference, of tokenizers on two machines."""
    cuts = [tokens.tokenizer.encode(probe, add_special_tokens=False) for probe in PROBES]
    said = json.dumps([tokens.vocab, sorted(tokens.tokenizer.get_vocab().items()), cuts])
    return hashlib.blake2b(said.encode(), digest_size=8).hexdigest()


def check_shared(student: Tokens, teacher: Tokens) -> None:
    """Refuse a pair whose token log-probabilities cannot be compared. Raises ModelError."""
    if why := same_tokenizer(student, teacher):
        raise ModelError(
            f"student and teacher do not share a tokenizer: {why}. Token log-probabilities of one mean nothing to the other. "
            "Use a teacher of the student's family; or teacher.align = true, which carries its scores over by the text they "
            "stand for; or method omniopd, which needs only the teacher's text"
        )
    check_eos(student, teacher)


def written_ids(tokens: Tokens, text: str, finish: Finish) -> tuple[int, ...]:
    """Text that goes on from other text, in a model's tokens, with its end token where the writer stopped."""
    return (*chat.ids_behind(tokens.tokenizer, text), *(tokens.eos[:1] if finish == "stop" else ()))


def check_eos(student: Tokens, teacher: Tokens) -> None:
    """Refuse a teacher that ends its answers in a token that does not end the student's. Raises ModelError."""
    if unknown := set(teacher.eos) - set(student.eos):
        raise ModelError(
            f"the teacher ends its answers with {teacher.names(tuple(sorted(unknown)))}, which does not end the student's "
            f"(it stops at {student.names(student.eos)}). The student would learn to write that token and go on, and its "
            f"answers would grow to the limit. Set student.eos = {teacher.names(teacher.eos)}"
        )


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0].rstrip(".")
