"""A teacher behind the completions of a server: the same scores and texts as the model itself, paid for once."""

import asyncio
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests import servers, tiny
from tests.asks import answers, go_on, score
from tests.e2e.small import parsed
from tests.servers import Completions, Said, Server, serving

from potstill import chat
from potstill.decode import Decoding
from potstill.errors import BudgetEnded, ConfigError, ModelError, TeacherError
from potstill.ledger import Ledger, summary
from potstill.loop import train
from potstill.models import Loaded, load
from potstill.teachers.asking import first_seed
from potstill.teachers.hf import HFTeacher
from potstill.teachers.http import HTTPTeacher, meet
from potstill.teachers.replay import ReplayTeacher
from potstill.teachers.settings import HTTP, Replay
from potstill.types import Wants

STUDENT = tiny.tokens(tiny.byte_level(), "student")
LONG = tiny.rollout(STUDENT, "the dog sat on the mat. What is 12 + 30? It is 42 and done")
OTHERS = [
    tiny.rollout(STUDENT, "the cat sat on the mats", ask=tiny.prompt(f"Why {i}?", id=f"p{i}"), seed=i) for i in range(4)
]


def settings(*urls: str, **fields: Any) -> HTTP:
    given = {"kind": "http", "base_url": tuple(f"{u}/v1" for u in urls), "tokenizer": "unused", "retries": 2, **fields}
    return HTTP(**given)


def teacher(how: HTTP, at: Path, loaded: Loaded | None = None, run: str = "run") -> HTTPTeacher:
    own = (loaded or tiny.loaded(seed=1)).tokens
    shared = how.align or own.tokenizer is STUDENT.tokenizer
    model, shows, key = asyncio.run(meet(how, own, shared))
    return HTTPTeacher(how, STUDENT, own, Ledger(at / "ledger.sqlite", run), model=model, shows=shows, key=key)


def local(loaded: Loaded | None = None, **decoding: Any) -> HFTeacher:
    return HFTeacher(loaded or tiny.loaded(seed=1), STUDENT, decoding=Decoding(**decoding))


# --- the same as the model itself --------------------------------------------------------------------------------


def test_scores_are_those_of_the_model(tmp_path: Path) -> None:
    with serving(Completions(tiny.loaded(seed=1))) as server:
        by = teacher(settings(server.url), tmp_path)
        assert by.offers is Wants.TOPK
        asks = [
            score(Wants.TOPK, LONG, k=5),
            score(Wants.SAMPLED, OTHERS[0]),
            score(Wants.SAMPLED, LONG, start=4, length=3),
        ]
        for mine, want in zip(answers(by, *asks), answers(local(), *asks), strict=True):
            assert mine.ask is want.ask
            np.testing.assert_allclose(mine.sampled, want.sampled, atol=1e-5)
            if want.topk_logp is not None:
                np.testing.assert_array_equal(mine.topk_ids, want.topk_ids)
                np.testing.assert_allclose(mine.topk_logp, want.topk_logp, atol=1e-5)


def test_a_server_that_only_echoes_scores_sampled_tokens(tmp_path: Path) -> None:
    with serving(Completions(tiny.loaded(seed=1), "echo")) as server:
        by = teacher(settings(server.url), tmp_path)
        assert by.offers is Wants.SAMPLED
        [mine], [want] = answers(by, score(Wants.SAMPLED, LONG)), answers(local(), score(Wants.SAMPLED, LONG))
        np.testing.assert_allclose(mine.sampled, want.sampled, atol=1e-5)


