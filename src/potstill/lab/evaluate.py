"""How often a model of the lab is right, with its interval."""

from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch

from potstill.tasks.arithmetic import Arithmetic

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

LONGEST = 64
"""Tokens; the longest answer of the lab has 47."""


class Accuracy(NamedTuple):
    """A fraction of the questions and its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.1%} [{self.low:.1%}, {self.high:.1%}]"


def wilson(right: int, count: int, z: float = 1.96) -> Accuracy:
    """The Wilson score interval: (p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n) (Wilson 1927)."""
    p, share = right / count, z * z / count
    half = z * (p * (1 - p) / count + share / (4 * count)) ** 0.5
    return Accuracy(p, (p + share / 2 - half) / (1 + share), (p + share / 2 + half) / (1 + share))


def write(
    model: "LlamaForCausalLM",
    tokenizer: "PreTrainedTokenizerFast",
    texts: list[str],
    *,
    sample: bool,
    seed: int = 0,
    limit: int = LONGEST,
) -> list[str]:
    """Go on from each text, greedily or by sampling at T = 1, until the end or for `limit` tokens."""
    inputs = tokenizer(texts, return_tensors="pt", padding=True, return_token_type_ids=False)
    choose = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0} if sample else {"do_sample": False}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        # transformers hides `generate` from the type checker behind a protocol
        output = cast(Any, model).generate(**inputs, max_new_tokens=limit, **choose)
    return tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def accuracy(
    model: "LlamaForCausalLM", tokenizer: "PreTrainedTokenizerFast", *, sample: bool, count: int = 432
) -> Accuracy:
    """The fraction of the first `count` validation questions that is answered right."""
    task = Arithmetic()
    prompts, verifier = task.questions("validation", count), task.verifier()
    answers = write(model, tokenizer, [prompt.messages[0]["content"] for prompt in prompts], sample=sample)
    return wilson(
        sum(verifier.extract(text) == prompt.answer for text, prompt in zip(answers, prompts, strict=True)), count
    )
