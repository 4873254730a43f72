"""The local learner: one gradient however a batch is laid out, and weights that come back bit for bit."""

import asyncio
import copy
import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tests import tiny
from transformers import AutoModelForCausalLM

from potstill import models
from potstill.batch import collate
from potstill.config import Learner, LoRA
from potstill.decode import Decoding
from potstill.errors import CheckpointError, TrainingError
from potstill.learners.local import LocalLearner
from potstill.methods.base import Method
from potstill.methods.dagger import Dagger
from potstill.methods.mix import Mix
from potstill.methods.omniopd import OmniOPD
from potstill.methods.opd import OPD
from potstill.methods.sampled_kl import SampledKL
from potstill.methods.sft import SFT
from potstill.methods.sgopd import SGOPD
from potstill.models import Loaded
from potstill.phased import Phased
from potstill.teachers.hf import HFTeacher
from potstill.types import Ask, Feedback, Reviewed, Target, Wants

STUDENT = tiny.tokens(tiny.byte_level(), "student")
METHODS: dict[str, Method] = {
    "opd": OPD(beta=0.3),
    "opd top-k": OPD(beta=1.0, top_k=5),
    "sampled_kl": SampledKL(gamma=0.5, clip_low=0.99, clip_high=1e3, dual_clip=1e3),
    "sft": SFT(),
    "sgopd with examples": SGOPD(
        mean="sequence", phased=Phased(share=0.5, loss="topk", top_k=5), clip_low=0.99, clip_high=1e3, dual_clip=1e3
    ),
    "omniopd": OmniOPD(chunks=2, continuations=2, chunk_length=3, beta=0.5),
    "omniopd with imitation": OmniOPD(chunks=2, continuations=2, chunk_length=3, beta=0.5, dagger=1.0, max_ratio=1e3),
    "dagger": Dagger(chunks=2, continuations=2, chunk_length=3),
}
TEXTS = ["It is 42.", "the cat sat on the mat", "naïve 🙂", "the dog and the cat", "4", "What is 30? It is 12."]
METHOD = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
FAMILY = pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3"])


def said(ask: Ask, vocab: int = STUDENT.vocab) -> Feedback:
    """A teacher of random opinions, a function of the rollout and the position alone."""
    length = len(ask.rollout.response_ids)
    rng = np.random.default_rng(length)
    logp = torch.from_numpy(rng.normal(size=(length, vocab)).astype(np.float32)).log_softmax(-1)
    if ask.wants is Wants.TEXT:
        texts = ("the cat", "It is 4")[: ask.n]
        ids = tuple(tuple(STUDENT.tokenizer.encode(text)) for text in texts)
        return Feedback(ask=ask, teacher="t", texts=texts, ids=ids if ask.ids else ())
    values, ids = logp.topk(max(ask.k, 1), -1)
    own = logp.gather(-1, torch.tensor(ask.rollout.response_ids)[:, None])[:, 0]
    known: dict[str, Any] = {"topk_ids": ids.numpy(), "topk_logp": values.numpy()} if ask.wants is Wants.TOPK else {}
    known |= {"logp": logp.numpy()} if ask.wants is Wants.FULL else {}
    return Feedback(ask=ask, teacher="t", sampled=own.numpy(), **known)


def targets(method: Method, texts: list[str] = TEXTS) -> list[Target]:
    made = [
        tiny.rollout(STUDENT, text, ask=tiny.prompt("Why? " * (1 + i % 3), id=text), verdict=float(i % 2))
        for i, text in enumerate(texts)
    ]
    if method.examples:
        made[1::3] = [replace(r, author="teacher", old_logp=None, entropy=None) for r in made[1::3]]
    return method.targets([Reviewed(rollout=r, feedback=tuple(said(a) for a in method.asks(r))) for r in made])


def learner(loaded: Loaded | None = None, lora: LoRA | None = None, steps: int = 10, **config: Any) -> LocalLearner:
    return LocalLearner(
        loaded or tiny.loaded(), Learner(**{"clip": 0.0, **config}), steps=steps, seed=0, reference=True, lora=lora
    )


def moved_away(by: LocalLearner) -> LocalLearner:
    """Trained a little, so that the student is no longer its reference."""
    for step in (1, 2):
        by.step(targets(SFT()), SFT(), step)
    return by


def gradient(by: LocalLearner, method: Method, batch: list[Target]) -> dict[str, torch.Tensor]:
    by.step(batch, method, 1)
    return {n: p.grad for n, p in by.model.named_parameters() if p.grad is not None}