@pytest.mark.parametrize("shows", ["vllm", "echo"])
def test_a_foreign_server_scores_the_spans_that_both_cut(shows: str, tmp_path: Path) -> None:
    """Kept as the student's own scores, so that a replay needs no tokenizer of the teacher's."""
    loaded = tiny.loaded(seed=1, tokenizer=tiny.byte_level(270))
    ended = replace(
        LONG, response_ids=(*LONG.response_ids, STUDENT.eos[0]), pieces=(*LONG.pieces, ""), old_logp=None, entropy=None
    )
    asks = [score(Wants.SAMPLED, LONG), score(Wants.SAMPLED, ended), score(Wants.SAMPLED, LONG, start=2, length=4)]
    with serving(Completions(loaded, shows)) as server:
        by = teacher(settings(server.url, align=True), tmp_path, loaded)
        assert by.offers is Wants.SAMPLED
        got = answers(by, *asks)
    tokenizer, own = loaded.tokens.tokenizer, by.aligner
    assert own is not None
    for f in got:
        ends = len(f.ask.rollout.response_ids) - len(LONG.pieces)
        ids = (*own.written(f.ask.rollout).theirs, *loaded.tokens.eos[:ends])
        logp = tiny.plain_logp(loaded.model, chat.prompt_ids(tokenizer, LONG.prompt), ids, len(tokenizer))
        want, known = own.spans(own.written(f.ask.rollout), logp[range(len(ids)), list(ids)].numpy())
        mine = slice(f.ask.start, None if f.ask.length is None else f.ask.start + f.ask.length)
        np.testing.assert_array_equal(f.aligned, known[mine])
        np.testing.assert_allclose(f.sampled, want[mine], atol=1e-4)
    assert got[1].aligned is not None
    assert got[1].aligned[-1]
    again = ReplayTeacher(Replay(ledger=tmp_path / "ledger.sqlite"), STUDENT)
    for mine, theirs in zip(answers(again, *asks), got, strict=True):
        np.testing.assert_array_equal(mine.sampled, theirs.sampled)
        np.testing.assert_array_equal(mine.aligned, theirs.aligned)


def test_a_server_that_shows_nothing_offers_text(tmp_path: Path) -> None:
    with serving(Completions(tiny.loaded(seed=1), "text")) as server:
        assert teacher(settings(server.url), tmp_path).offers is Wants.TEXT
        assert teacher(settings(server.url, offers="sampled"), tmp_path).offers is Wants.SAMPLED  # declared, not tried


@pytest.mark.parametrize("foreign", [False, True])
def test_greedy_texts_are_those_of_the_model(foreign: bool, tmp_path: Path) -> None:
    loaded = tiny.loaded(seed=1, tokenizer=tiny.byte_level(270)) if foreign else tiny.loaded(seed=1)
    asks = [go_on(LONG, start, n=1) for start in (0, 4, 13)]
    with serving(Completions(loaded)) as server:
        by = teacher(settings(server.url, temperature=0.0), tmp_path, loaded)
        assert by.foreign == foreign
        got = answers(by, *asks)
    for mine, want in zip(got, answers(local(loaded, temperature=0.0), *asks), strict=True):
        assert [t.rstrip(chat.REPLACEMENT) for t in want.texts] == list(mine.texts)


def test_the_teacher_reads_prompt_and_prefix_as_ids_and_nothing_else(tmp_path: Path) -> None:
    with serving(Completions(tiny.loaded(seed=1))) as server:
        [f] = answers(teacher(settings(server.url), tmp_path), go_on(LONG, 5, length=4, n=2))
        body = server.seen[-1].body
    assert body["prompt"] == [*LONG.prompt_ids, *LONG.response_ids[:5]]
    assert (body["max_tokens"], body["n"]) == (4, 2)
    assert (body["top_k"], body["min_p"], body["repetition_penalty"]) == (-1, 0, 1)
    assert f.usage.read == len(body["prompt"])


def test_no_two_questions_share_a_seed(tmp_path: Path) -> None:
    """A server that counts child seeds on: n seeds from each request's own, none of them twice."""
    with serving(Completions(tiny.loaded(seed=1))) as server:
        by = teacher(settings(server.url), tmp_path)
        answers(by, *(go_on(LONG, start, n=3, length=2) for start in (3, 4, 5, 9)))
        seeds = [s.body["seed"] + i for s in server.seen if "seed" in s.body for i in range(s.body["n"])]
    assert len(seeds) == len(set(seeds)) == 12
    assert len({first_seed(run, question) for run in (0, 1) for question in "ab"}) == 4


def test_a_trajectory_goes_to_one_server_in_ascending_order(tmp_path: Path) -> None:
    respond = Completions(tiny.loaded(seed=1))
    rollouts = [LONG, *OTHERS]
    with serving(respond) as one, serving(respond) as two:
        asks = [go_on(r, start, length=1, n=1) for start in (5, 2, 4) for r in rollouts]
        assert [f.ask for f in answers(teacher(settings(one.url, two.url), tmp_path), *asks)] == asks
        asked = [[s.body["prompt"] for s in server.seen if "seed" in s.body] for server in (one, two)]
    homes = []
    for r in rollouts:
        wanted = [[*r.prompt_ids, *r.response_ids[:start]] for start in (2, 4, 5)]
        by_server = [[p for p in prompts if p in wanted] for prompts in asked]
        homes.append(next(i for i, prompts in enumerate(by_server) if prompts == wanted))
        assert by_server[1 - homes[-1]] == []
    assert set(homes) == {0, 1}


