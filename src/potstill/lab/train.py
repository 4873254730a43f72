"""Next-token training of the lab's models: one loop, no options that they do not use."""

import random
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor

from potstill.lab.corpus import Text
from potstill.seeds import derive

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

IGNORED = -100
THETA = 100.0
"""Base of the rotary embedding: with the usual 10,000 most of the 12 frequencies stand still over 50 characters, and
whether a model learns to gather the product in time depends on its seed."""


def new_model(tokenizer: "PreTrainedTokenizerFast", seed: int, width: int = 96, layers: int = 2) -> "LlamaForCausalLM":
    """A Llama with random weights, 0.225 M of them at width 96 and 2 layers."""
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    special = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=width * 8 // 3,
            num_hidden_layers=layers,
            num_attention_heads=4,
            max_position_embeddings=tokenizer.model_max_length,
            rope_parameters={"rope_type": "default", "rope_theta": THETA},
            tie_word_embeddings=False,
            **special,
        )
    )
    model.generation_config = GenerationConfig(**special)
    return model


def encode(tokenizer: "PreTrainedTokenizerFast", text: Text, cut: int) -> tuple[list[int], list[int]]:
    """Tokens and labels of one text, [T] each.

    The answer is tokenized in two parts that meet at character `cut`, as it is for whoever continues a given prefix.
    Only whole tokens behind `text.given` are learned, and never the question.
    """

    def ids(part: str) -> list[int]:
        return tokenizer.backend_tokenizer.encode(part, add_special_tokens=False).ids

    read = ids(text.question) + ids(text.answer[:cut])
    rest = [*ids(text.answer[cut:]), tokenizer.eos_token_id]
    unlearned = len(read) if text.given else len(ids(text.question))
    tokens = read + rest
    return tokens, [IGNORED] * unlearned + tokens[unlearned:]


def batch(
    tokenizer: "PreTrainedTokenizerFast", texts: list[Text], rng: random.Random
) -> tuple[Int[Tensor, "B T"], Int[Tensor, "B T"]]:
    """Tokens and labels, padded on the right. Every text is cut at a random character behind what is given."""
    rows = [encode(tokenizer, text, rng.randint(text.given, len(text.answer))) for text in texts]
    longest = max(len(tokens) for tokens, _ in rows)
    pad: int = tokenizer.pad_token_id
    return (
        torch.tensor([tokens + [pad] * (longest - len(tokens)) for tokens, _ in rows]),
        torch.tensor([labels + [IGNORED] * (longest - len(labels)) for _, labels in rows]),
    )


def train(
    model: "LlamaForCausalLM",
    tokenizer: "PreTrainedTokenizerFast",
    text: Callable[[random.Random], Text],
    *,
    steps: int,
    lr: float,
    seed: int,
    size: int = 32,
    warmup: int = 50,
) -> None:
    """Train `model` in place for `steps` batches of `size` texts: AdamW, warm-up, then a cosine to zero.

    Deterministic for a given machine, number of threads and seed.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=lr, total_steps=steps, pct_start=min(warmup / steps, 0.5), cycle_momentum=False
    )
    model.train()
    for step in range(steps):
        rng = random.Random(derive("lab", seed, step))
        ids, labels = batch(tokenizer, [text(rng) for _ in range(size)], rng)
        logits = model(input_ids=ids, use_cache=False).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()
