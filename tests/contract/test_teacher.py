"""The Hugging Face teacher: its scores against a plain forward pass, its texts against what it may have read."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tests import tiny
from tests.asks import answers, go_on, score

from potstill import chat
from potstill.decode import Decoding
from potstill.models import Loaded
from potstill.teachers.hf import SLACK, HFTeacher
from potstill.types import Ask, Prompt, Rollout, Wants

STUDENT = tiny.tokens(tiny.byte_level(), "student")
TEXTS = ["It is 42.", "the cat sat", "naïve café — 你好 🙂 done", "4"]


def teacher(loaded: Loaded | None = None, **options: Any) -> HFTeacher:
    return HFTeacher(loaded or tiny.loaded(seed=1, name="teacher"), STUDENT, **{"decoding": Decoding(), **options})


ROLLOUTS = [
    tiny.rollout(STUDENT, text, ask=tiny.prompt("Why? " * (i + 1), id=f"p{i}"), seed=i) for i, text in enumerate(TEXTS)
]
LONG = tiny.rollout(STUDENT, "the dog sat on the mat. What is 12 + 30? It is 42 and done")


def of_ids(ids: tuple[int, ...]) -> Rollout:
    """LONG's prompt and seed with another response."""
    pieces = chat.pieces(STUDENT.tokenizer, ids)
    return replace(LONG, response_ids=ids, pieces=pieces, old_logp=None, entropy=None)


def plain(by: HFTeacher, ask: Ask) -> torch.Tensor:
    prompt = chat.prompt_ids(by.loaded.tokens.tokenizer, ask.view)
    return tiny.plain_logp(by.loaded.model, prompt, ask.rollout.response_ids, STUDENT.vocab)[ask.start :][: ask.length]


# --- scores ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3"])
@pytest.mark.parametrize("cells", [1, 65_536])
def test_scores_are_those_of_a_plain_forward_pass(family: str, cells: int) -> None:
    by = teacher(tiny.loaded(family, seed=1), decoding=Decoding(cells=cells))
    asks = [score(Wants.FULL, r) for r in ROLLOUTS]
    for ask, f in zip(asks, answers(by, *asks), strict=True):
        assert f.ask is ask
        assert f.logp is not None
        assert f.sampled is not None
        want = plain(by, ask)
        np.testing.assert_allclose(f.logp, want, atol=2e-5)
        np.testing.assert_allclose(np.exp(f.logp).sum(-1), 1, atol=1e-5)
        assert f.sampled.shape == (len(ask.rollout.response_ids),)
        assert (f.sampled <= 0).all()
        np.testing.assert_array_equal(f.sampled, f.logp[np.arange(len(f.sampled)), list(ask.rollout.response_ids)])


def test_a_part_of_the_response_is_scored_in_its_place() -> None:
    by = teacher()
    [f] = answers(by, score(Wants.FULL, LONG, start=4, length=3))
    assert f.logp is not None
    assert f.sampled is not None
    np.testing.assert_allclose(f.logp, plain(by, score(Wants.FULL, LONG))[4:7], atol=2e-5)
    np.testing.assert_array_equal(f.sampled, f.logp[np.arange(3), list(LONG.response_ids[4:7])])


@pytest.mark.parametrize("k", [1, 5, 10_000])
def test_top_k_is_the_top_of_the_whole(k: int) -> None:
    by = teacher()
    [full] = answers(by, score(Wants.FULL, LONG))
    [top] = answers(by, score(Wants.TOPK, LONG, k=k))
    assert top.topk_ids is not None
    assert top.topk_logp is not None
    assert full.logp is not None
    assert top.sampled is not None
    assert top.topk_ids.shape == (len(LONG.response_ids), min(k, STUDENT.vocab))
    np.testing.assert_allclose(top.topk_logp, -np.sort(-full.logp, -1)[:, :k], atol=1e-6)
    for t, ids in enumerate(top.topk_ids.tolist()):
        assert len(set(ids)) == len(ids)
        token = LONG.response_ids[t]
        if token in ids:
            assert top.topk_logp[t, ids.index(token)] == top.sampled[t]


def test_answers_come_in_the_order_of_the_questions_whatever_was_asked() -> None:
    asks = [go_on(LONG, 3), score(Wants.SAMPLED, ROLLOUTS[0]), go_on(LONG, 9), score(Wants.SAMPLED, LONG)]
    got = answers(teacher(), *asks)
    assert [f.ask for f in got] == asks
    assert [f.sampled is None for f in got] == [True, False, True, False]
    assert [len(f.texts) for f in got] == [3, 0, 3, 0]