# --- money --------------------------------------------------------------------------------------------------------


def paid(server: Server) -> Counter[str]:
    """How often each answered question was put, by what it said."""
    keys = ("prompt", "seed", "n")
    return Counter(repr([s.body.get(k) for k in keys]) for s in server.answered if "seed" in s.body)


ASKS = [go_on(r, start, length=3, n=2) for r in [LONG, *OTHERS] for start in (2, 6)]


def test_nothing_is_asked_twice_by_a_repeated_run_or_a_second_one(tmp_path: Path) -> None:
    with serving(Completions(tiny.loaded(seed=1))) as server:
        first = answers(teacher(settings(server.url), tmp_path), *ASKS)
        before = len(server.seen)
        again = answers(teacher(settings(server.url), tmp_path), *ASKS)
        other = answers(teacher(settings(server.url), tmp_path, run="other"), *ASKS)
        assert not [s for s in server.seen[before:] if "seed" in s.body]
    assert [f.texts for f in first] == [f.texts for f in again] == [f.texts for f in other]
    assert [f.usage for f in first] == [f.usage for f in again], "a resumed step counts what it cost"
    assert sum(f.usage.written for f in other) == 0, "another run did not pay"


def test_one_prefix_is_paid_for_once_however_many_come_to_it(tmp_path: Path) -> None:
    twins = [replace(LONG, sample=i, seed=i) for i in range(3)]
    with serving(Completions(tiny.loaded(seed=1))) as server:
        got = answers(teacher(settings(server.url), tmp_path), *(go_on(r, 4) for r in twins))
        assert sum(paid(server).values()) == 1
    assert len({f.texts for f in got}) == 1
    assert sorted(f.usage.written > 0 for f in got) == [False, False, True]


def test_a_server_that_dies_in_the_middle_costs_nothing_twice(tmp_path: Path) -> None:
    """It answers seven requests, then breaks every connection; a second one takes over."""
    model, alive = Completions(tiny.loaded(seed=1)), threading.Semaphore(7)

    def dying(seen: servers.Seen) -> Said:
        if "seed" in seen.body and not alive.acquire(blocking=False):
            return Said(b"x" * 100, cut=True)
        return model(seen)

    with serving(dying) as server:
        with pytest.raises(TeacherError, match=r"gave no answer after 1 try.*--resume"):
            answers(teacher(settings(server.url, retries=0, in_flight=2), tmp_path), *ASKS)
        first = paid(server)
    with serving(model) as server:
        got = answers(teacher(settings(server.url), tmp_path), *ASKS)
        second = paid(server)
    assert len(first) == 7
    assert max((first + second).values()) == 1
    assert sum((first + second).values()) == len(ASKS)
    assert [len(f.texts) for f in got] == [2] * len(ASKS)
    with serving(model) as server:
        undisturbed = answers(teacher(settings(server.url), tmp_path / ".."), *ASKS)
    assert [(f.texts, f.usage) for f in got] == [(f.texts, f.usage) for f in undisturbed]


