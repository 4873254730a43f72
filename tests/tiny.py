"""Random models of three families and locally trained tokenizers: enough to test an engine, seconds to build."""

from functools import cache
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from potstill.models import Loaded, Tokens
from potstill.types import Prompt, Rollout

CORPUS = [
    "What is 12 + 30? It is 42.",
    "the cat sat on the mat and the dog sat on the cat",
    "naïve café — 你好 🙂🙃 done",
]
TEMPLATE = (
    "{% for m in messages %}<|user|>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<|bot|>{% endif %}"
)
SIZE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
}
WINDOW = 8


@cache
def byte_level(size: int = 300, template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """Byte-level BPE, as in Qwen and Llama 3: most emoji are four tokens."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|end|>", "<|user|>", "<|bot|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    return _wrapped(backend, template)


@cache
def byte_fallback() -> PreTrainedTokenizerFast:
    """Words joined by a visible space, bytes for what is not in the vocabulary, as in Llama 2 and Gemma."""
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    vocabulary = ["<|pad|>", "<|end|>", "<|user|>", "<|bot|>", "<unk>", *bytes_, "▁", *"abcdehimnost", "é", "▁t"]
    backend = Tokenizer(
        models.BPE({t: i for i, t in enumerate(vocabulary)}, [("▁", "t")], byte_fallback=True, unk_token="<unk>")
    )
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return _wrapped(backend, TEMPLATE)


def _wrapped(backend: Tokenizer, template: str | None) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        additional_special_tokens=["<|user|>", "<|bot|>"],
        clean_up_tokenization_spaces=False,
        chat_template=template,
    )


def model(family: str, vocab: int, seed: int = 0, **changes: Any) -> Any:
    """Weights large enough that a token depends on all that was read before it."""
    torch.manual_seed(seed)
    size = SIZE | {"vocab_size": vocab, "initializer_range": 0.3, "max_position_embeddings": 512} | changes
    if family == "gemma3":  # a sliding layer, then a full one
        kinds = ["sliding_attention", "full_attention"]
        made = Gemma3ForCausalLM(
            Gemma3TextConfig(**size, head_dim=8, sliding_window=WINDOW, layer_types=kinds, query_pre_attn_scalar=8)
        )
    elif family == "qwen2":
        made = Qwen2ForCausalLM(Qwen2Config(**size, tie_word_embeddings=True))
    else:
        made = LlamaForCausalLM(LlamaConfig(**size))
    for config in (made.config, made.generation_config):  # transformers' defaults are other models' tokens
        config.eos_token_id = config.bos_token_id = None
    return made.eval().requires_grad_(False)


def tokens(tokenizer: Any, name: str = "tiny") -> Tokens:
    return Tokens(name, tokenizer, len(tokenizer), (tokenizer.eos_token_id,), 512)


def loaded(family: str = "llama", seed: int = 0, tokenizer: Any = None, name: str = "tiny", padding: int = 0) -> Loaded:
    """A model with its tokenizer; `padding` more rows in the output layer than the tokenizer has tokens."""
    tokenizer = tokenizer or byte_level()
    made = model(family, len(tokenizer), seed)
    if padding:
        made = padded(made, padding)
    return Loaded(made, tokens(tokenizer, name))


def padded(made: Any, rows: int) -> Any:
    """The same model with `rows` more tokens that nobody can write, all of them likely."""
    wide = type(made)(type(made.config)(**{**made.config.to_dict(), "vocab_size": made.config.vocab_size + rows}))
    with torch.no_grad():
        for (name, new), (_, old) in zip(wide.named_parameters(), made.named_parameters(), strict=True):
            new.fill_(1.0) if new.shape != old.shape else None
            new[tuple(slice(n) for n in old.shape)] = old
            assert name
    return wide.eval().requires_grad_(False)


def plain_logp(made: Any, prefix: tuple[int, ...], ids: tuple[int, ...], vocab: int) -> torch.Tensor:
    """[T, V] by one forward pass over one sequence: no cache, no padding, no mask."""
    with torch.no_grad():
        logits = made(input_ids=torch.tensor([[*prefix, *ids]]), use_cache=False).logits[
            0, len(prefix) - 1 : -1, :vocab
        ]
    return logits.float().log_softmax(-1)


def prompt(text: str = "What is 12 + 30?", id: str = "p") -> Prompt:
    return Prompt(id=id, messages=({"role": "user", "content": text},), answer="42")


def rollout(
    of: Tokens, text: str, *, ask: Prompt | None = None, sample: int = 0, seed: int = 7, **fields: Any
) -> Rollout:
    """A rollout that says `text`, with made-up log-probs and entropies."""
    from potstill import chat

    ask = ask or prompt()
    ids = tuple(of.tokenizer.encode(text, add_special_tokens=False))
    numbers: dict[str, Any] = {
        "old_logp": tuple(-0.1 * (1 + (i * 7) % 5) for i in range(len(ids))),
        "entropy": tuple(0.1 * ((i * 5) % 7) for i in range(len(ids))),
    }
    return Rollout(
        prompt=ask,
        sample=sample,
        prompt_ids=chat.prompt_ids(of.tokenizer, ask),
        response_ids=ids,
        pieces=chat.pieces(of.tokenizer, ids),
        finish="length",
        seed=seed,
        **(numbers | fields),
    )
