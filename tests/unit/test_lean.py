"""The bare forward pass and its cache against transformers' own."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tests import tiny
from tests.tiny import SIZE
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from potstill.decode import Row, write
from potstill.kv import Cache, fitting
from potstill.lean import SMALL, Lean, known

V = 40
LLAMA3 = {"rope_type": "llama3", "rope_theta": 100.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 16}
YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 16}
KINDS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "llama, tied": (LlamaForCausalLM, LlamaConfig, {"tie_word_embeddings": True}),
    "llama, biases": (LlamaForCausalLM, LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "llama, no groups": (LlamaForCausalLM, LlamaConfig, {"num_key_value_heads": 4}),
    "llama, wide heads": (LlamaForCausalLM, LlamaConfig, {"head_dim": 16}),
    "llama 3": (LlamaForCausalLM, LlamaConfig, {"rope_parameters": LLAMA3}),
    "yarn": (LlamaForCausalLM, LlamaConfig, {"rope_parameters": YARN}),
    "mistral": (MistralForCausalLM, MistralConfig, {"num_key_value_heads": 1, "sliding_window": None}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 8}),
}


SIZES = [SMALL, 0]
"""Up to which size a model is folded: these, and none."""


def made(kind: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A model in which nothing is at its starting value: no bias is 0, no norm 1."""
    model, config, more = KINDS[kind]
    torch.manual_seed(0)
    out = model(config(**(SIZE | {"vocab_size": V, "initializer_range": 0.3} | more | changes)))
    for p in out.parameters():
        if p.dim() == 1:
            p.data.add_(torch.randn_like(p), alpha=0.3)
    return out.to(dtype).eval().requires_grad_(False)