def test_faults_are_waited_out(tmp_path: Path) -> None:
    """Every third request fails, in every way there is; each question ends with exactly its answers, each paid once."""
    kinds = [
        Said({"error": "slow down"}, 429, {"Retry-After": "0.05"}),
        Said({"error": "oops"}, 500),
        Said({"choices": []}),
        Said(b"<html>gateway</html>"),
        Said(b'{"choices": [{"text": "\xff\xfe'),
        Said({"id": "x" * 50}, cut=True),
        Said({"error": "later"}, 503, {"Retry-After": "0"}),
    ]
    respond = servers.flaky(
        Completions(tiny.loaded(seed=1)), lambda i: kinds[i // 3 % len(kinds)] if i > 3 and i % 3 == 0 else None
    )
    with serving(respond) as server:
        by = teacher(settings(server.url, retries=6, in_flight=8), tmp_path)
        got = answers(by, *(go_on(r, s, length=2, n=2) for r in [LONG, *OTHERS] for s in range(0, 12, 2)))
        assert [len(f.texts) for f in got] == [2] * 30
        good = Counter(repr(s.body["prompt"]) for s in server.answered if "seed" in s.body)
    [row] = summary(tmp_path / "ledger.sqlite")
    assert row["answers"] == 2 * row["requests"]
    assert (row["failed"], row["retried"] > 5) == (0, True)
    assert len(good) == row["requests"]


def test_retry_after_holds_everybody_back(tmp_path: Path) -> None:
    model, at = Completions(tiny.loaded(seed=1)), list[float]()

    def respond(seen: servers.Seen) -> Said:
        if "seed" in seen.body:
            at.append(time.monotonic())
            if len(at) == 1:
                return Said({"error": "rate limit"}, 429, {"Retry-After": "1"})
        return model(seen)

    with serving(respond) as server:
        answers(teacher(settings(server.url, in_flight=1), tmp_path), *ASKS[:4])
    assert len(at) == 5
    assert at[1] - at[0] >= 0.99


def test_fewer_answers_than_asked_for_are_asked_for_again(tmp_path: Path) -> None:
    with serving(Completions(tiny.loaded(seed=1), most=2)) as server:
        [f] = answers(teacher(settings(server.url), tmp_path), go_on(LONG, 4, n=5))
        asked = [(s.body["n"], s.body["seed"]) for s in server.seen if "seed" in s.body]
    base = asked[0][1]
    assert len(f.texts) == 5
    assert asked == [(5, base), (3, base + 2), (1, base + 4)]


def test_a_server_with_few_slots_gets_as_many_samples_as_it_takes(tmp_path: Path) -> None:
    """llama.cpp refuses n beyond its slots, and counts the tokens of one choice whatever n is."""
    model = Completions(tiny.loaded(seed=1))

    def slots(seen: servers.Seen) -> Said:
        n = seen.body.get("n", 1)
        if n > 4:
            return Said({"error": {"message": f"Field 'n': Value must be between 1 <= value <= 4, but got {n}"}}, 400)
        said = model(seen)
        if isinstance(said.body, dict) and "usage" in said.body:
            said.body["usage"]["completion_tokens"] //= n
        return said

    with serving(slots) as server:
        by = teacher(settings(server.url), tmp_path)
        first, second = answers(by, go_on(LONG, 4, n=10, length=2)), answers(by, go_on(LONG, 6, n=10, length=2))
        asked = [(s.body["n"], s.body["seed"]) for s in server.answered if "seed" in s.body]
        assert [len(f.texts) for f in [*first, *second]] == [10, 10]
        assert len(server.seen) - len(server.answered) == 1, "it is told once"
    assert sorted(n for n, _ in asked) == [2, 2, 4, 4, 4, 4]
    seeds = [seed + i for n, seed in asked for i in range(n)]
    assert len(set(seeds)) == len(seeds) == 20
    ended = sum(finish == "stop" for finish in first[0].finishes)
    assert first[0].usage.written >= 2 * (10 - ended)


def test_a_server_is_kept_busy_but_not_flooded(tmp_path: Path) -> None:
    """It answers only once eight requests are there, and never has more."""
    eight = threading.Barrier(8, timeout=60)

    def together(seen: servers.Seen) -> Said:
        eight.wait()
        return Said({"choices": [{"text": "x", "finish_reason": "length"}]})

    many = [tiny.rollout(STUDENT, "cat", ask=tiny.prompt(f"{i}?", id=f"p{i}"), seed=i) for i in range(24)]
    with serving(together) as server:
        by = teacher(settings(server.url, in_flight=8, model="x", offers="text", retries=0), tmp_path)
        assert len(answers(by, *(go_on(r, 1, n=1) for r in many))) == 24
        assert server.most_at_once == 8


def test_the_run_stops_within_its_tokens(tmp_path: Path) -> None:
    with serving(Completions(tiny.loaded(seed=1))) as server:
        by = teacher(settings(server.url, max_teacher_tokens=150, in_flight=1), tmp_path)
        with pytest.raises(BudgetEnded, match=r"max_teacher_tokens = 150 is used up") as caught:
            answers(by, *ASKS)
        said = caught.value.said
        assert 0 < len(said) < len(ASKS)
        spent = sum(f.usage.read + f.usage.written for f in said)
        assert spent <= 150
        with pytest.raises(BudgetEnded):  # what was spent before counts
            answers(teacher(settings(server.url, max_teacher_tokens=150), tmp_path), *ASKS)
        more = answers(teacher(settings(server.url, max_teacher_tokens=10_000), tmp_path), *ASKS)
        assert max(paid(server).values()) == 1
    assert len(more) == len(ASKS)


# --- start-up ------------------------------------------------------------------------------------------------------


def test_no_server_is_said_at_once(tmp_path: Path) -> None:
    with serving(Completions(tiny.loaded(seed=1))) as server:
        url = server.url
    with pytest.raises(TeacherError, match=r"no usable teacher at .*Start the server"):
        teacher(settings(url), tmp_path)


def test_two_models_need_a_name(tmp_path: Path) -> None:
    listed = {"data": [{"id": "a"}, {"id": "b"}]}
    with serving(lambda seen: Said(listed)) as server, pytest.raises(ModelError, match=r"serves 2 models \(a, b\)"):
        teacher(settings(server.url), tmp_path)


def test_a_refused_k_is_said_as_the_server_says_it(tmp_path: Path) -> None:
    model = Completions(tiny.loaded(seed=1))

    def limited(seen: servers.Seen) -> Said:
        if seen.body.get("prompt_logprobs", 0) > 20:
            return Said({"error": {"message": "Requested 64, which is greater than max allowed: 20"}}, 400)
        return model(seen)

    with serving(limited) as server:
        by = teacher(settings(server.url), tmp_path)
        with pytest.raises(TeacherError, match=r"after 1 try: HTTP 400.*max allowed: 20"):
            answers(by, score(Wants.TOPK, LONG, k=64))


# --- whole runs -----------------------------------------------------------------------------------------------------


def trained(at: Path, name: str, *overrides: str) -> list[dict[str, Any]]:
    """The metrics of a run of two steps of the bundled models, without times and without the split of its tokens."""
    (at / "runs").mkdir(exist_ok=True)
    rows = train(parsed(f"name={name}", *overrides), at / "runs").metrics
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "cpu_s", "teacher/"))} for row in rows]


