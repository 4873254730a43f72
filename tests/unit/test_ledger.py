"""The ledger, what answers cost, and what rate limits ask for."""

import json
import re
import subprocess
import sys
import time
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests import tiny
from tests.e2e.small import Command, command

from potstill.errors import BudgetEnded, CheckpointError, ConfigError
from potstill.ledger import Answer, Ledger, Question, Request, connect, rows, summary
from potstill.teachers.asking import DRAWS, address, first_seed, runs
from potstill.teachers.line import Failed, Purse, Reply, asked_to_wait, used_up
from potstill.teachers.prices import Price, read_prices
from potstill.types import Ask, Wants

NOW = datetime(2026, 3, 1, 12, 0, 0, tzinfo=UTC)


def question(key: str = "k", **fields: Any) -> Question:
    given = {"address": "a", "provider": "anthropic", "model": "claude-haiku-4-5", "parameters": {"cut": True}}
    return Question(
        **(given | {"key": key, "messages": [{"role": "user", "content": "naïve?"}], "prefix": "né"} | fields)
    )


def request(**fields: Any) -> Request:
    return Request(provider="anthropic", model="claude-haiku-4-5", **fields)


def test_what_is_kept_is_read_back(tmp_path: Path) -> None:
    scores = {"sampled": np.array([-0.5, -1.25], np.float32), "topk_ids": np.array([[3, 1], [2, 9]])}
    kept = [Answer(draw=0, text="é\n", finish="stop", verdict="accepted"), Answer(draw=2, scores=scores)]
    Ledger(tmp_path / "x", "run").keep(question(), request(), kept)
    found = Ledger(tmp_path / "x", "run").answers("k")
    assert found[0] == kept[0]
    np.testing.assert_array_equal(found[2].scores["sampled"], scores["sampled"])
    np.testing.assert_array_equal(found[2].scores["topk_ids"], scores["topk_ids"])
    assert Ledger(tmp_path / "x", "run").question("k") == question()


def test_an_answer_that_is_there_stays(tmp_path: Path) -> None:
    one, two = Ledger(tmp_path / "x", "one"), Ledger(tmp_path / "x", "two")
    one.keep(question(), request(), [Answer(draw=0, text="first")])
    two.keep(question(), request(), [Answer(draw=0, text="second"), Answer(draw=1, text="new")])
    assert [a.text for a in one.answers("k").values()] == ["first", "new"]


def test_a_request_is_kept_whole_or_not_at_all(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "x", "run")
    with pytest.raises(TypeError):
        ledger.keep(question(), request(), [Answer(draw=0, text="a"), Answer(draw=1, scores={"bad": object()})])  # type: ignore[dict-item]
    assert ledger.answers("k") == {}
    assert ledger.tokens() == {}
    ledger.keep(question(), request(), [Answer(draw=0, text="a")])
    assert len(ledger.answers("k")) == 1


def test_each_run_pays_for_itself(tmp_path: Path) -> None:
    one, two = Ledger(tmp_path / "x", "one"), Ledger(tmp_path / "x", "two")
    one.keep(question(), request(key="k", asker="7/3", read=10, cached=4, written=2), [Answer(draw=0, text="a")])
    one.keep(question(), request(key="k", asker="7/3", read=10, written=2), [Answer(draw=1, text="b")])
    two.spent_on(request(key="k", asker="7/3", error="HTTP 500: oops", tries=3))
    assert one.tokens() == {("anthropic", "claude-haiku-4-5"): (20, 4, 0, 4)}
    assert one.paid("k", "7/3") == (20, 4, 4)
    assert one.paid("k", "8/3") == two.paid("k", "7/3") == (0, 0, 0)
    first, second = summary(tmp_path / "x")
    assert (first["requests"], first["answers"], first["failed"]) == (2, 2, 0)
    assert (second["requests"], second["retried"], second["failed"]) == (1, 2, 1)
    assert second["errors"] == {"HTTP 500: oops": 1}


def test_no_ledger_and_no_such_ledger(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no ledger"):
        connect(tmp_path / "nowhere", new=False)
    (tmp_path / "x").write_text("not a database, but long enough to be taken for one" * 40, encoding="utf-8")
    with pytest.raises(CheckpointError, match="cannot be opened as a ledger"):
        connect(tmp_path / "x")


WRITER = """
import sys
from pathlib import Path
from potstill.ledger import Answer, Ledger, Question, Request
ledger = Ledger(Path(sys.argv[1]), "run")
q = Question(key="k", address="a", provider="p", model="m", parameters={}, messages=(), prefix="")
start = len(ledger.answers("k"))
for draw in range(start, start + 10**6):
    ledger.keep(q, Request(provider="p", model="m", written=1), [Answer(draw=draw, text="x" * 500)])
    print(draw, flush=True)
"""


def test_ten_kills_lose_nothing_that_was_kept(tmp_path: Path) -> None:
    known = 0
    for kill in range(10):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path / "x")], stdout=subprocess.PIPE, text=True
        )
        assert writer.stdout is not None
        seen = int(writer.stdout.readline())
        time.sleep(0.003 * kill)
        writer.kill()
        seen = max([seen, *(int(line) for line in writer.stdout.read().splitlines()[:-1])])
        writer.wait()
        writer.stdout.close()
        ledger = Ledger(tmp_path / "x", "run")
        kept = sorted(ledger.answers("k"))
        assert kept == list(range(len(kept)))
        assert len(kept) > seen >= known
        assert ledger.tokens()["p", "m"][3] == len(kept)
        known = len(kept)
        ledger.close()


