"""Chat models through the providers' own SDKs, against local servers that speak their protocols and misbehave."""

import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests import servers, tiny
from tests.asks import answers
from tests.servers import Said, Server, Speaker, serving

from potstill.errors import BudgetEnded, ConfigError, TeacherError
from potstill.ledger import Ledger, rows, summary
from potstill.teachers.chat import INSTRUCTION, ChatTeacher
from potstill.teachers.continuation import END, clean
from potstill.teachers.prices import read_prices
from potstill.teachers.settings import Chat
from potstill.types import Ask, Rollout, Wants

for needed in ("anthropic", "openai", "google.genai"):
    pytest.importorskip(needed)

STUDENT = tiny.tokens(tiny.byte_level(), "student")
LONG = tiny.rollout(STUDENT, "the dog sat on the mat. What is 12 + 30? It is 42 and done")
SECRET = "sk-planted-0123456789abcdef"
SPEAK: dict[str, Callable[..., servers.Responder]] = {
    "anthropic": servers.anthropic,
    "openai": servers.openai,
    "google": servers.gemini,
}


@pytest.fixture(autouse=True)
def _keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ANTHROPIC_API_KEY", "OPENAI_API_KEY", "GEMINI_API_KEY", "GOOGLE_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PLANTED_KEY", SECRET)


def teacher(server: Server, at: Path, provider: str, run: str = "run", **fields: Any) -> ChatTeacher:
    url = server.url + ("/v1" if provider == "openai" else "")
    given = {
        "provider": provider,
        "model": f"{provider}-model",
        "base_url": url,
        "key_env": "PLANTED_KEY",
        "retries": 2,
    }
    how = Chat(**(given | fields))
    price = read_prices(how.prices).of(how.provider, how.model)
    return ChatTeacher(how, STUDENT, Ledger(at / "ledger.sqlite", run), price=price)


def go_on(r: Rollout, start: int, length: int = 8, n: int = 3, **fields: Any) -> Ask:
    return Ask(rollout=r, view=r.prompt, wants=Wants.TEXT, start=start, length=length, n=n, **fields)


def numbered(messages: list[dict[str, str]], i: int) -> str:
    """Distinct short answers."""
    return f" cat {i}"


# --- the three providers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("provider", SPEAK)
def test_n_answers_from_every_provider(provider: str, tmp_path: Path) -> None:
    with serving(SPEAK[provider](numbered)) as server:
        by = teacher(server, tmp_path, provider)
        first, second = answers(by, go_on(LONG, 0), go_on(LONG, 9, n=4))
    assert sorted(first.texts) == [f" cat {i}" for i in range(3)]
    assert sorted(second.texts) == [f" cat {i}" for i in range(4)]
    assert by.offers is Wants.TEXT
    assert second.usage.written > 0
    assert by.notes["accepted"] == 7


def test_claude_is_prefilled_and_its_prompt_cached(tmp_path: Path) -> None:
    with serving(servers.anthropic(numbered)) as server:
        [f] = answers(teacher(server, tmp_path, "anthropic"), go_on(LONG, 9, n=2))
        body = server.seen[-1].body
        assert len(server.seen) == 3, "one trial of prefill, and two draws"
        answers(teacher(server, tmp_path, "anthropic"), go_on(LONG, 12, n=1))
        assert len(server.seen) == 4, "the ledger remembers the trial"
    assert [m["role"] for m in body["messages"]] == ["user", "assistant"]
    assert body["messages"][1]["content"][0]["text"] == LONG.text(0, 9).rstrip()
    assert all("cache_control" in m["content"][-1] for m in body["messages"])
    assert body["thinking"] == {"type": "disabled"}
    assert not {"temperature", "top_p"} & set(body)
    assert (f.usage.read, f.usage.cached, f.usage.written) == (2 * (10 + 3 + 2), 6, 10)