def numbers(count: int, seed: int = 0) -> list[int]:
    return torch.randint(0, V, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def plain(model: Any, sequences: Sequence[Sequence[int]]) -> torch.Tensor:
    return torch.stack([model(input_ids=torch.tensor([s]), use_cache=False).logits[0, -1] for s in sequences])


def near(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4 * theirs.abs().max().item())


LONG, SHORT = numbers(37), numbers(9, 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("small", SIZES)
def test_logits_are_those_of_the_model(kind: str, small: int) -> None:
    model = made(kind)
    ready = Lean(model, V, small)
    assert known(model)
    assert ready.folded == (small > 0)
    cache = Cache(ready, [LONG[:30], SHORT[:2], []], [0, 1, 2], [30, 2, 0], 7, apart=False)
    for step in range(7):
        rows = [LONG[: 31 + step], SHORT[: 3 + step], LONG[: step + 1]]
        near(cache.read(torch.tensor([r[-1] for r in rows])), plain(model, rows))


@pytest.mark.parametrize("kind", ["llama", "qwen3", "llama, no groups"])
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("small", SIZES)
def test_rows_of_a_trunk_see_what_they_share(kind: str, apart: bool, small: int) -> None:
    """Two trunks, rows that share all, some and nothing of them; some leave, and the others change their places."""
    model = made(kind)
    place, shared = [0, 0, 1, 0, 1, 0], [30, 11, 9, 30, 0, 17]
    trunks = [LONG[:30], SHORT]
    rows = [trunks[p][:s] for p, s in zip(place, shared, strict=True)]
    cache = Cache(Lean(model, V, small), trunks, place, shared, 9, apart=apart)
    for keep in (None, None, [0, 5, 2, 4], None, [0, 2, 1], [0, 2], None, [1]):
        if keep is not None:
            cache.keep(keep)
            rows = [rows[i] for i in keep]
        rows = [[*r, (7 * i + len(r)) % V] for i, r in enumerate(rows)]
        near(cache.read(torch.tensor([r[-1] for r in rows])), plain(model, rows))


def test_a_trunk_is_held_once() -> None:
    ready = Lean(made("llama"), V)
    many = [[LONG], [0] * 20, [len(LONG)] * 20, 5]
    assert Cache(ready, *many, apart=True).cells == 37 + 20 * 5  # type: ignore[arg-type]
    assert Cache(ready, *many, apart=False).cells == 20 * (37 + 5)  # type: ignore[arg-type]


def test_the_newest_weights_count() -> None:
    model = made("llama")
    rows = [Row(trunk=0, prefix=tuple(SHORT), limit=6, seed=1)]
    before = write(model, [SHORT], rows, vocab=V, eos=())
    model.model.layers[1].mlp.down_proj.weight.mul_(-1.0)
    model.model.norm.weight.mul_(0.5)
    after = write(model, [SHORT], rows, vocab=V, eos=())
    assert after != before
    torch.testing.assert_close(
        torch.tensor(after[0].logp), torch.tensor(write(model, [SHORT], rows, vocab=V, eos=(), fast=False)[0].logp)
    )


def other(name: str) -> Any:
    torch.manual_seed(0)
    if name == "gpt2":
        made_ = GPT2LMHeadModel(GPT2Config(vocab_size=V, n_embd=32, n_layer=2, n_head=4, n_positions=64))
        return made_.eval().requires_grad_(False)
    if name == "gemma3":
        return tiny.model("gemma3", V)
    model = made("llama")
    assert fitting(model, V) is not None  # what comes now comes after it was tried
    if name == "lora":
        from peft import LoraConfig, get_peft_model

        return get_peft_model(model, LoraConfig(r=2, target_modules=["up_proj"], init_lora_weights=False)).eval()
    if name == "lora, seen from the base":
        from peft import LoraConfig, get_peft_model

        get_peft_model(model, LoraConfig(r=2, target_modules=["up_proj"], init_lora_weights=False)).eval()
    if name == "gelu":
        model = made("llama", hidden_act="gelu")
    if name == "dynamic":
        model = made("llama", rope_parameters={"rope_type": "dynamic", "rope_theta": 100.0, "factor": 2.0})
    if name == "hook":
        model.model.layers[0].register_forward_hook(lambda _, __, out: out * 1.5)
    if name == "forward replaced":
        was = model.model.layers[0].mlp.forward
        model.model.layers[0].mlp.forward = lambda x: -was(x)
    return model


OTHERS = ["gpt2", "gemma3", "lora", "lora, seen from the base", "gelu", "dynamic", "hook", "forward replaced"]


@pytest.mark.parametrize("name", OTHERS)
def test_other_models_write_with_their_own_forward_pass(name: str) -> None:
    model = other(name)
    assert fitting(model, V) is None
    rows = [Row(trunk=0, prefix=tuple(SHORT[:n]), limit=6, seed=n) for n in (4, 9)]
    fast, slow = (write(model, [SHORT], rows, vocab=V, eos=(3,), fast=fast) for fast in (True, False))
    assert fast == slow
    for row, w in zip(rows, fast, strict=True):
        logp = tiny.plain_logp(model, row.prefix, w.ids, V).gather(-1, torch.tensor(w.ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(w.logp), logp, atol=1e-5, rtol=1e-5)


def test_a_model_that_only_looks_like_one_is_found_out() -> None:
    """Of the same parts, but with a forward pass of its own: trying it is what tells."""
    model = made("llama")
    for layer in model.model.layers:
        layer.self_attn.scaling = 0.5
    assert fitting(model, V) is not None  # it is read off the model
    model = made("llama")
    model.model.layers[1].self_attn.scaling = 0.1  # but off its first layer
    assert known(model)
    assert fitting(model, V) is None


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_half_precision_is_used_as_it_is(kind: str) -> None:
    model = made(kind, torch.bfloat16)
    ready = fitting(model, V)
    assert ready is not None
    assert not ready.folded
    rows = [Row(trunk=0, prefix=tuple(LONG[:n]), limit=3, seed=n) for n in range(5, 37, 4)]
    exact = made(kind)
    ours, theirs = [], []
    for fast, errors in ((True, ours), (False, theirs)):
        for row, w in zip(rows, write(model, [LONG], rows, vocab=V, eos=(), fast=fast), strict=True):
            logp = tiny.plain_logp(exact, row.prefix, w.ids, V).gather(-1, torch.tensor(w.ids)[:, None])[:, 0]
            errors.append((torch.tensor(w.logp) - logp).abs())
    assert torch.cat(ours).mean() < 1.5 * torch.cat(theirs).mean()


def test_a_window_that_is_too_narrow_keeps_the_models_own_path() -> None:
    """Lean has no window; where all of the past fits into it, it needs none."""
    model = made("mistral", sliding_window=16)
    rows = [Row(trunk=0, prefix=tuple(LONG[:n]), limit=5, seed=n) for n in (7, 36)]
    for some in (rows[:1], rows):
        for row, w in zip(some, write(model, [LONG], some, vocab=V, eos=()), strict=True):
            logp = tiny.plain_logp(model, row.prefix, w.ids, V).gather(-1, torch.tensor(w.ids)[:, None])[:, 0]
            torch.testing.assert_close(torch.tensor(w.logp), logp, atol=1e-5, rtol=1e-5)