def test_the_verb_shows_what_it_cost_and_exports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    potstill: Command = command(capsys)
    ledger = Ledger(tmp_path / "ledger.sqlite", "mine")
    took = request(read=1_000_000, cached=500_000, stored=100_000, written=20_000, tries=2)
    ledger.keep(question(), took, [Answer(draw=0, text="né", finish="stop", verdict="repaired: fence")])
    ended = potstill("ledger", tmp_path, "--export", tmp_path / "out.jsonl")
    assert ended.code == 0, ended.err
    # 400,000 at 1.00, 500,000 at 0.10, 100,000 at 1.25 and 20,000 at 5.00 a million
    assert "0.6750" in ended.out
    assert re.search(r"repaired: fence\W+1\b", ended.out)
    [line] = (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()
    row = json.loads(line)
    assert (row["text"], row["prefix"], row["run"], row["draw"]) == ("né", "né", "mine", 0)
    assert [row] == list(rows(tmp_path / "ledger.sqlite"))
    assert potstill("ledger", tmp_path / "nowhere").code == 2
    mine = tmp_path / "prices.toml"
    mine.write_text('[anthropic]\n"claude" = {read = 2.0, written = 0.0}\n', encoding="utf-8")
    assert "2.0000" in potstill("ledger", tmp_path, "--prices", mine).out


# --- prices and limits -----------------------------------------------------------------------------------------------


def test_the_longest_name_wins_and_the_users_table_first(tmp_path: Path) -> None:
    bundled = read_prices()
    lite, flash = bundled.of("google", "gemini-2.5-flash-lite-001"), bundled.of("google", "gemini-2.5-flash")
    assert lite is not None
    assert flash is not None
    assert lite.read < flash.read
    assert bundled.of("google", "claude-haiku-4-5") is None
    mine = tmp_path / "p.toml"
    mine.write_text('[google]\n"gemini" = {read = 7.0, written = 8.0}\n', encoding="utf-8")
    assert read_prices(mine).of("google", "gemini-2.5-flash-lite") == Price(read=7, written=8)
    assert read_prices(mine).of("anthropic", "claude-haiku-4-5") == bundled.of("anthropic", "claude-haiku-4-5")


@pytest.mark.parametrize(
    ("text", "word"),
    [("[a", "not TOML"), ('[a]\n"b" = {read = -1, written = 1}', "a.b.read"), ('[a]\n"b" = {reed = 1}', "a.b.")],
)
def test_a_bad_price_table_is_refused(text: str, word: str, tmp_path: Path) -> None:
    (tmp_path / "p.toml").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=word):
        read_prices(tmp_path / "p.toml")


def test_a_purse_holds_back_what_is_under_way() -> None:
    purse = Purse((100, 0.0), 200, None, None)
    with purse.holding(30, 30):
        too_much = "160 are spent or under way, and the next request may take 41"
        with pytest.raises(BudgetEnded, match=too_much), purse.holding(40, 1):
            pass
        with purse.holding(40, 0):
            pass
        purse.pay(Reply(read=30, written=10))
    assert purse.tokens == 140


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"Retry-After": "2.5"}, 2.5),
        ({"retry-after": "Sun, 01 Mar 2026 12:00:30 GMT"}, 30),
        ({"retry-after": "Sun, 01 Mar 2026 11:00:00 GMT"}, 0),
        ({"retry-after-ms": "250", "retry-after": "1"}, 0.25),
        ({"retry-after": "soon"}, None),
    ],
)
def test_retry_after(headers: dict[str, str], seconds: float | None) -> None:
    assert asked_to_wait(headers, NOW) == seconds


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"x-ratelimit-remaining-requests": "3", "x-ratelimit-reset-requests": "1m"}, 0),
        ({"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "1m30s"}, 90),
        ({"x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "20ms"}, 0.02),
        (
            {
                "anthropic-ratelimit-requests-remaining": "0",
                "anthropic-ratelimit-requests-reset": "2026-03-01T12:00:12Z",
            },
            12,
        ),
        ({"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "tomorrow"}, 0),
    ],
)
def test_used_up_limits(headers: dict[str, str], seconds: float) -> None:
    assert used_up(headers, NOW) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("status", "again"), [(None, True), (408, True), (409, True), (429, True), (500, True), (529, True), (400, False)]
)
def test_what_is_tried_again(status: int | None, again: bool) -> None:
    assert Failed("x", status).temporary is again
    assert not Failed("x", 429, {"Retry-After": "86400"}).temporary


# --- questions --------------------------------------------------------------------------------------------------------

STUDENT = tiny.tokens(tiny.byte_level(), "student")
LONG = tiny.rollout(STUDENT, "the dog sat on the mat")


def go_on(start: int, **fields: Any) -> Ask:
    given = {"rollout": LONG, "view": LONG.prompt, "wants": Wants.TEXT, "start": start, "length": 4, "n": 2}
    return Ask(**(given | fields))


def test_an_address_names_what_is_asked_and_nothing_else() -> None:
    same = [address(go_on(5)), address(go_on(5, n=9))]
    others = [go_on(6), go_on(5, length=5), go_on(5, unit="teacher"), go_on(5, wants=Wants.SAMPLED)]
    assert same[0] == same[1]
    assert len({same[0], *map(address, others)}) == 5


@given(st.integers(0, 2**40), st.text())
def test_seeds_are_those_that_servers_take(run: int, question: str) -> None:
    assert 0 <= first_seed(run, question) < 2**31 - DRAWS
    assert first_seed(run, question) == first_seed(run, question) != first_seed(run + 1, question)


@given(st.sets(st.integers(0, 30)))
def test_runs_are_the_gapless_parts(draws: set[int]) -> None:
    found = runs(sorted(draws))
    assert [d for run in found for d in run] == sorted(draws)
    assert all(run == list(range(run[0], run[-1] + 1)) for run in found)
    assert all(b[0] > a[-1] + 1 for a, b in pairwise(found))