def test_a_claude_that_takes_no_prefill_is_told(tmp_path: Path) -> None:
    with serving(servers.anthropic(numbered, prefill=False)) as server:
        answers(teacher(server, tmp_path, "anthropic"), go_on(LONG, 9, n=1))
        body = server.seen[-1].body
    said = [m["content"][0]["text"] for m in body["messages"]]
    assert said == [LONG.prompt.messages[0]["content"], LONG.text(0, 9), INSTRUCTION.format(tail=LONG.text(0, 9))]


def test_thinking_that_cannot_be_switched_off_is_a_decision_of_the_user(tmp_path: Path) -> None:
    with serving(servers.anthropic(numbered, thinking=True)) as server:
        with pytest.raises(TeacherError, match=r"does not let thinking be switched off.*thinking_tokens = 2048"):
            answers(teacher(server, tmp_path, "anthropic"), go_on(LONG, 9, n=1))
        by = teacher(server, tmp_path, "anthropic", thinking_tokens=500)
        assert answers(by, go_on(LONG, 9, n=1))[0].texts == (" cat 0",)
        assert server.seen[-1].body["max_tokens"] > 500


def test_openai_leaves_out_what_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(servers.openai(numbered)) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", f"{server.url}/v1")
        by = teacher(server, tmp_path, "openai", base_url=None)
        assert len(answers(by, go_on(LONG, 9))[0].texts) == 3
        first = len(server.seen)
        assert by.features.refused == {"prompt_cache_key", "reasoning_effort"}
        answers(by, go_on(LONG, 12))
        assert len(server.seen) == first + 1
    assert "temperature" not in server.seen[-1].body


def test_a_compatible_server_without_n_is_asked_n_times(tmp_path: Path) -> None:
    with serving(servers.openai(numbered, most=1, knows=("chat_template_kwargs",))) as server:
        by = teacher(server, tmp_path, "openai", temperature=0.7)
        assert sorted(answers(by, go_on(LONG, 9, n=5))[0].texts) == [f" cat {i}" for i in range(5)]
        assert [s.body.get("n") for s in server.seen] == [5, None, None, None, None]
        body = server.seen[-1].body
    assert (body["temperature"], body["top_p"]) == (0.7, 1.0)
    assert body["chat_template_kwargs"] == {"enable_thinking": False}


def test_gemini_gets_at_most_eight_candidates(tmp_path: Path) -> None:
    with serving(servers.gemini(numbered)) as server:
        assert len(answers(teacher(server, tmp_path, "google"), go_on(LONG, 9, n=11))[0].texts) == 11
        counts = [s.body["generationConfig"].get("candidateCount", 1) for s in server.seen]
        assert sorted(counts) == [3, 8]
        roles = [c["role"] for c in server.seen[0].body["contents"]]
    assert roles == ["user", "model", "user"]


# --- continuations that are none -----------------------------------------------------------------------------------

PREFIX = LONG.text(0, 20)
REST = LONG.text(20)
SINS: dict[str, tuple[str, str]] = {
    "refusal in words": ("I'm sorry, but I can't help with that.", "rejected: refusal"),
    "refusal by the API": ("REFUSED", "rejected: refusal"),
    "echo of the prefix": (PREFIX, "rejected: echo"),
    "echo of the question": ("What is 12 + 30?", "rejected: echo"),
    "restart": (PREFIX[:-6], "rejected: restart"),
    "restart in other words": (PREFIX.replace("sat", "sits") + " so", "rejected: restart"),
    "nothing": ("", "rejected: empty"),
    "thought without end": ("<think>well, the dog", "rejected: thinking"),
    "whole answer": (PREFIX + REST, "repaired: echo"),
    "code fence": (f"```text\n{REST}\n```", "repaired: fence"),
    "preamble": (f"Sure, here is the continuation:\n\n{REST}", "repaired: preamble"),
    "preamble and fence": (f"Here's the rest of it:\n```\n{REST}\n```", "repaired: preamble, fence"),
    "quotes": (f'"{REST.strip()}"', "repaired: quotes"),
    "bold": (f"**{REST.strip()}**", "repaired: markdown"),
    "tags": (f"<continuation>{REST}</continuation>", "repaired: tags"),
    "thoughts": (f"<think>well, the dog</think>{REST}", "repaired: thinking"),
    "none of these": (REST, "accepted"),
}