def weights(by: LocalLearner) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in by.model.named_parameters()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


# --- the policy's view ----------------------------------------------------------------------------------------------


@FAMILY
def test_logp_is_that_of_a_plain_forward_pass_whatever_the_padding(family: str) -> None:
    by = learner(tiny.loaded(family, padding=16))
    batch = collate(targets(SFT()))
    assert len({len(p) for p in batch.prompt_ids}) > 1
    assert batch.mask.sum() < batch.mask.numel()
    policy = by.policy(batch)
    three = batch.labels[..., None] + torch.tensor([0, -1, -2])
    three = three.clamp(min=0)
    for i, t in enumerate(targets(SFT())):
        ids = t.rollout.response_ids
        want = tiny.plain_logp(by.model, t.rollout.prompt_ids, ids, STUDENT.vocab)
        row = slice(0, len(ids))
        torch.testing.assert_close(policy.logp_all()[i, row], want, atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(
            policy.logp(batch.labels)[i, row], want.gather(-1, torch.tensor(ids)[:, None])[:, 0], atol=2e-5, rtol=1e-5
        )
        torch.testing.assert_close(policy.logp_at(three)[i, row], want.gather(-1, three[i, row]), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("lora", [None, LoRA(rank=4)], ids=["full", "lora"])
def test_the_reference_is_the_initial_student(lora: LoRA | None) -> None:
    start = tiny.loaded()
    batch = collate(targets(SFT()))
    before = learner(Loaded(copy.deepcopy(start.model), start.tokens)).policy(batch).logp_all().detach()
    by = learner(start, lora, lr=0.05)
    for step in (1, 2, 3):
        by.step(targets(SFT()), SFT(), step)
        policy = by.policy(batch)
        assert torch.equal(policy.reference.logp_all(), before)
        assert not policy.reference.logp_all().requires_grad
        assert policy.logp_all().requires_grad
        assert (policy.logp_all() - before).abs().max() > 0.01


# --- the gradient ---------------------------------------------------------------------------------------------------


@METHOD
@FAMILY
def test_the_gradient_does_not_depend_on_the_split_the_order_or_the_padding(method: Method, family: str) -> None:
    batch = targets(method)
    start = tiny.loaded(family)

    def of(order: list[Target], micro: int) -> dict[str, torch.Tensor]:
        by = learner(Loaded(copy.deepcopy(start.model), start.tokens), micro_batch=micro)
        with torch.no_grad():  # away from the reference, where its KL has no gradient
            by.model.get_input_embeddings().weight.mul_(1.1)
        return gradient(by, method, order)

    whole = of(batch, 0)
    scale = max(g.abs().max().item() for g in whole.values())
    assert scale > 1e-3
    for order, micro in [(batch, 1), (batch, 2), (batch, 4), (batch[::-1], 0), (batch[::-1], 4)]:
        for name, got in of(order, micro).items():
            torch.testing.assert_close(
                got, whole[name], atol=1e-6 * max(scale, 1), rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
            )


@METHOD
def test_metrics_do_not_depend_on_the_split(method: Method) -> None:
    one, many = (learner(micro_batch=n).step(targets(method), method, 1) for n in (0, 1))
    assert one == pytest.approx(many, rel=1e-4, abs=1e-6)
    branches = sum(c.share * len(c.ids) for t in targets(method) for c in t.continuations)
    own = 0 if method.name == "dagger" else sum(len(t.rollout.response_ids) for t in targets(method))
    assert one["trained_tokens"] == own + branches


@METHOD
@FAMILY
def test_padding_rows_of_the_output_layer_get_no_gradient(method: Method, family: str) -> None:
    narrow, wide = tiny.loaded(family), tiny.loaded(family, padding=128)
    a, b = (gradient(learner(x), method, targets(method)) for x in (narrow, wide))
    scale = max(g.abs().max().item() for g in a.values())
    for name, small in a.items():
        big = b[name]
        torch.testing.assert_close(
            big[tuple(slice(n) for n in small.shape)], small, atol=1e-6 * max(scale, 1), rtol=1e-5
        )
        assert big[small.shape[0] :].abs().sum() == 0


@pytest.mark.parametrize("clip", [0.0, 1e-3, 1e6])
def test_clipping_bounds_the_norm_and_logs_what_it_was(clip: float) -> None:
    free = learner()
    got = gradient(free, SFT(), targets(SFT()))
    norm = torch.stack([g.norm() for g in got.values()]).norm().item()
    by = learner(clip=clip)
    row = by.step(targets(SFT()), SFT(), 1)
    clipped = torch.stack([p.grad.norm() for p in by.model.parameters()]).norm().item()
    assert row["grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert clipped == pytest.approx(min(norm, clip) if clip else norm, rel=1e-3)


def test_adamw_by_hand() -> None:
    """The first step of AdamW moves each weight by lr (1 - almost nothing), against its gradient, after the decay."""
    by = learner(lr=0.01, weight_decay=0.1)
    before = weights(by)
    g = gradient(by, SFT(), targets(SFT()))
    name = "model.layers.0.mlp.up_proj.weight"
    want = before[name] * (1 - 0.01 * 0.1) - 0.01 * g[name] / (g[name].abs() + 1e-8)
    torch.testing.assert_close(weights(by)[name], want, atol=1e-6, rtol=1e-5)


def test_learning_rates_by_hand() -> None:
    def rates(steps: int, **config: Any) -> list[float]:
        by = learner(steps=steps, lr=1.0, **config)
        return [by.rate(i, (i - 1) / steps) for i in range(1, steps + 1)]

    assert rates(4) == [1, 1, 1, 1]
    assert rates(4, warmup=2) == [0.5, 1, 1, 1]
    assert rates(4, schedule="linear") == pytest.approx([1, 0.75, 0.5, 0.25])
    assert rates(6, schedule="linear", warmup=2) == pytest.approx([0.5, 1, 1, 0.75, 0.5, 0.25])
    half = 0.5**0.5
    assert rates(4, schedule="cosine") == pytest.approx([1, (1 + half) / 2, 0.5, (1 - half) / 2])
    assert all(
        rate > 0 for s in ("linear", "cosine") for n in (1, 2, 3) for rate in rates(n, schedule=s)
    )  # none is wasted
    by = learner(steps=4, lr=1.0, schedule="linear")
    assert [by.step(targets(SFT()), SFT(), i, (i - 1) / 4)["lr"] for i in (1, 3)] == pytest.approx([1, 0.5])
    assert by.optimizer.param_groups[0]["lr"] == pytest.approx(0.5)


def test_several_updates_are_several_steps_on_the_same_rollouts() -> None:
    """Two updates are two optimiser steps at one rate; the ratio of the second is no longer 1."""
    method = METHODS["sampled_kl"]
    fixed = targets(method)
    one, two = learner(lr=0.01), learner(lr=0.01, updates=2)
    rows = [one.step(fixed, method, 1), one.step(fixed, method, 1)]
    joined = two.step(fixed, method, 1)
    assert equal(weights(one), weights(two))
    assert joined["loss"] == pytest.approx((rows[0]["loss"] + rows[1]["loss"]) / 2)
    assert joined["ratio_max"] == max(row["ratio_max"] for row in rows)
    assert rows[0]["ratio_max"] != rows[1]["ratio_max"]


@pytest.mark.parametrize("lora", [None, LoRA(rank=2)])
def test_the_initial_student_can_be_asked_after_training(lora: LoRA | None) -> None:
    """What extrapolation starts from: the scores of the weights before the first step, adapter off."""
    by = learner(lora=lora, lr=0.05)
    prompt_ids, ids = (5, 6, 7), (8, 9, 10, 11)
    before = tiny.plain_logp(by.model, prompt_ids, ids, STUDENT.vocab)
    moved_away(by)
    loaded, around = by.initial()
    with around():
        assert torch.equal(tiny.plain_logp(loaded.model, prompt_ids, ids, STUDENT.vocab), before)
    assert (tiny.plain_logp(by.model, prompt_ids, ids, STUDENT.vocab) - before).abs().max() > 0.01
    asked = HFTeacher(loaded, STUDENT, decoding=Decoding(), around=around)
    r = tiny.rollout(STUDENT, "It is 42.")
    [feedback] = asyncio.run(asked.feedback([Ask(rollout=r, view=r.prompt, wants=Wants.SAMPLED, of="reference")]))
    with around():
        want = tiny.plain_logp(loaded.model, r.prompt_ids, r.response_ids, STUDENT.vocab)
    want = want.gather(-1, torch.tensor(r.response_ids)[:, None])[:, 0]
    np.testing.assert_allclose(feedback.sampled, want, atol=2e-5)


def test_dropout_is_seeded_by_the_step() -> None:
    start = tiny.model("llama", STUDENT.vocab, attention_dropout=0.5)

    def losses(noise: int) -> list[float]:
        by = learner(Loaded(copy.deepcopy(start), STUDENT), lr=1e-9)
        by.model.train()
        torch.manual_seed(noise)
        return [by.step(targets(SFT()), SFT(), step)["loss"] for step in (1, 2)]

    assert losses(1) == losses(2)
    assert losses(1)[0] != losses(1)[1]


def test_a_loss_that_is_no_number_leaves_the_weights_alone() -> None:
    by = learner()
    before = weights(by)
    [bad] = targets(SampledKL(), ["It is 42."])
    assert bad.advantage is not None
    bad = replace(bad, advantage=bad.advantage * float("nan"))
    with pytest.raises(TrainingError, match=r"step 3: loss is nan.*weights are those of step 2"):
        by.step([*targets(SampledKL()), bad], SampledKL(), 3)
    assert equal(weights(by), before)
    assert not by.optimizer.state


def test_a_step_on_frozen_targets_lowers_the_loss() -> None:
    for method in METHODS.values():
        by = learner(lr=1e-3)
        fixed = targets(method)
        losses = [by.step(fixed, method, i)["loss"] for i in (1, 2, 3, 4)]
        assert losses == sorted(losses, reverse=True), (method.name, losses)


# --- on disk --------------------------------------------------------------------------------------------------------


@FAMILY
@pytest.mark.parametrize("lora", [None, LoRA(rank=4, dropout=0.1)], ids=["full", "lora"])
def test_a_restored_run_goes_on_bit_for_bit(lora: LoRA | None, family: str, tmp_path: Path) -> None:
    method = METHODS["omniopd"]

    def fresh() -> LocalLearner:
        by = learner(tiny.loaded(family), lora, lr=1e-2)
        by.model.train()
        return by

    unbroken = fresh()
    rows = [unbroken.step(targets(method), method, step) for step in (1, 2, 3, 4)]
    first = fresh()
    for step in (1, 2):
        first.step(targets(method), method, step)
    tmp_path.mkdir(exist_ok=True)
    first.save(tmp_path)
    second = fresh()
    second.restore(tmp_path)
    assert equal(weights(second), weights(first))
    assert [second.step(targets(method), method, step) for step in (3, 4)] == rows[2:]
    assert equal(weights(second), weights(unbroken))


@FAMILY
def test_a_checkpoint_loads_in_transformers(family: str, tmp_path: Path) -> None:
    by = moved_away(learner(tiny.loaded(family, padding=8)))
    by.save(tmp_path)
    other = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.tensor([STUDENT.tokenizer.encode("the cat sat")])
    by.model.eval()
    torch.testing.assert_close(other(input_ids=ids).logits, by.model(input_ids=ids).logits.detach(), atol=0, rtol=0)
    if family == "qwen2":
        return  # transformers puts the tokenizer class of Qwen2 around any tokenizer next to such a model
    again = models.load(str(tmp_path))
    assert again.tokens.vocab == STUDENT.vocab
    assert again.tokens.eos == STUDENT.eos
    assert models.same_tokenizer(again.tokens, STUDENT) is None
    assert not any(p.requires_grad for p in again.model.parameters())


def test_lora_moves_the_adapter_only_and_saves_both_forms(tmp_path: Path) -> None:
    base = tiny.loaded()
    base.model.save_pretrained(tmp_path / "base")
    base.tokens.tokenizer.save_pretrained(tmp_path / "base")
    start = models.load(str(tmp_path / "base"))
    by = learner(start, LoRA(rank=4), lr=1e-2)
    before = weights(by)
    moved_away(by)
    after = weights(by)
    moved = {n for n in after if not torch.equal(after[n], before[n])}
    assert moved
    assert all("lora_" in n for n in moved)
    assert not any("lm_head" in n for n in moved)

    by.save(tmp_path / "out")
    ids = torch.tensor([STUDENT.tokenizer.encode("the cat sat")])
    want = by.model.eval()(input_ids=ids).logits.detach()
    merged, adapter = models.load(str(tmp_path / "out")), models.load(str(tmp_path / "out" / "adapter"))
    for got in (merged, adapter):
        torch.testing.assert_close(got.model(input_ids=ids).logits, want, atol=1e-5, rtol=1e-5)
        assert got.tokens.vocab == STUDENT.vocab
    for file in (tmp_path / "out" / "adapter").glob("*token*"):  # as peft itself would have saved it
        file.unlink()
    bare = models.load(str(tmp_path / "out" / "adapter"))
    assert models.same_tokenizer(bare.tokens, STUDENT) is None
    torch.testing.assert_close(bare.model(input_ids=ids).logits, want, atol=1e-5, rtol=1e-5)
    initial = load_file(tmp_path / "base" / "model.safetensors")
    kept = {
        n.removeprefix("base_model.model.").replace(".base_layer", ""): w for n, w in after.items() if "lora_" not in n
    }
    assert all(torch.equal(kept[n], w) for n, w in initial.items())
    assert torch.equal(by.model(input_ids=ids).logits, want)  # saving did not merge the model that goes on training


@pytest.mark.parametrize("modules", [("lm_head", "q_proj"), ("embed_tokens",)])
def test_an_adapter_on_one_end_of_a_tied_model_is_saved_as_it_is(modules: tuple[str, ...], tmp_path: Path) -> None:
    base, ids = tiny.loaded("qwen2"), torch.tensor([[5, 9, 30, 7]])
    assert base.model.config.tie_word_embeddings
    base.model.save_pretrained(tmp_path / "base")
    base.tokens.tokenizer.save_pretrained(tmp_path / "base")
    by = learner(models.load(str(tmp_path / "base")), LoRA(rank=4, modules=modules), lr=0.05)
    moved_away(by)
    with torch.no_grad():
        want = by.model(input_ids=ids).logits
    by.save(tmp_path / "out")
    for folder in ("out", "out/adapter"):
        with torch.no_grad():
            got = models.load(str(tmp_path / folder)).model(input_ids=ids).logits
        torch.testing.assert_close(got, want, atol=1e-3, rtol=1e-3)


def test_one_seed_gives_one_adapter() -> None:
    a, b = (learner(lora=LoRA(rank=4)) for _ in range(2))
    assert equal(weights(a), weights(b))


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def garbage(path: Path) -> None:
    path.write_bytes(b"?" * 100)


DAMAGES = [*itertools.product(["trainer.pt", "model.safetensors"], [cut_short, garbage, Path.unlink])]


@pytest.mark.parametrize(("name", "damage"), DAMAGES)
def test_a_damaged_checkpoint_is_refused(name: str, damage: Any, tmp_path: Path) -> None:
    by = learner()
    by.save(tmp_path)
    damage(tmp_path / name)
    with pytest.raises(CheckpointError, match="is damaged"):
        learner().restore(tmp_path)


def test_a_checkpoint_of_another_shape_is_refused(tmp_path: Path) -> None:
    learner(lora=LoRA(rank=4)).save(tmp_path)
    with pytest.raises(CheckpointError, match="is damaged"):
        learner(lora=LoRA(rank=8)).restore(tmp_path)


# --- the angle between two terms ------------------------------------------------------------------------------------


def test_the_cosine_of_two_terms_is_that_of_their_gradients_and_costs_the_run_nothing() -> None:
    silent = Mix(alpha=0.5, clip_low=0.99, clip_high=1e3, dual_clip=1e3)
    method = silent.model_copy(update={"cosine_every": 1})
    batch = group_of(method)
    parts = method.terms(batch, 1)
    assert parts is not None
    flat = [torch.cat([g.flatten() for g in gradient(learner(), silent, list(part)).values()]) for part in parts]
    expected = torch.nn.functional.cosine_similarity(*flat, dim=0).item()
    assert abs(expected) > 1e-3
    for micro in (0, 2):
        by, plain = learner(micro_batch=micro), learner(micro_batch=micro)
        assert by.step(batch, method, 1)["term/cosine"] == pytest.approx(expected, abs=1e-5)
        assert "term/cosine" not in plain.step(batch, silent, 1)
        assert equal(weights(by), weights(plain))


def test_terms_without_a_direction_have_no_cosine() -> None:
    method = Mix(alpha=0.5, cosine_every=1)
    assert "term/cosine" not in learner().step(group_of(method, verdict=1.0), method, 1), "all verdicts are alike"


def group_of(method: Method, verdict: float | None = None) -> list[Target]:
    """Answers to one prompt, right and wrong by turns."""
    made = [
        tiny.rollout(
            STUDENT, text, ask=tiny.prompt("Why?", id="one"), verdict=float(i % 2) if verdict is None else verdict
        )
        for i, text in enumerate(TEXTS)
    ]
    return method.targets([Reviewed(rollout=r, feedback=tuple(said(a) for a in method.asks(r))) for r in made])