def test_padding_rows_of_the_teacher_take_no_mass() -> None:
    narrow, wide = teacher(), teacher(tiny.loaded(seed=1, padding=128))
    [a], [b] = answers(narrow, score(Wants.FULL, LONG)), answers(wide, score(Wants.FULL, LONG))
    assert a.logp is not None
    assert b.logp is not None
    assert not wide.foreign
    assert b.logp.shape[-1] == STUDENT.vocab
    np.testing.assert_allclose(a.logp, b.logp, atol=1e-6)
    assert answers(narrow, go_on(LONG, 3))[0].texts == answers(wide, go_on(LONG, 3))[0].texts


def test_the_teacher_reads_the_prompt_in_its_own_template() -> None:
    own = tiny.byte_level(template="{% for m in messages %}Q: {{ m['content'] }}{% endfor %} A: ")
    by = teacher(tiny.loaded(seed=1, tokenizer=own))
    prompt = tuple(own.encode("Q: What is 12 + 30? A: ", add_special_tokens=False))
    assert prompt != LONG.prompt_ids
    assert not by.foreign
    [f] = answers(by, score(Wants.FULL, LONG))
    np.testing.assert_allclose(
        f.logp, tiny.plain_logp(by.loaded.model, prompt, LONG.response_ids, STUDENT.vocab), atol=2e-5
    )
    assert f.usage.read == len(prompt) + len(LONG.response_ids)


def test_a_privileged_teacher_reads_its_own_view() -> None:
    by, view = teacher(), Prompt(id="p", messages=({"role": "user", "content": "What is 12 + 30? The answer is 42."},))
    [f] = answers(by, replace(score(Wants.FULL, LONG), view=view))
    prompt = chat.prompt_ids(STUDENT.tokenizer, view)
    np.testing.assert_allclose(
        f.logp, tiny.plain_logp(by.loaded.model, prompt, LONG.response_ids, STUDENT.vocab), atol=2e-5
    )


# --- continuations --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3"])
def test_shared_prefixes_change_no_text(family: str) -> None:
    asks = [*(go_on(LONG, start) for start in (0, 4, 13)), *(go_on(r, 1) for r in ROLLOUTS[:3])]
    loaded = tiny.loaded(family, seed=1)
    shared, naive = (answers(teacher(loaded, share=share), *asks) for share in (True, False))
    assert [f.texts for f in shared] == [f.texts for f in naive]
    assert [f.finishes for f in shared] == [f.finishes for f in naive]
    alone = [answers(teacher(loaded), ask)[0].texts for ask in asks]
    assert [f.texts for f in shared] == alone


@pytest.mark.parametrize("foreign", [False, True])
def test_the_teacher_never_reads_the_chunk(foreign: bool) -> None:
    """Whatever the student wrote from the anchor on, the continuations are the same; what it wrote before matters."""
    tokenizer = tiny.byte_level(270) if foreign else None
    by = teacher(tiny.loaded(seed=1, tokenizer=tokenizer))
    assert by.foreign == foreign
    start, ids = 8, LONG.response_ids
    a, b, c = (
        answers(by, go_on(r, start), go_on(r, start + 4))[0].texts
        for r in (LONG, of_ids((*ids[:start], *ids[:10])), of_ids((ids[1], *ids[1:])))
    )
    assert a == b != c


@pytest.mark.parametrize("foreign", [False, True])
def test_what_the_model_read_is_prompt_and_prefix(foreign: bool) -> None:
    tokenizer = tiny.byte_level(270) if foreign else tiny.byte_level()
    by = teacher(tiny.loaded(seed=1, tokenizer=tokenizer))
    read: list[int] = []
    handle = by.loaded.model.register_forward_pre_hook(
        lambda _, args, kw: read.extend(kw["input_ids"][0].tolist()), with_kwargs=True
    )
    [f] = answers(by, go_on(LONG, 5, length=1, n=1))
    handle.remove()
    prefix = tokenizer.encode(LONG.text(0, 5), add_special_tokens=False)
    want = [*chat.prompt_ids(tokenizer, LONG.prompt), *prefix]
    assert read[: len(want)] == want
    assert len(read) == len(want) + f.usage.written - 1  # the last token it writes is not read


def test_chunks_and_continuations_have_random_numbers_of_their_own() -> None:
    """A teacher that likes all tokens alike, whatever it reads, writes down its random numbers."""
    noise = tiny.loaded(seed=1)
    noise.model.lm_head.weight.zero_()
    first, second = answers(teacher(noise), go_on(LONG, 2, n=4), go_on(LONG, 3, n=4))
    assert len({*first.texts, *second.texts}) == 8
    [other] = answers(teacher(noise), go_on(replace(LONG, seed=8), 2, n=4))
    assert not {*other.texts} & {*first.texts}
    assert answers(teacher(noise), go_on(LONG, 2, n=2))[0].texts == first.texts[:2]