@pytest.mark.parametrize("sin", SINS)
@pytest.mark.parametrize("provider", SPEAK)
def test_what_is_no_continuation_is_repaired_or_replaced(sin: str, provider: str, tmp_path: Path) -> None:
    """The first draw misbehaves; whatever it was, n usable texts come, and it is counted."""
    text, verdict = SINS[sin]

    def speak(messages: list[dict[str, str]], i: int) -> str:
        return text if i == 0 else REST

    with serving(SPEAK[provider](speak)) as server:
        by = teacher(server, tmp_path, provider, continues="instruction")
        [f] = answers(by, go_on(LONG, 20, n=2))
    want = LONG.text(20, 8).strip()
    assert [t.strip()[: len(want) - 4] for t in f.texts] == [want[:-4]] * 2
    assert by.notes[verdict] >= 1, by.notes
    [row] = summary(tmp_path / "ledger.sqlite")
    assert row["verdicts"][verdict] >= 1
    assert row["answers"] == sum(row["verdicts"].values()) == 2 + verdict.startswith("rejected")


def test_a_teacher_that_always_refuses_ends_the_run_with_a_reason(tmp_path: Path) -> None:
    with serving(servers.openai(lambda m, i: "I cannot assist with that request.")) as server:
        by = teacher(server, tmp_path, "openai")
        with pytest.raises(TeacherError, match=r"left 2 of 2 questions.*rejected: refusal.*--export"):
            answers(by, go_on(LONG, 9, n=2), go_on(LONG, 12, n=2))
        paid = len(server.answered)
        with pytest.raises(TeacherError):
            answers(teacher(server, tmp_path, "openai"), go_on(LONG, 9, n=2))
        assert len(server.answered) == paid, "a refusal is an answer, too, and is not bought again"


def test_a_few_questions_may_go_unanswered(tmp_path: Path) -> None:
    def speak(messages: list[dict[str, str]], i: int) -> str:
        return "I cannot assist with that." if LONG.text(0, 9) == messages[1]["content"] else " cat"

    asks = [go_on(LONG, start, n=1) for start in (5, 7, 9, 11)]
    with serving(servers.openai(speak)) as server:
        by = teacher(server, tmp_path, "openai", max_unanswered=0.25)
        got = answers(by, *asks)
    assert [f.ask.start for f in got] == [5, 7, 11]
    assert by.notes["unanswered"] == 1


def test_a_prefix_that_ends_in_white_space(tmp_path: Path) -> None:
    r = tiny.rollout(STUDENT, "the cat \n sat on")
    start = next(i for i in range(len(r.pieces)) if r.text(0, i).endswith("\n"))
    with serving(servers.anthropic(lambda m, i: " \n sat")) as server:
        [f] = answers(teacher(server, tmp_path, "anthropic"), go_on(r, start, n=1))
        assert server.seen[-1].body["messages"][1]["content"][0]["text"] == "the cat"
    assert f.texts == (" sat",)


@given(st.text(max_size=60), st.text(max_size=60), st.booleans(), st.booleans())
def test_cleaning_never_invents(text: str, prefix: str, told: bool, ended: bool) -> None:
    judged = clean(text, prefix, told=told, ended=ended)
    assert (judged.text is None) == judged.verdict.startswith("rejected")
    if judged.text is not None:
        assert judged.text in text


