"""Feedback across tokenizers: against the shared-tokenizer view, against enumeration, and by hand."""

import hashlib
import math
from dataclasses import replace
from functools import cache
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests import tiny
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from potstill.align import FLOOR, KNOWN, Aligner
from potstill.batch import collate, count_tokens, info_means
from potstill.divergence import jsd
from potstill.methods.opd import OPD
from potstill.methods.sampled_kl import SampledKL
from potstill.models import Tokens
from potstill.types import Ask, Feedback, Reviewed, Rollout

WHOLE = settings(derandomize=True, database=None, deadline=None, max_examples=60)


def words(pattern: str, *vocabulary: str) -> Tokens:
    """A tokenizer that cuts by a pattern; its control tokens are <end> and <control>."""
    names = ["<end>", "<control>", *vocabulary]
    backend = Tokenizer(models.WordLevel({t: i for i, t in enumerate(names)}, unk_token="<control>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    backend.decoder = decoders.Fuse()
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<end>",
        additional_special_tokens=["<control>"],
        clean_up_tokenization_spaces=False,
    )
    return tiny.tokens(made, pattern)


CHARACTERS = words(".", *"abcx")
PAIRS = words("[abc]x?", *(a + x for a, x in product("abc", ("", "x"))))
"""Every text is cut in one way only, so nothing is lost by looking at that one way."""


def toy(vocab: int, history: tuple[int, ...]) -> torch.Tensor:
    """[V] log-probs of a teacher that depends on all it has read."""
    seed = int.from_bytes(hashlib.blake2b(repr(history).encode(), digest_size=6).digest())
    made = torch.randn(vocab, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 1.5
    made[1] = -math.inf  # the control token
    return made.log_softmax(-1)


def rows(vocab: int, ids: tuple[int, ...]) -> torch.Tensor:
    return torch.stack([toy(vocab, ids[:j]) for j in range(len(ids) + 1)])


def answer(of: Tokens, text: str, end: bool = True) -> Rollout:
    """A rollout that says `text`, and then ends."""
    r = tiny.rollout(of, text, ask=tiny.prompt("a"))
    if not end:
        return r
    fields = {"pieces": (*r.pieces, ""), "old_logp": None, "entropy": None}
    return replace(r, response_ids=(*r.response_ids, of.eos[0]), **fields)


def begins(target: str, read: tuple[int, ...] = (), text: str = "") -> float:
    """The chance that the toy teacher's text begins with `target`, by enumeration; "$" stands for the end."""
    total = 0.0
    row = toy(PAIRS.vocab, read).exp().tolist()
    for v, name in enumerate(PAIRS.tokenizer.convert_ids_to_tokens(list(range(PAIRS.vocab)))):
        longer = text + {"<end>": "$", "<control>": "?"}.get(name, name)
        if longer.startswith(target):
            total += row[v]
        elif target.startswith(longer):
            total += row[v] * begins(target, (*read, v), longer)
    return total


LETTERS = {"a": "a", "b": "b", "c": "c", "x": "x", "$": "<end>"}
TO_PAIRS = Aligner(CHARACTERS, PAIRS)
TEXTS_OF_PAIRS = st.lists(st.sampled_from(["a", "b", "c", "ax", "bx", "cx"]), max_size=5).map("".join)


def view(aligner: Aligner, r: Rollout) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    w = aligner.written(r)
    return aligner.scores(w, rows(aligner.teacher.vocab, w.theirs))


# --- the distribution -----------------------------------------------------------------------------------------------


@WHOLE
@given(TEXTS_OF_PAIRS)
def test_the_next_character_is_as_likely_as_by_enumeration(text: str) -> None:
    """At every boundary, where the teacher's `ax` competes with `a` and then something else; and close to it inside."""
    q, sampled, aligned = view(TO_PAIRS, answer(CHARACTERS, text))
    ids = CHARACTERS.tokenizer.get_vocab()
    for t, character in enumerate(text + "$"):
        inside = character == "x"  # the only one that begins inside a token of the teacher
        before = begins(text[:t])
        want = {c: begins(text[:t] + c) / before for c in LETTERS}
        assert aligned[t] or inside
        if inside and abs(want["x"] - KNOWN) > 1e-6:
            assert aligned[t] == (want["x"] > KNOWN)
        if aligned[t]:
            got = {c: q[t, ids[name]].exp().item() for c, name in LETTERS.items()}
            bound = 1 - KNOWN if inside else 1e-6
            assert sum(abs(got[c] - want[c]) for c in want) / 2 <= bound
            assert sampled[t] == q[t, ids[LETTERS[character]]]


@WHOLE
@given(TEXTS_OF_PAIRS)
def test_q_is_a_distribution_and_what_is_not_known_is_zero(text: str) -> None:
    q, sampled, aligned = view(TO_PAIRS, answer(CHARACTERS, text))
    torch.testing.assert_close(q[aligned].exp().sum(-1), torch.ones(int(aligned.sum())))
    assert q.isfinite().all()
    assert not q[~aligned].any()
    assert not sampled[~aligned].any()


def test_a_token_that_the_student_would_have_read_otherwise_does_not_count() -> None:
    """After the student's `a`, the teacher's `abb` is out: the student would have begun it with `ab`. Its `add` is not."""
    student = words("ab|.", "a", "b", "ab", "c", "d")
    teacher = words("abb|add|.", "a", "b", "c", "d", "abb", "add")
    aligner = Aligner(student, teacher)
    w = aligner.written(answer(student, "ac", end=False))
    logp = rows(teacher.vocab, w.theirs)
    q, _, aligned = aligner.scores(w, logp)
    assert aligned.all()
    ids, p = teacher.tokenizer.get_vocab(), logp.exp()
    mine = student.tokenizer.get_vocab()
    after, over = p[0, ids["a"]] * p[1], p[0, ids["add"]]
    assert q[1, mine["b"]].exp().item() == pytest.approx((after[ids["b"]] / (after.sum() + over)).item(), rel=1e-5)
    assert q[1, mine["d"]].exp().item() == pytest.approx(
        ((after[ids["d"]] + over) / (after.sum() + over)).item(), rel=1e-5
    )


FAMILIES = {"byte level": tiny.byte_level(), "byte fallback": tiny.byte_fallback()}
PLAIN_TEXTS = st.lists(st.sampled_from([*"tcaehdomns. 42", "the ", " cat", "\n"]), min_size=1).map("".join)


@pytest.mark.parametrize("family", FAMILIES)
@WHOLE
@given(text=PLAIN_TEXTS, end=st.booleans())
def test_with_the_students_own_tokenizer_nothing_changes(family: str, text: str, end: bool) -> None:
    """Not even for tokens that are part of a character, control tokens and the other ends."""
    own = tiny.tokens(FAMILIES[family])
    r = answer(own, text, end)
    aligner = same(family)
    w = aligner.written(r)
    logp = (
        3 * torch.randn(len(w.theirs) + 1, own.vocab, generator=torch.Generator().manual_seed(len(text)))
    ).log_softmax(-1)
    q, sampled, aligned = aligner.scores(w, logp)
    assert w.theirs == r.response_ids[: len(w.theirs)]
    assert aligned.all()
    torch.testing.assert_close(q, logp[: len(q)], atol=2e-6, rtol=0)
    torch.testing.assert_close(sampled, logp[range(len(q)), list(r.response_ids)], atol=2e-6, rtol=0)
    spans, known = aligner.spans(w, aligner_own(logp, w.theirs, r))
    torch.testing.assert_close(spans[known], sampled[known], atol=1e-5, rtol=0)
    assert known.all()


@cache
def same(family: str) -> Aligner:
    return Aligner(tiny.tokens(FAMILIES[family]), tiny.tokens(FAMILIES[family]))


def aligner_own(logp: torch.Tensor, theirs: tuple[int, ...], r: Rollout) -> np.ndarray:
    ids = (*theirs, *r.response_ids[len(theirs) :])
    return logp[range(len(ids)), list(ids)].numpy()


# --- places, by hand ------------------------------------------------------------------------------------------------

WORDS = words(r" ?\w+|.", "4", " ", "42", " 42", " is", " i", "It", "é", "🙂", "s", "i", " é")


def test_boundaries_by_hand() -> None:
    """Characters on one side, words on the other: It| is| 42."""
    characters = words(".", *"It s42i")
    w = Aligner(characters, WORDS).written(answer(characters, "It is 42"))
    assert WORDS.tokenizer.convert_ids_to_tokens(list(w.theirs)) == ["It", " is", " 42"]
    assert w.bounds == (0, 2, 5, 8)
    assert w.read == (0, 1, 2, 3)
    assert w.starts == (0, 1, 2, 3, 4, 5, 6, 7, 8, 8)


def test_split_characters_belong_to_nobody() -> None:
    """The student writes 🙂 in four tokens and é in one or two; the teacher writes each in one, or in four."""
    student = tiny.tokens(tiny.byte_level())
    r = answer(student, "4 🙂4")
    assert r.pieces[-3:] == ("🙂", "4", "") or r.pieces[-3:] == (" 🙂", "4", "")
    split = [i for i, piece in enumerate(r.pieces) if piece == "" or "🙂" in piece][:-1]
    for teacher in (words(".", "4", " ", "🙂"), tiny.tokens(tiny.byte_fallback())):
        aligner = Aligner(student, teacher)
        w = aligner.written(r)
        assert w.bounds[-1] == len(w.text) == 4
        own = np.full(len(w.theirs) + 1, -0.5, np.float32)
        spans, known = aligner.spans(w, own)
        assert not known[split].any()
        assert known[0]
        assert known[-2:].all()
        assert spans[0] == spans[-1] == -0.5
        assert not aligner.scores(w, rows(teacher.vocab, w.theirs))[2][split].any()


def test_the_teachers_own_split_characters_are_summed() -> None:
    """é is two tokens to the teacher and one to the student: the chain rule takes both."""
    student, teacher = words(".", "4", "é", "b"), tiny.tokens(tiny.byte_fallback())
    aligner = Aligner(student, teacher)
    w = aligner.written(answer(student, "b🙂b", end=False))  # the student's unknown token writes nothing
    assert w.text == "bb"
    student = words(".", "b", "🙂")
    aligner = Aligner(student, teacher)
    w = aligner.written(answer(student, "b🙂b", end=False))
    assert len(w.theirs) == 6
    assert w.bounds == (0, 1, 2, 3)
    assert w.read == (0, 1, 5, 6)
    spans, known = aligner.spans(w, -np.arange(1, 7, dtype=np.float32))
    assert known.all()
    assert spans.tolist() == [-1, -2 - 3 - 4 - 5, -6]


def test_the_chain_rule_sums_whole_tokens_and_no_others() -> None:
    student = words(r"abc|.", "abc", *"abcx")
    aligner = Aligner(student, PAIRS)
    w = aligner.written(answer(student, "abcbxa"))  # a|b|c|bx|a of the teacher against abc|b|x|a
    assert PAIRS.tokenizer.convert_ids_to_tokens(list(w.theirs)) == ["a", "b", "c", "bx", "a"]
    spans, known = aligner.spans(w, np.array([-1, -2, -4, -8, -16], np.float32))
    assert known.tolist() == [True, False, False, True, False]
    assert spans.tolist() == [-7, 0, 0, -16, 0]
    _, known = aligner.spans(w, np.array([-1, -2, -4, -8, -16, -32], np.float32))
    assert known.tolist() == [True, False, False, True, True]
    logp = rows(PAIRS.vocab, w.theirs)
    _, sampled, aligned = aligner.scores(w, logp)
    assert aligned.tolist()[0] is False
    both, known = aligner.with_spans(w, logp, sampled, aligned)
    assert known.tolist()[0] is True
    chain = sum(logp[j, v].item() for j, v in enumerate(w.theirs[:3]))
    assert both[0].item() == pytest.approx(chain)
    assert (both[aligned] == sampled[aligned]).all()


def test_a_mark_for_a_space_at_the_beginning() -> None:
    """As in Llama 2: a text begins with a space of the tokenizer's own. Elsewhere the rest of a token is read as it is."""
    backend = Tokenizer(models.BPE({t: i for i, t in enumerate(["<end>", "\n", "▁", "a", "b", "▁a"])}, [("▁", "a")]))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(content=" ", left=1)]
    )
    marks = tiny.tokens(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>"))
    plain = words(".", *"ab ")
    forth, back = Aligner(marks, plain), Aligner(plain, marks)
    r = answer(marks, "a ab", end=False)
    assert r.pieces == ("a", " a", "b")
    logp = rows(plain.vocab, forth.written(r).theirs)
    w = forth.written(r)
    _, sampled, aligned = forth.scores(w, logp)
    assert aligned.tolist() == [False, False, True]  # " a" is two tokens of the teacher's
    assert forth.with_spans(w, logp, sampled, aligned)[1].all()
    r = answer(plain, "a ab", end=False)
    w = back.written(r)
    assert w.marked
    _, _, aligned = back.scores(w, rows(6, w.theirs))  # which never write token 1, the line break
    assert aligned.tolist() == [False, True, False, True]


def test_unheard_of_tokens_of_the_student_stay_finite() -> None:
    student = words(".", *"abcxyz")
    q, _, aligned = view(Aligner(student, PAIRS), answer(student, "ab"))
    assert aligned.all()
    assert (q[:, student.tokenizer.get_vocab()["y"]] == FLOOR).all()


# --- what learns from it --------------------------------------------------------------------------------------------


def loss_of(method: OPD | SampledKL, f: Feedback) -> tuple[float, torch.Tensor]:
    """The loss of one answer and its gradient on the student's logits, which are what `params` are."""
    [target] = method.targets([Reviewed(rollout=f.ask.rollout, feedback=(f,))])
    params = torch.randn(
        1, len(f.ask.rollout.response_ids), CHARACTERS.vocab, generator=torch.Generator().manual_seed(0)
    )
    params.requires_grad_()
    loss, metrics = method.loss(Logits(params), collate([target]))
    assert all(value.isfinite() for value in metrics.values())
    loss.backward()
    assert params.grad is not None
    return loss.item(), params.grad


class Logits:
    """A policy whose logits are given."""

    def __init__(self, logits: torch.Tensor):
        self.all = logits.log_softmax(-1)

    def logp(self, ids: torch.Tensor) -> torch.Tensor:
        return self.logp_at(ids[..., None])[..., 0]

    def logp_at(self, ids: torch.Tensor) -> torch.Tensor:
        return self.all.gather(-1, ids)

    def logp_all(self) -> torch.Tensor:
        return self.all

    def divergence(self, teacher_logp: torch.Tensor, beta: float, temperature: float = 1.0) -> torch.Tensor:
        return jsd(self.all / temperature, teacher_logp, beta)

    @property
    def reference(self) -> "Logits":
        return self


OPEN = {"clip_low": 0.999, "clip_high": 1e6, "dual_clip": 1e6}
METHODS = {
    "jsd": OPD(),
    "reverse": OPD(beta=1),
    "top-k": OPD(top_k=3),
    "sampled": SampledKL(**OPEN),
    "discounted": SampledKL(**OPEN, gamma=0.9),
}


@pytest.mark.parametrize("name", METHODS)
def test_what_is_not_aligned_teaches_nothing(name: str) -> None:
    """Other numbers there change no loss; the aligned tokens alone are the divisor; with none of them nothing is learnt."""
    method = METHODS[name]
    r = answer(CHARACTERS, "axbbxc", end=False)
    q, sampled, aligned = view(TO_PAIRS, r)
    assert aligned.any()
    assert not aligned.all()
    known = aligned.numpy()
    ids = np.tile(np.arange(3), (len(known), 1))
    ask = Ask(rollout=r, view=r.prompt, wants=method.wants)
    f = Feedback(ask=ask, teacher="toy", sampled=sampled.numpy(), aligned=known)
    if isinstance(method, OPD):
        f = replace(f, topk_ids=ids, topk_logp=q[:, :3].numpy()) if method.top_k else replace(f, logp=q.numpy())
    loss, gradient = loss_of(method, f)
    assert gradient[0, known].abs().sum() > 0
    assert not gradient[0, ~known].any()
    other = replace(f, sampled=np.where(known, f.sampled, -3).astype(np.float32))
    for field in ("logp", "topk_logp"):
        values = getattr(f, field)
        if values is not None:
            other = replace(other, **{field: np.where(known[:, None], values, -2).astype(np.float32)})
    again, same_gradient = loss_of(method, other)
    assert again == loss
    assert torch.equal(gradient, same_gradient)
    [target] = method.targets([Reviewed(rollout=r, feedback=(f,))])
    assert count_tokens([target]) == known.sum()
    assert info_means([target])["aligned"] == pytest.approx(known.mean())
    nothing, gradient = loss_of(method, replace(f, aligned=np.zeros_like(known)))
    assert nothing == 0
    assert not gradient.any()