def test_usage_counts_every_request_and_what_it_shared() -> None:
    p = len(LONG.prompt_ids)
    first, second = answers(teacher(), go_on(LONG, 4, n=2), go_on(LONG, 9, n=3))
    # The last token is always read anew, and what is shared is read once, by whoever needs it first.
    assert (first.usage.read, first.usage.cached) == (2 * (p + 4), 2 * (p + 3) - (p + 3))
    assert (second.usage.read, second.usage.cached) == (3 * (p + 9), 3 * (p + 8) - 5)
    [f] = answers(teacher(), go_on(LONG, 4, length=5, n=2))
    lengths = [5 if end == "length" else None for end in f.finishes]
    assert f.usage.written == 10 or None in lengths
    [scored] = answers(teacher(), score(Wants.SAMPLED, LONG, start=2, length=4))
    assert (scored.usage.read, scored.usage.written) == (p + 6, 0)


def test_a_foreign_teacher_offers_text_in_the_students_measure() -> None:
    tokenizer = tiny.byte_level(270)
    by = teacher(tiny.loaded(seed=1, tokenizer=tokenizer))
    assert by.offers is Wants.TEXT
    assert teacher().offers is Wants.FULL
    assert teacher(text_only=True).offers is Wants.TEXT
    length = 7
    mine = answers(by, go_on(LONG, 5, length=length, n=8))[0]
    theirs = answers(by, go_on(LONG, 5, length=round(SLACK * length), n=8, unit="teacher"))[0]
    assert mine.usage.written == theirs.usage.written
    for cut, whole in zip(mine.texts, theirs.texts, strict=True):
        assert cut == chat.cut(STUDENT.tokenizer, whole, length)
        assert len(STUDENT.tokenizer.encode(cut, add_special_tokens=False)) <= length


def test_a_response_of_one_token_can_be_asked_about() -> None:
    one = tiny.rollout(STUDENT, "4")
    scored, written = answers(teacher(), score(Wants.SAMPLED, one), go_on(one, 0, length=1))
    assert scored.sampled is not None
    assert scored.sampled.shape == (1,)
    assert len(written.texts) == 3


# --- another tokenizer ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wants", [Wants.SAMPLED, Wants.TOPK, Wants.FULL])
def test_aligned_to_its_own_tokenizer_a_teacher_scores_as_ever(wants: Wants) -> None:
    asks = [score(wants, r, k=5) for r in (ROLLOUTS[0], LONG, ROLLOUTS[3])]
    for a, b in zip(answers(teacher(), *asks), answers(teacher(align=True), *asks), strict=True):
        assert a.aligned is None
        assert b.aligned is not None
        assert b.aligned.all()
        for name in ("sampled", "topk_ids", "topk_logp", "logp"):
            mine, theirs = getattr(a, name), getattr(b, name)
            assert (mine is None) == (theirs is None)
            if mine is not None:
                np.testing.assert_allclose(theirs, mine, atol=1e-5)


def test_a_foreign_teacher_scores_what_it_can_place() -> None:
    """Its own tokens of the text, read behind its own rendering of the prompt; sampled tokens are known at more places."""
    tokenizer = tiny.byte_level(270)
    by = teacher(tiny.loaded(seed=1, tokenizer=tokenizer), align=True)
    assert by.foreign
    assert by.offers is Wants.FULL
    full, sampled, top = answers(by, *(score(w, LONG, k=4) for w in (Wants.FULL, Wants.SAMPLED, Wants.TOPK)))
    for f in (full, sampled, top):
        assert f.aligned is not None
        assert f.sampled is not None
        assert np.isfinite(f.sampled).all()
        assert f.aligned.shape == f.sampled.shape == (len(LONG.response_ids),)
    assert full.logp is not None
    assert top.topk_logp is not None
    assert 0 < full.aligned.sum() < sampled.aligned.sum()
    np.testing.assert_allclose(np.exp(full.logp[full.aligned]).sum(-1), 1, atol=1e-5)
    np.testing.assert_array_equal(sampled.sampled[full.aligned], full.sampled[full.aligned])
    np.testing.assert_array_equal(top.topk_logp, -np.sort(-full.logp, -1)[:, :4])
    prompt, ids = (tuple(x) for x in (chat.prompt_ids(tokenizer, LONG.prompt), tokenizer.encode(LONG.text())))
    assert full.usage.read == len(prompt) + len(ids)
    logp = tiny.plain_logp(by.loaded.model, prompt, ids, len(tokenizer))
    assert by.aligner is not None
    spans, known = by.aligner.spans(by.aligner.written(LONG), logp[range(len(ids)), list(ids)].numpy())
    alone = sampled.aligned & ~full.aligned
    assert known.numpy()[alone].all()
    np.testing.assert_allclose(sampled.sampled[alone], spans.numpy()[alone], atol=1e-4)
    [part] = answers(by, score(Wants.SAMPLED, LONG, start=3, length=5))
    np.testing.assert_array_equal(part.sampled, sampled.sampled[3:8])
    np.testing.assert_array_equal(part.aligned, sampled.aligned[3:8])