@pytest.mark.parametrize(
    ("prefix", "text"),
    [
        ("Here is some code:\n", "```python\nx = 1\n```"),
        ("```python\nx = 1\n", "y = 2\n```\nThat is all."),
        ("1, 1, 1,", " 1, 1, 2, 3"),
        ("He said ", '"no" and then "yes"'),
        ("The result is **", "bold** indeed"),
        ("So the answer is", " 42."),
        ("Let me see. ", "Sure enough, it is 4."),
    ],
)
def test_good_continuations_are_left_alone(prefix: str, text: str) -> None:
    assert clean(text, prefix, told=True, ended=True).text == text


def test_the_end_may_come_where_the_student_stopped() -> None:
    assert clean(END, "It is 42.", told=True, ended=True).text == ""
    assert clean("", "It is 42.", told=False, ended=True).text == ""
    assert clean("", "It is 42.", told=True, ended=True).text is None


# --- boundaries ----------------------------------------------------------------------------------------------------


def test_prefixes_and_continuations_end_between_characters(tmp_path: Path) -> None:
    r = tiny.rollout(STUDENT, "naïve café — 你好 🙂🙃 done")
    with serving(servers.openai(lambda m, i: "🙂🙃你好 — café naïve")) as server:
        asks = [go_on(r, start, length, n=1) for start in range(len(r.response_ids)) for length in (1, 3)]
        got = answers(teacher(server, tmp_path, "openai"), *asks)
        prefixes = [m["content"] for s in server.seen for m in s.body["messages"] if m["role"] == "assistant"]
    whole = "naïve café — 你好 🙂🙃 done"
    assert all(whole.startswith(p) for p in prefixes)
    for f in got:
        assert "🙂🙃你好 — café naïve".startswith(f.texts[0])
        assert f.ask.length is not None
        assert len(STUDENT.tokenizer.encode(f.texts[0], add_special_tokens=False)) <= f.ask.length


# --- money and secrets -----------------------------------------------------------------------------------------------


def test_the_run_stops_within_its_money(tmp_path: Path) -> None:
    table = tmp_path / "prices.toml"
    table.write_text('[openai]\n"openai-mod" = { read = 1000.0, cached = 0.0, written = 100000.0 }\n', encoding="utf-8")
    one = (16 * 1000 + 4 * 0 + 5 * 100_000) / 1e6
    with serving(servers.openai(numbered)) as server:
        by = teacher(server, tmp_path, "openai", prices=table, max_cost=5 * one, in_flight=1)
        with pytest.raises(BudgetEnded, match=r"max_cost = 2.58 is used up"):
            answers(by, *(go_on(LONG, start, n=1) for start in range(8)))
    [row] = summary(tmp_path / "ledger.sqlite")
    price = read_prices(table).of("openai", "openai-model")
    assert price is not None
    spent = price.cost(row["read"], row["cached"], row["stored"], row["written"])
    assert 0 < spent <= 5 * one
    assert spent == pytest.approx(len(server.answered) * one)