def remote(url: str, ledger: Path, **fields: Any) -> str:
    given = {"kind": "http", "base_url": f"{url}/v1", "tokenizer": "lab/teacher", "ledger": str(ledger), "retries": 1}
    return "teacher={" + ", ".join(f"{k}={v!r}" for k, v in (given | fields).items()) + "}"


@pytest.fixture(scope="module")
def lab() -> Loaded:
    return load("lab/teacher")


def test_losses_are_those_of_the_local_model(tmp_path: Path, lab: Loaded) -> None:
    with serving(Completions(lab)) as server:
        behind = remote(server.url, tmp_path / "paid.sqlite")
        for name, method in {"topk": "method={name='opd', top_k=5}", "sampled": "method.name=sampled_kl"}.items():
            far = trained(tmp_path, f"far-{name}", method, behind)
            near = trained(tmp_path, f"near-{name}", method)
            for a, b in zip(far, near, strict=True):
                assert a == pytest.approx(b, rel=1e-3, abs=1e-4)


AUDIT = "method={name='omniopd', chunks=3, continuations=2, chunk_length=3, similarity='exact'}"


def test_a_run_whose_server_dies_resumes_to_the_same_end_and_is_replayed_for_nothing(
    tmp_path: Path, lab: Loaded
) -> None:
    model, alive = Completions(lab), threading.Semaphore(13)

    def dying(seen: servers.Seen) -> Said:
        if "seed" in seen.body and not alive.acquire(blocking=False):
            return Said({"error": "out of memory"}, 400)
        return model(seen)

    with serving(model) as server:
        whole = trained(tmp_path, "whole", AUDIT, remote(server.url, tmp_path / "whole.sqlite"))
        once = sum(paid(server).values())
    with serving(dying) as server:
        how = (AUDIT, remote(server.url, tmp_path / "paid.sqlite"))
        with pytest.raises(TeacherError, match="out of memory"):
            trained(tmp_path, "again", *how)
        server.respond = model
        run = train(parsed("name=again", *how), tmp_path / "runs", resume=True)
        assert max(paid(server).values()) == 1
        assert sum(paid(server).values()) == once
    assert [row["loss"] for row in run.metrics] == [row["loss"] for row in whole]
    replay = f"teacher={{kind='replay', ledger='{tmp_path / 'paid.sqlite'}'}}"
    assert trained(tmp_path, "replay", AUDIT, replay) == whole
    with pytest.raises(TeacherError, match=r"left \d+ of \d+ questions.*only the missing questions are paid for"):
        trained(tmp_path, "other", AUDIT, replay, "seed=1")
    with pytest.raises(ConfigError, match=r"omniopd|opd needs"):
        trained(tmp_path, "scores", "method.name=sampled_kl", replay)
