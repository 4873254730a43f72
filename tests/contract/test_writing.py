"""Continuations as methods use them, from every kind of teacher: in the student's tokens, and in several rounds."""

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests import servers, tiny
from tests.asks import answers
from tests.servers import Completions, serving

from potstill import chat
from potstill.decode import Decoding
from potstill.ledger import Ledger, summary
from potstill.models import written_ids
from potstill.samplers.asked import AskedSampler
from potstill.teachers.chat import ChatTeacher
from potstill.teachers.hf import HFTeacher, ModelTeacher
from potstill.teachers.http import HTTPTeacher, meet
from potstill.teachers.settings import HTTP, Chat
from potstill.types import Ask, Turn, Wants

STUDENT = tiny.tokens(tiny.byte_level(), "student")
LONG = tiny.rollout(STUDENT, "the dog sat on the mat. What is 12 + 30? It is 42 and done")
TURN = Turn(seed=3, step=2, max_tokens=12)


def served(url: str, at: Path, own: Any, **fields: Any) -> HTTPTeacher:
    how = HTTP(base_url=f"{url}/v1", tokenizer="x", **fields)
    model, shows, key = asyncio.run(meet(how, own, shared=True))
    return HTTPTeacher(how, STUDENT, own, Ledger(at / "ledger.sqlite", "run"), model=model, shows=shows, key=key)


def spoken(url: str, at: Path, monkeypatch: pytest.MonkeyPatch) -> ChatTeacher:
    monkeypatch.setenv("PLANTED_KEY", "sk-planted")
    how = Chat(provider="openai", model="m", base_url=f"{url}/v1", key_env="PLANTED_KEY", continues="instruction")
    return ChatTeacher(how, STUDENT, Ledger(at / "ledger.sqlite", "run"))


@pytest.fixture(params=["hf", "hf foreign", "http", "http foreign", "potstill", "potstill foreign", "chat"])
def by(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A teacher of each kind."""
    foreign = "foreign" in request.param
    loaded = tiny.loaded(seed=1, tokenizer=tiny.byte_fallback() if foreign else None)
    if request.param == "chat":
        pytest.importorskip("openai")
        with serving(servers.openai(lambda _, i: f" cat {i} and more than that")) as server:
            yield spoken(server.url, tmp_path, monkeypatch)
    elif request.param.startswith("http"):
        with serving(Completions(loaded)) as server:
            yield served(server.url, tmp_path, loaded.tokens)
    elif request.param.startswith("potstill"):
        with servers.hidden(loaded) as server:
            yield servers.taught(server.url, loaded.tokens, STUDENT)
    else:
        yield HFTeacher(loaded, STUDENT, decoding=Decoding())


def go_on(start: int, n: int, **fields: Any) -> Ask:
    return Ask(rollout=LONG, view=LONG.prompt, wants=Wants.TEXT, start=start, length=6, n=n, ids=True, **fields)


def test_texts_come_in_the_students_tokens(by: Any):
    for f in answers(by, go_on(0, 3), go_on(9, 3)):
        assert len(f.ids) == 3
        for text, ids, finish in zip(f.texts, f.ids, f.finishes, strict=True):
            assert text.startswith(STUDENT.tokenizer.decode(list(ids), **chat.PLAIN).rstrip(chat.REPLACEMENT))
            assert len(ids) <= 6
            if len(ids) < 6:
                assert (ids[-1:] == STUDENT.eos[:1]) == (finish == "stop")
    [without] = answers(by, replace(go_on(9, 2), ids=False))
    assert without.ids == ()


def test_a_later_round_goes_on_where_the_first_ended(by: Any):
    """Rounds of 2 and 3 are the 5 draws of one question, and cost nothing twice."""
    [first], [second] = answers(by, go_on(9, 2)), answers(by, go_on(9, 3, first=2))
    [whole] = answers(by, go_on(9, 5))
    assert [*first.texts, *second.texts] == list(whole.texts)
    assert [*first.ids, *second.ids] == list(whole.ids)
    if isinstance(by, ModelTeacher):
        assert first.usage.written + second.usage.written == whole.usage.written
    else:
        [row] = summary(by.ledger.path)
        paid = first.usage + second.usage
        assert (row["read"], row["written"]) == (paid.read, paid.written)
        assert row["answers"] == 5


def test_the_student_does_not_draw_what_its_teacher_draws():
    """A teacher with the student's weights, as in the control, would else agree with every alternative."""
    same = HFTeacher(tiny.loaded(seed=1), STUDENT, decoding=Decoding())
    [teachers], [own] = answers(same, go_on(9, 6)), answers(same, go_on(9, 6, of="student"))
    assert set(teachers.texts) != set(own.texts)


def test_tokenizers_that_mark_a_beginning_do_not_mark_a_continuation():
    """Llama 2's kind writes a space before the first word of whatever it encodes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {t: i for i, t in enumerate(["<unk>", "<e>", "▁", "1", "c", "a", "t", "▁c"])}
    backend = Tokenizer(models.BPE(vocabulary, [("▁", "c")], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    marking = tiny.tokens(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<e>", unk_token="<unk>"))
    alone = marking.tokenizer.encode("cat", add_special_tokens=False)
    assert marking.tokenizer.convert_ids_to_tokens(alone) == ["▁c", "a", "t"]
    names = marking.tokenizer.convert_ids_to_tokens(list(written_ids(marking, "cat", "stop")))
    assert names == ["c", "a", "t", "<e>"]
    assert marking.tokenizer.convert_ids_to_tokens(list(written_ids(marking, " cat", "length"))) == ["▁c", "a", "t"]


# --- whole answers ----------------------------------------------------------------------------------------------------


def test_whole_answers_are_rollouts_in_the_students_tokens(by: Any):
    prompts = [tiny.prompt(f"{i}?", id=f"p{i}") for i in range(3)]
    groups = asyncio.run(AskedSampler(by, STUDENT).sample(prompts, 2, TURN))
    assert [[r.prompt.id for r in group] for group in groups] == [["p0"] * 2, ["p1"] * 2, ["p2"] * 2]
    for group in groups:
        assert [r.sample for r in group] == [0, 1]
        assert group[0].usage.written > 0
        assert group[1].usage.written == 0  # the group's cost is on one of them
        for r in group:
            assert (r.author, r.old_logp, r.entropy) == ("teacher", None, None)
            assert len(r.response_ids) <= TURN.max_tokens
            assert (r.finish == "stop") == (r.response_ids[-1:] == STUDENT.eos[:1])
            assert "".join(r.pieces) == r.text()


def test_a_prompt_that_comes_again_is_paid_for_once(tmp_path: Path):
    loaded = tiny.loaded(seed=1)
    with serving(Completions(loaded)) as server:
        sampler = AskedSampler(served(server.url, tmp_path, loaded.tokens), STUDENT)
        sample: Callable[[int], Any] = lambda step: asyncio.run(  # noqa: E731
            sampler.sample([tiny.prompt()], 2, replace(TURN, step=step))
        )
        first, asked = sample(1), len(server.seen)
        again = sample(7)
        assert len(server.seen) == asked
    assert [r.response_ids for r in again[0]] == [r.response_ids for r in first[0]]
    assert again[0][0].usage.written == 0