@pytest.mark.parametrize("provider", SPEAK)
def test_a_server_that_is_busy_is_asked_again_and_paid_once(provider: str, tmp_path: Path) -> None:
    faults = [Said({"error": {"message": "busy"}}, status, {"Retry-After": "0"}) for status in (429, 503, 500)]
    faults += [Said({"id": "x" * 50}, cut=True), Said(b"<html>"), Said(b'{"id": "\xff\xfe"}')]
    respond = servers.flaky(SPEAK[provider](numbered), lambda i: faults[i // 2] if i % 2 == 0 and i < 12 else None)
    with serving(respond) as server:
        by = teacher(server, tmp_path, provider, continues="instruction", retries=6)
        got = answers(by, *(go_on(LONG, start, n=1) for start in range(6)))
    assert len(got) == 6
    [row] = summary(tmp_path / "ledger.sqlite")
    assert (row["requests"], row["answers"], row["failed"]) == (6, 6, 0)
    assert row["retried"] == 6


@pytest.mark.parametrize("provider", SPEAK)
def test_a_body_that_does_not_come_is_not_waited_for_without_end(provider: str, tmp_path: Path) -> None:
    slow = Said({"id": "x" * 50}, pause=6)
    respond = servers.flaky(SPEAK[provider](numbered), lambda i: slow if i == 0 else None)
    with serving(respond) as server:
        by = teacher(server, tmp_path, provider, continues="instruction", timeout=3)
        assert answers(by, go_on(LONG, 9, n=1))[0].texts == (" cat 0",)
    [row] = summary(tmp_path / "ledger.sqlite")
    assert (row["requests"], row["retried"], row["answers"]) == (1, 1, 1)


def test_more_answers_than_asked_for_are_left_out(tmp_path: Path) -> None:
    """And those that come twice under one number are taken for two."""
    once = servers.openai(numbered)

    def twice(seen: servers.Seen) -> Said:
        said = once(seen)
        if isinstance(said.body, dict) and "choices" in said.body:
            said.body["choices"] = [choice for choice in said.body["choices"] for _ in range(2)]
        return said

    with serving(twice) as server:
        [f] = answers(teacher(server, tmp_path, "openai"), go_on(LONG, 9, n=3))
        assert len([s for s in server.answered if s.body.get("n") == 3]) == 1
    assert len(f.texts) == 3
    [row] = summary(tmp_path / "ledger.sqlite")
    assert row["answers"] == 3


def test_a_field_that_is_refused_as_unprocessable_is_left_out(tmp_path: Path) -> None:
    """As `transformers serve` and other FastAPI servers refuse what they do not know."""
    usual = servers.openai(numbered)

    def strict(seen: servers.Seen) -> Said:
        said = usual(seen)
        if said.status != 400:
            return said
        assert isinstance(said.body, dict)
        return Said({"detail": said.body["error"]["message"]}, 422)

    with serving(strict) as server:
        by = teacher(server, tmp_path, "openai")
        assert len(answers(by, go_on(LONG, 9, n=2))[0].texts) == 2
        assert by.features.refused == {"chat_template_kwargs"}


@pytest.mark.parametrize("provider", SPEAK)
def test_the_key_goes_to_the_server_and_nowhere_else(
    provider: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """A server that repeats the key in its answers and in its errors."""
    caplog.set_level(logging.DEBUG)
    speaker: Speaker = lambda m, i: f" your key is {SECRET}"  # noqa: E731
    refusing = servers.flaky(
        SPEAK[provider](speaker),
        lambda i: Said({"error": {"message": f"no such key: {SECRET}", "code": 403}}, 403) if i > 1 else None,
    )
    with serving(refusing) as server:
        by = teacher(server, tmp_path, provider, continues="instruction")
        [f] = answers(by, go_on(LONG, 0, n=1))
        with pytest.raises(TeacherError) as caught:
            answers(by, *(go_on(LONG, start, n=1) for start in (9, 10)))
        assert any(SECRET in value for value in server.seen[0].headers.values())
    exported = json.dumps(list(rows(tmp_path / "ledger.sqlite")))
    everything = [
        str(caught.value),
        repr(caught.value),
        repr(by.key),
        repr(f),
        exported,
        caplog.text,
        *capfd.readouterr(),
    ]
    everything += [by.settings.model_dump_json(), str(vars(by))]
    assert not [text for text in everything if SECRET in text]
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and SECRET.encode() in p.read_bytes()]
    assert re.search(r"HTTP 403: .*no such key: \[key\]", str(caught.value))


def test_a_missing_key_is_said_before_anything_else(tmp_path: Path) -> None:
    how = Chat(provider="anthropic", model="m")
    with pytest.raises(ConfigError, match=r"needs an API key, but ANTHROPIC_API_KEY is not set.*key_file"):
        ChatTeacher(how, STUDENT, Ledger(tmp_path / "l", "run"))
    file = tmp_path / "key"
    file.write_text(f"{SECRET}\n", encoding="utf-8")
    by = ChatTeacher(Chat(provider="anthropic", model="m", key_file=file), STUDENT, Ledger(tmp_path / "l", "run"))
    assert by.key.reveal() == SECRET
