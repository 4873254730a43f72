"""The loss over slices of hidden states is the loss over whole answers, for every method and kind of model."""

import asyncio
import copy
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from tests import tiny
from tests.contract.test_learner import METHOD, METHODS, STUDENT, learner, targets
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)

from potstill import split as splitting
from potstill.batch import collate, read_tokens
from potstill.config import Learner, LoRA
from potstill.decode import Decoding
from potstill.learners.local import LocalLearner
from potstill.methods.base import Method
from potstill.methods.opd import OPD
from potstill.methods.sft import SFT
from potstill.models import Loaded
from potstill.split import CALL, Split, Text, rectangles, rows
from potstill.teachers.hf import HFTeacher
from potstill.types import Ask, Reviewed, Target, Wants

SMALL = {"vocab_size": STUDENT.vocab, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
WIDE = SMALL | {"intermediate_size": 48, "num_key_value_heads": 2, "initializer_range": 0.3}
OTHERS: dict[str, Any] = {
    "gemma2, capped": lambda: Gemma2ForCausalLM(Gemma2Config(**WIDE, head_dim=8, final_logit_softcapping=2.0)),
    "cohere, scaled": lambda: CohereForCausalLM(CohereConfig(**WIDE, logit_scale=0.25)),
    "granite, scaled": lambda: GraniteForCausalLM(GraniteConfig(**WIDE, logits_scaling=1.5)),
    "gpt2, learned positions": lambda: GPT2LMHeadModel(GPT2Config(**SMALL, initializer_range=0.3)),
}


def model(kind: str) -> Any:
    torch.manual_seed(0)
    return tiny.model(kind, STUDENT.vocab) if kind in ("llama", "qwen2", "gemma3") else OTHERS[kind]().eval()


KIND = pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma3", *OTHERS])


def shifted(start: Any, **config: Any) -> LocalLearner:
    """A learner whose student is not its reference."""
    by = learner(Loaded(copy.deepcopy(start), STUDENT), **config)
    with torch.no_grad():
        by.model.get_input_embeddings().weight.mul_(1.1)
    return by


def gradients(
    by: LocalLearner, method: Method, batch: list[Target]
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    row = by._backward(batch, method)
    return {n: p.grad.clone() for n, p in by.model.named_parameters() if p.grad is not None}, row


def assert_alike(by: LocalLearner, method: Method, batch: list[Target], tolerance: float = 1e-5) -> None:
    """The same learner, over slices and over whole answers."""
    assert by.split is not None
    fast, seen = gradients(by, method, batch)
    by.split = None
    whole, readable = gradients(by, method, batch)
    scale = max(g.abs().max().item() for g in whole.values())
    assert scale > 1e-4
    assert seen == pytest.approx(readable, rel=1e-4, abs=1e-6)
    assert fast.keys() == whole.keys()
    for name, got in fast.items():
        torch.testing.assert_close(
            got, whole[name], atol=tolerance * scale, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


@METHOD
@KIND
@pytest.mark.parametrize("packed", [False, True])
def test_slices_give_loss_metrics_and_gradient_of_the_whole(
    monkeypatch: pytest.MonkeyPatch, method: Method, kind: str, packed: bool
) -> None:
    monkeypatch.setattr(splitting, "LOGITS", 7 * STUDENT.vocab)  # seven tokens at a time
    assert_alike(shifted(model(kind), packed=packed), method, targets(method))


@METHOD
def test_slices_under_an_adapter(monkeypatch: pytest.MonkeyPatch, method: Method) -> None:
    monkeypatch.setattr(splitting, "LOGITS", 7 * STUDENT.vocab)
    assert_alike(shifted(model("llama"), lora=LoRA(rank=4)), method, targets(method))


def test_an_adapter_on_the_output_layer_learns() -> None:
    by = shifted(model("llama"), lora=LoRA(rank=4, modules=("lm_head", "q_proj")))
    assert_alike(by, METHODS["opd"], targets(METHODS["opd"]))


def test_slices_of_a_model_in_bfloat16_add_up_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Added in bfloat16, the head's gradient over many slices would lose its last digits."""
    made = model("llama").to(torch.bfloat16)
    batch = targets(METHODS["opd"])
    exact = gradients(shifted(made.float()), METHODS["opd"], batch)[0]
    made = made.to(torch.bfloat16)

    def error(by: LocalLearner) -> float:
        got = gradients(by, METHODS["opd"], batch)[0]["lm_head.weight"]
        assert got.dtype == torch.bfloat16
        return ((got.float() - exact["lm_head.weight"]).norm() / exact["lm_head.weight"].norm()).item()

    whole = shifted(made)
    whole.split = None
    monkeypatch.setattr(splitting, "LOGITS", STUDENT.vocab)  # one token at a time
    assert error(shifted(made)) < 1.1 * error(whole)


def test_slices_under_autocast() -> None:
    assert_alike(shifted(model("llama"), precision="bfloat16"), METHODS["opd"], targets(METHODS["opd"]), 0.03)


class Sequence(OPD):
    """A loss that looks at whole answers."""

    per_token: ClassVar[bool] = False

    def loss(self, policy: Any, batch: Any) -> Any:
        per_answer = (policy.logp(batch.labels) * batch.mask).sum(1).exp()
        loss = -per_answer.sum() / batch.n_rollouts
        return loss, {"answers": torch.tensor(float(len(batch.prompt_ids)))}


def test_a_loss_of_whole_answers_is_given_whole_answers() -> None:
    by = shifted(model("llama"))
    row = gradients(by, Sequence(), targets(OPD()))[1]
    assert row["answers"] == len(targets(OPD()))


@METHOD
def test_a_bound_on_tokens_changes_no_gradient(method: Method) -> None:
    batch, bound = targets(method), 40
    whole = gradients(shifted(model("llama")), method, batch)[0]
    by = shifted(model("llama"), micro_tokens=bound)
    parts = list(by._micro(batch))
    assert len(parts) > 1
    assert [t for part in parts for t in part] == batch
    assert all(len(part) == 1 or sum(map(read_tokens, part)) <= bound for part in parts)
    for name, got in gradients(by, method, batch)[0].items():
        torch.testing.assert_close(got, whole[name], atol=1e-5, rtol=1e-4)


def test_nothing_to_learn_is_a_gradient_of_nothing() -> None:
    batch = [Target(source=t.source, weight=0 * t.weight, advantage=t.weight) for t in targets(METHODS["sampled_kl"])]
    fast, seen = gradients(shifted(model("llama")), METHODS["sampled_kl"], batch)
    assert all(g.abs().max() == 0 for g in fast.values())
    assert seen["loss"] == 0


class Referring(OPD):
    """Uses the reference, and does not say so."""

    def loss(self, policy: Any, batch: Any) -> Any:
        return (policy.logp(batch.labels) - policy.reference.logp(batch.labels)).sum(), {}


@pytest.mark.parametrize("whole", [False, True])
def test_a_reference_that_was_not_declared_is_none(whole: bool) -> None:
    by = LocalLearner(tiny.loaded(), Learner(), steps=2, seed=0, reference=False, lora=None)
    by.split = None if whole else by.split
    with pytest.raises(AssertionError, match="did not declare"):
        by._backward(targets(OPD()), Referring())


def test_the_reference_reads_only_for_those_who_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Split] = []
    hidden = Split.hidden
    monkeypatch.setattr(Split, "hidden", lambda self, *a, **k: (read.append(self), hidden(self, *a, **k))[1])
    by = shifted(model("llama"), lora=LoRA(rank=4))
    for method, times in ((METHODS["opd"], 1), (METHODS["omniopd"], 2)):
        read.clear()
        by._backward(targets(method), method)
        assert len(read) == times


@pytest.mark.parametrize("texts", [["the cat", "", "It is 42."], ["", "the cat"], ["", ""]])
@pytest.mark.parametrize("packed", [False, True])
def test_an_answer_of_nothing_moves_nobody(texts: list[str], packed: bool) -> None:
    of = {t.rollout.prompt.id: t for t in targets(SFT(), [t for t in texts if t])}
    some = list(of.values())
    batch = [of[text] if text else nothing() for text in texts]
    row = gradients(shifted(model("llama"), packed=packed), SFT(), batch)
    want = gradients(shifted(model("llama"), packed=packed), SFT(), some) if some else ({}, {"loss": 0.0})
    assert row[1]["loss"] == pytest.approx(want[1]["loss"])
    assert row[0].keys() == want[0].keys()
    for name, got in row[0].items():
        torch.testing.assert_close(got, want[0][name])


def nothing() -> Target:
    rollout = replace(tiny.rollout(STUDENT, "4"), response_ids=(), pieces=(), old_logp=(), entropy=())
    return Target(source=Reviewed(rollout=rollout), weight=torch.zeros(0))


# --- the two parts ---------------------------------------------------------------------------------------------------


@KIND
def test_every_kind_of_model_splits(kind: str) -> None:
    assert Split.of(model(kind), STUDENT.vocab) is not None


class Odd(LlamaForCausalLM):
    """Does something to its logits that no setting tells."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        out.logits = out.logits * 1.5 + 1
        return out


def test_a_model_whose_logits_are_more_than_its_head_does_not() -> None:
    made = model("llama")
    made.__class__ = Odd
    assert Split.of(made, STUDENT.vocab) is None
    by = shifted(made)
    assert gradients(by, METHODS["opd"], targets(METHODS["opd"]))[1]["loss"] > 0


@pytest.mark.parametrize("packed", [False, True])
@KIND
def test_hidden_states_do_not_depend_on_what_is_read_beside_them(kind: str, packed: bool) -> None:
    split = Split.of(model(kind), STUDENT.vocab)
    assert split is not None
    texts = [Text(list(range(5, 5 + n)), start) for n, start in ((12, 3), (1, 0), (7, 6), (30, 10), (12, 0), (2, 1))]
    together = split.hidden(texts, packed=packed)
    alone = torch.cat([split.hidden([t]) for t in texts])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)
    assert len(together) == sum(len(t.ids) - t.start for t in texts)


def test_texts_whose_angles_depend_on_the_longest_are_read_one_by_one() -> None:
    turns = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    config = Phi3Config(
        **WIDE,
        original_max_position_embeddings=8,
        max_position_embeddings=64,
        rope_parameters=turns | {"original_max_position_embeddings": 8},
        pad_token_id=0,
    )
    made = Phi3ForCausalLM(config).eval()
    split = Split.of(made, STUDENT.vocab)
    assert split is not None
    assert Split.of(made, STUDENT.vocab, packed=True) is None
    short, long = Text(range(1, 7)), Text(range(1, 20))
    with torch.no_grad():
        torch.testing.assert_close(split.hidden([short, long])[:6], split.hidden([short]))
        crowded = replace(split, alone=False)
        assert (crowded.hidden([short, long])[:6] - split.hidden([short])).abs().max() > 0.1


def test_rectangles_hold_every_text_and_cost_the_least() -> None:
    assert rectangles([5, 5, 5]) == [[0, 1, 2]]
    assert sorted(map(sorted, rectangles([10, 500, 11, 490]))) == [[0, 2], [1, 3]]
    lengths = [3, 200, 90, 91, 5, 140, 4]

    def cost(parts: list[list[int]]) -> int:
        return sum(len(p) * max(lengths[i] for i in p) + CALL for p in parts)

    def every(left: list[int]) -> list[list[list[int]]]:
        if not left:
            return [[]]
        return [[left[:n], *rest] for n in range(1, len(left) + 1) for rest in every(left[n:])]

    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    found = rectangles(lengths)
    assert sorted(i for part in found for i in part) == list(range(len(lengths)))
    assert cost(found) == min(cost(parts) for parts in every(order))
    assert [len(row) for row in rows([Text([1] * n) for n in (4, 4, 9, 1)], 8)] == [2, 1, 1]


# --- a teacher of hidden states --------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [OPD(beta=0.3), OPD(beta=1.0, teacher_temperature=2.0, student_temperature=0.5)])
def test_a_teacher_of_hidden_states_teaches_what_its_log_probs_do(method: OPD) -> None:
    teacher = Loaded(tiny.model("qwen2", STUDENT.vocab, seed=5), STUDENT)
    rollouts = [t.rollout for t in targets(METHODS["opd"])]
    told: dict[bool, tuple[Any, dict[str, float], list[Target]]] = {}
    for hides in (False, True):
        by = HFTeacher(teacher, STUDENT, decoding=Decoding(), hides=hides)
        asks = [a for r in rollouts for a in method.asks(r)]
        feedback = asyncio.run(by.feedback(asks))
        batch = method.targets([Reviewed(rollout=f.ask.rollout, feedback=(f,)) for f in feedback])
        told[hides] = (*gradients(shifted(model("llama")), method, batch), batch)
        assert (feedback[0].hidden is not None) == hides
        assert (feedback[0].logp is None) == hides
    for name, got in told[True][0].items():
        torch.testing.assert_close(got, told[False][0][name], atol=1e-5, rtol=1e-4)
    hidden, full = told[True], told[False]
    assert hidden[1] == pytest.approx(full[1], rel=1e-4)
    kl = [method.told(t)["teacher_kl"] for t in full[2]]
    assert hidden[1]["teacher_kl"] == pytest.approx(torch.cat(kl).mean().item(), rel=1e-4)
    for t, want in zip(hidden[2], kl, strict=True):
        torch.testing.assert_close(method.told(t)["teacher_kl"], want, atol=1e-4, rtol=1e-4)
        assert not t.info


def test_the_batch_makes_distributions_of_hidden_states() -> None:
    made = model("qwen2")
    split = Split.of(made, STUDENT.vocab)
    assert split is not None
    [target] = targets(OPD(), ["It is 42."])
    hidden = split.hidden([Text([1, 2, *target.rollout.response_ids[:-1]], 1)]).detach()
    batch = collate(
        [Target(source=target.source, weight=target.weight, teacher_hidden=hidden, teacher_head=split.head)]
    )
    want = tiny.plain_logp(made, (1, 2), target.rollout.response_ids, STUDENT.vocab)
    torch.testing.assert_close(batch.teacher_all()[0], want, atol=2e-5, rtol=1e-4)
    some = batch.only(torch.tensor([0, 3]))
    torch.testing.assert_close(some.teacher_all()[0], want[[0, 3]], atol=2e-5, rtol=1e-4)
    assert some.n_tokens == batch.n_tokens


def test_scores_over_slices_are_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = Loaded(tiny.model("llama", STUDENT.vocab, seed=5), STUDENT)
    [r] = [tiny.rollout(STUDENT, "the dog and the cat")]
    asks = [Ask(rollout=r, view=r.prompt, wants=wants, k=3) for wants in (Wants.SAMPLED, Wants.TOPK, Wants.FULL)]
    whole = asyncio.run(HFTeacher(teacher, STUDENT, decoding=Decoding()).feedback(asks))
    monkeypatch.setattr(splitting, "LOGITS", 2 * STUDENT.vocab)
    sliced = asyncio.run(HFTeacher(teacher, STUDENT, decoding=Decoding()).feedback(asks))
    for a, b in zip(whole, sliced, strict=True):
        for name in ("sampled", "topk_ids", "topk_logp", "logp"):
            x, y = getattr(a, name), getattr(b, name)
            assert (x is None) == (y is None)
            if x is not None:
                torch.testing.assert_close(torch.from_numpy(x), torch.from_numpy(y))
