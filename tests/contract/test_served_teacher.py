"""A teacher behind `potstill serve`: what it says is what the same model says in this process, and H numbers a token come."""

import copy
import json
from dataclasses import replace
from typing import Any

import httpx2
import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from tests import servers, tiny
from tests.asks import answers, go_on, score
from tests.servers import Completions, hidden, taught
from transformers import Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel, GraniteConfig, GraniteForCausalLM

from potstill import models, wire
from potstill.decode import Decoding, Row
from potstill.errors import ConfigError, ModelError, TeacherError
from potstill.models import Loaded
from potstill.serve import Served, check_host, listen
from potstill.split import Split, Text
from potstill.teachers import served
from potstill.teachers.hf import HFTeacher
from potstill.teachers.keys import Key
from potstill.teachers.served import portions
from potstill.teachers.settings import Potstill
from potstill.types import Feedback, Wants

STUDENT = tiny.tokens(tiny.byte_level(), "student")
LONG = tiny.rollout(STUDENT, "the dog sat on the mat. What is 12 + 30? It is 42 and done")
OTHERS = [
    tiny.rollout(STUDENT, text, ask=tiny.prompt("Why? " * (i + 1), id=f"p{i}"), seed=i)
    for i, text in enumerate(["It is 42.", "naïve café — 你好 🙂 done", "4"])
]
SMALL = {**tiny.SIZE, "vocab_size": STUDENT.vocab, "max_position_embeddings": 512, "initializer_range": 0.3}
KINDS: dict[str, Any] = {
    "llama": lambda: tiny.model("llama", STUDENT.vocab, 1),
    "qwen2, tied": lambda: tiny.model("qwen2", STUDENT.vocab, 1),
    "gemma2, capped": lambda: Gemma2ForCausalLM(Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=2.0)),
    "granite, scaled": lambda: GraniteForCausalLM(GraniteConfig(**SMALL, logits_scaling=1.5)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=STUDENT.vocab, n_embd=32, n_layer=2, n_head=4)),
    "padded": lambda: tiny.padded(tiny.model("llama", STUDENT.vocab, 1), 40),
    "bfloat16": lambda: tiny.model("llama", STUDENT.vocab, 1).to(torch.bfloat16),
}


def of(kind: str = "llama") -> Loaded:
    torch.manual_seed(1)
    return Loaded(KINDS[kind]().eval().requires_grad_(False), replace(STUDENT, name="teacher"))


def local(loaded: Loaded, **options: Any) -> HFTeacher:
    return HFTeacher(loaded, STUDENT, **{"decoding": Decoding(), **options})


SCORES = [
    *(score(Wants.FULL, r) for r in (LONG, *OTHERS)),
    score(Wants.SAMPLED, LONG),
    score(Wants.SAMPLED, LONG, start=4, length=3),
    score(Wants.TOPK, LONG, k=5),
]
TEXTS = [go_on(LONG, 0), go_on(OTHERS[0], 1, ids=True), go_on(LONG, 4), go_on(OTHERS[1], 1), go_on(LONG, 13, n=2)]


def assert_same(far: Feedback, near: Feedback, tolerance: float = 1e-6) -> None:
    assert far.ask is near.ask
    for name in ("sampled", "topk_logp", "logp", "hidden", "topk_ids", "aligned"):
        a, b = getattr(far, name), getattr(near, name)
        assert (a is None) == (b is None), name
        if a is not None:
            np.testing.assert_allclose(a, b, atol=tolerance, err_msg=name)
    for name in ("teacher", "temperature", "texts", "finishes", "ids", "usage"):
        assert getattr(far, name) == getattr(near, name), name


# --- the same as the model itself ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("hides", [False, True])
def test_scores_and_texts_are_those_of_the_model(kind: str, hides: bool) -> None:
    loaded = of(kind)
    with hidden(loaded) as server:
        by = taught(server.url, loaded.tokens, STUDENT, hides=hides)
        assert by.offers is Wants.FULL
        far = answers(by, *SCORES, *TEXTS)
    near = answers(local(loaded, hides=hides), *SCORES, *TEXTS)
    for a, b in zip(far, near, strict=True):
        assert_same(a, b)
        if hides and a.ask.wants is Wants.FULL:
            assert a.head is not None
            assert b.head is not None
            rows = torch.from_numpy(a.hidden)
            torch.testing.assert_close(a.head(rows), b.head(rows), atol=1e-6, rtol=1e-6)
    assert len({id(a.head) for a in far if a.head}) == hides, "a batch has one head"


def test_a_teacher_may_read_in_many_requests() -> None:
    """As many cells as one text has, or fewer: the same numbers and texts."""
    loaded = of()
    near = answers(local(loaded), *SCORES, *TEXTS)
    for cells in (1, 100):
        with hidden(loaded, cells=cells) as server:
            far = answers(taught(server.url, loaded.tokens, STUDENT), *SCORES, *TEXTS)
            assert (len(server.of("/hidden")), len(server.of("/write"))) == {1: (7, 3), 100: (4, 2)}[cells]
        for a, b in zip(far, near, strict=True):
            assert_same(a, b, 2e-5)  # other texts beside one: other rounding


@pytest.mark.parametrize("align", [False, True])
def test_a_foreign_teacher_is_as_foreign_as_it_would_be_here(align: bool) -> None:
    loaded = tiny.loaded(seed=1, tokenizer=tiny.byte_level(270), name="foreign")
    asks = [*TEXTS, *(SCORES if align else [])]
    with hidden(loaded) as server:
        by = taught(server.url, loaded.tokens, STUDENT, align=align)
        assert by.offers is (Wants.FULL if align else Wants.TEXT)
        far = answers(by, *asks)
    for a, b in zip(far, answers(local(loaded, align=align), *asks), strict=True):
        assert_same(a, b)


def test_greedy_and_cut_off_tails() -> None:
    loaded = of()
    with hidden(loaded) as server:
        for how in ({"temperature": 0.0}, {"top_p": 0.5}, {"temperature": 1.5}):
            far = answers(taught(server.url, loaded.tokens, STUDENT, **how), *TEXTS)
            assert [f.texts for f in far] == [f.texts for f in answers(local(loaded, decoding=Decoding(**how)), *TEXTS)]


# --- what goes over the wire ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "bfloat16"])
def test_h_numbers_a_token_are_sent_and_the_head_once(kind: str) -> None:
    loaded = of(kind)
    width, size = 32, {"llama": 4, "bfloat16": 2}[kind]
    with hidden(loaded) as server:
        by = taught(server.url, loaded.tokens, STUDENT, hides=True)
        for _ in range(3):
            answers(by, *SCORES[:4])
        assert [p.path for p in server.passed] == ["/about", "/hidden", "/head", "/hidden", "/hidden"]
    [head] = server.of("/head")
    tokens = sum(len(a.rollout.response_ids) + 1 for a in SCORES[:4])
    for sent in server.of("/hidden"):
        assert 0 <= sent.written - tokens * width * size < 100
        assert sent.written < tokens * STUDENT.vocab * size / 4
        assert sent.read < 4 * sum(len(a.rollout.prompt_ids) + len(a.rollout.response_ids) for a in SCORES[:4]) + 400
    assert 0 <= head.written - STUDENT.vocab * width * size < 100


def test_the_head_stays_where_it_is_as_long_as_only_text_is_asked_for() -> None:
    loaded = of()
    with hidden(loaded) as server:
        by = taught(server.url, loaded.tokens, STUDENT)
        answers(by, *TEXTS)
        assert not server.of("/head")
        assert by.remote.head(torch.zeros(1, 32)).shape == (1, STUDENT.vocab), "at any time, not in a step alone"
        answers(by, SCORES[0])
        assert len(server.of("/head")) == 1


def test_prefixes_in_a_trunk_are_sent_once() -> None:
    """64 rows with a prefix of 200 tokens: little more than the trunk, and back come the rows as they were."""
    trunk = tuple(range(200))
    rows = [Row(trunk=0, prefix=(*trunk[: 100 + i], 7), limit=9, seed=2**62 + i) for i in range(64)]
    order = wire.Order.of([trunk], rows, (1, 2), Decoding(temperature=0.7, top_p=0.9))
    sent = order.model_dump_json().encode()
    assert len(sent) < 8000
    again = wire.Order.model_validate_json(sent)
    assert again == order
    assert again.prefixed() == rows


def test_a_trunk_is_never_cut_and_a_request_holds_so_much() -> None:
    trunks = [(0,) * n for n in (10, 10, 50, 10)]
    rows = [Row(trunk=t, prefix=(0,), limit=5, seed=0) for t in (0, 0, 1, 2, 2, 2, 3, 0)]
    assert portions(trunks, rows, 40) == [[0, 1, 7, 2], [3, 4, 5], [6]]
    assert portions(trunks, rows, 1) == [[0, 1, 7], [2], [3, 4, 5], [6]]
    assert portions(trunks, [], 1) == []


def test_texts_come_out_as_they_went_in() -> None:
    texts = [Text([1, 2, 3], 1), Text([4], 0), Text([5, 6], 1)]
    assert wire.unpack_texts(wire.pack_texts(texts)) == texts


# --- whom it talks to ------------------------------------------------------------------------------------------------


def test_fingerprints_tell_tokenizers_apart_as_comparing_them_does() -> None:
    longer = [copy.deepcopy(tiny.byte_level()) for _ in range(2)]
    for tokenizer, token in zip(longer, ("<|a|>", "<|b|>"), strict=True):
        tokenizer.add_tokens([token])  # as many tokens, and the same ones for all texts but one
    kinds = (tiny.byte_level(), tiny.byte_level(270), tiny.byte_fallback(), copy.deepcopy(tiny.byte_level()), *longer)
    known = [tiny.tokens(t) for t in kinds]
    for a in known:
        for b in known:
            assert (models.fingerprint(a) == models.fingerprint(b)) == (models.same_tokenizer(a, b) is None)


def test_weights_are_told_apart() -> None:
    one, same, other = (of() for _ in range(3))
    with torch.no_grad():
        other.model.model.layers[1].mlp.down_proj.weight[3, 5] += 1e-3
    names = [wire.weights_of(x.model) for x in (one, same, other, of("bfloat16"))]
    assert names[0] == names[1]
    assert len(set(names)) == 3


def settings(url: str, **fields: Any) -> Potstill:
    return Potstill(**{"base_url": url, "tokenizer": "lab/teacher", "retries": 0, **fields})


def test_a_teacher_is_met_by_the_tokenizer_that_the_recipe_names() -> None:
    lab = models.load("lab/teacher")
    student = models.load_tokens("lab/student")
    with hidden(lab) as server:
        by = served.load(settings(server.url), student, device="cpu", hides=True)
        assert (by.name, by.foreign, by.own.context) == ("lab/teacher", False, 128)
        with pytest.raises(
            ModelError, match=r"teacher.tokenizer = 'lab/foreign' \(\d+ tokens, fingerprint .*'lab/teacher'"
        ):
            served.load(settings(server.url, tokenizer="lab/foreign"), student, device="cpu", hides=True)


def test_no_server_is_said_at_once() -> None:
    with hidden(of()) as server:
        url = server.url
    with pytest.raises(TeacherError, match=r"no usable teacher at http://127.*ConnectError.*potstill serve MODEL"):
        taught(url, STUDENT, STUDENT, retries=6)


@pytest.mark.parametrize("body", [{"choices": []}, {"model": "x"}])
def test_another_server_is_no_teacher(body: dict[str, Any]) -> None:
    with (
        servers.serving(lambda _: servers.Said(body)) as server,
        pytest.raises(TeacherError, match=r"answers, but not as `potstill serve`.*kind = 'http'"),
    ):
        taught(server.url, STUDENT, STUDENT)
    with (
        servers.serving(lambda _: servers.Said({"detail": "Not Found"}, 404)) as server,
        pytest.raises(TeacherError, match=r"not as `potstill serve`.*HTTP 404"),
    ):
        taught(server.url, STUDENT, STUDENT)


HEADS = {
    "fits": ({"weight": (300, 32)}, None),
    "fits, with a bias": ({"weight": (300, 32), "bias": (300,)}, None),
    "too narrow": ({"weight": (300, 31)}, r"layer \{'weight': \[300, 31\]\} where a weight \[300, 32\]"),
    "bias of another": ({"weight": (300, 32), "bias": (299,)}, r"'bias': \[299\]"),
    "no weight": ({"bias": (300,)}, r"layer \{'bias'"),
    "no tensors": (b"{}", "header too small"),
}


@pytest.mark.parametrize("name", HEADS)
def test_a_head_of_another_shape_is_a_strangers(name: str) -> None:
    """It is looked at when it comes, which is not when the server is met."""
    shapes, wrong = HEADS[name]
    about = Served(of()).about.model_dump()
    head = shapes if isinstance(shapes, bytes) else save({k: torch.zeros(shape) for k, shape in shapes.items()})

    def respond(seen: servers.Seen) -> servers.Said:
        return servers.Said(about if seen.path == "/about" else head, headers={wire.WEIGHTS: "x"})

    with servers.serving(respond) as server:
        remote = taught(server.url, STUDENT, STUDENT).remote
        if wrong is None:
            assert remote.head(torch.zeros(1, 32)).shape == (1, 300)
        else:
            with pytest.raises(TeacherError, match=f"not as `potstill serve`.*{wrong}"):
                remote.head  # noqa: B018


def test_a_key_opens(monkeypatch: pytest.MonkeyPatch) -> None:
    student = models.load_tokens("lab/student")
    monkeypatch.delenv("POTSTILL_KEY", raising=False)
    with hidden(models.load("lab/teacher"), key="secret-1") as server:

        def meet(**fields: Any) -> Any:
            return served.load(settings(server.url, **fields), student, device="cpu", hides=True)

        with pytest.raises(TeacherError, match=r"wants a key, and none is set here. Set POTSTILL_KEY"):
            meet()
        monkeypatch.setenv("POTSTILL_KEY", "secret-2")
        with pytest.raises(TeacherError, match="wants another key than this one") as caught:
            meet()
        assert "secret" not in str(caught.value)
        monkeypatch.setenv("MINE", "secret-1")
        assert meet(key_env="MINE").offers is Wants.FULL
        monkeypatch.setenv("POTSTILL_KEY", "secret-1")
        assert meet().offers is Wants.FULL
        assert {p.status for p in server.passed} == {200, 401}


def test_only_this_machine_comes_in_without_a_key() -> None:
    for host in ("127.0.0.1", "localhost", "::1", "127.3.2.1"):
        check_host(host, Key(None))
    for host in ("0.0.0.0", "192.168.0.1", "gpu-box", "::"):
        check_host(host, Key("secret"))
        with pytest.raises(ConfigError, match=r"--host .* opens the server to the network.*Set POTSTILL_KEY.*SSH"):
            check_host(host, Key(None))


def test_a_port_that_is_taken_is_said() -> None:
    with hidden(of()) as server, pytest.raises(ConfigError, match=r"cannot listen at 127.0.0.1:\d+: .*--port"):
        listen("127.0.0.1", server.server_port, Key(None))


def test_a_model_without_a_plain_head_is_not_served() -> None:
    class Odd(type(of().model)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out = super().forward(*args, **kwargs)
            out.logits = out.logits * 1.5 + 1
            return out

    odd = of()
    odd.model.__class__ = Odd
    with pytest.raises(ModelError, match=r"teacher cannot be served.*kind = 'http'"):
        Served(odd)


# --- faults ----------------------------------------------------------------------------------------------------------


def test_faults_are_waited_out() -> None:
    """A broken connection, a busy server: the same answer in the end."""
    loaded = of()
    with hidden(loaded) as server:
        by = taught(server.url, loaded.tokens, STUDENT)
        server.faults = {1: 0, 2: 503, 5: 500}.get
        [far] = answers(by, SCORES[0])
        again = answers(by, *TEXTS)
        assert [p.status for p in server.passed] == [200, 0, 503, 200, 200, 500, 200]
    [near] = answers(local(loaded), SCORES[0])
    assert_same(far, near)
    assert [f.texts for f in again] == [f.texts for f in answers(local(loaded), *TEXTS)]


def test_a_server_that_goes_away_is_given_up() -> None:
    loaded = of()
    with hidden(loaded) as server:
        by = taught(server.url, loaded.tokens, STUDENT, retries=1)
    with pytest.raises(
        TeacherError, match=r"'teacher' at http.* gave no answer after 2 tries: ConnectError.*--resume goes on"
    ):
        answers(by, SCORES[0])


def test_a_server_that_comes_back_is_asked_again_unless_it_is_another() -> None:
    loaded, other = of(), of()
    with torch.no_grad():
        other.model.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    with hidden(loaded) as server:
        by, port = taught(server.url, loaded.tokens, STUDENT), server.server_port
        first = answers(by, SCORES[0])[0]
    with hidden(of(), port=port):
        assert_same(answers(by, SCORES[0])[0], first)
    with hidden(other, port=port) as server:
        with pytest.raises(
            TeacherError, match=r"now serves other weights \(.*Serve the first ones again, then --resume"
        ):
            answers(by, SCORES[0])
        assert len(server.passed) == 1, "asking again would not help"


def test_what_is_too_long_is_refused_and_said() -> None:
    loaded = of()
    short = Loaded(loaded.model, replace(loaded.tokens, context=30))
    with hidden(short) as server:
        by = taught(server.url, loaded.tokens, STUDENT)
        with pytest.raises(TeacherError, match=r"after 1 try: HTTP 413: text 0 has 35 tokens, but teacher reads 30"):
            answers(by, SCORES[0])
        with pytest.raises(TeacherError, match=r"HTTP 413: trunk 0 has 34 tokens, but teacher reads 30"):
            answers(by, go_on(LONG, 25))
        assert len(answers(by, go_on(LONG, 2), score(Wants.FULL, OTHERS[2]))) == 2


def test_what_would_become_too_long_is_refused_before_it_is_written() -> None:
    """GPT-2 has a matrix of positions, with no row for what comes after its context."""
    plain = GPT2Config(vocab_size=STUDENT.vocab, n_embd=32, n_layer=2, n_head=4, n_positions=30)
    loaded = Loaded(GPT2LMHeadModel(plain).eval().requires_grad_(False), replace(STUDENT, name="teacher", context=30))
    with hidden(loaded) as server:
        by = taught(server.url, loaded.tokens, STUDENT)
        prefix = len(by._prefix(go_on(LONG, 4)))
        with pytest.raises(
            TeacherError, match=rf"1 try: HTTP 400: row 0 asks for 25 .* after {prefix}.* 30 in all. Lower"
        ):
            answers(by, go_on(LONG, 4, 25))
        assert len(answers(by, go_on(LONG, 4, 30 - prefix))) == 1


def order(**fields: Any) -> bytes:
    """What is asked of /write, with other values in the row or beside it."""
    row: dict[str, Any] = {"trunk": 0, "shared": 1, "own": [1], "limit": 1, "seed": 0}
    row |= {name: fields.pop(name) for name in row.keys() & fields.keys()}
    whole = {"trunks": [[1, 2]], "rows": [row], "eos": [1], "temperature": 1, "top_p": 1}
    return json.dumps(whole | fields).encode()


BAD = {
    "no safetensors": ("/hidden", b"nonsense", 400, "no texts"),
    "nothing": ("/hidden", b"", 400, "no texts"),
    "other tensors": ("/hidden", save({"x": torch.zeros(2)}), 400, "ids, lengths and starts"),
    "lengths that do not fit": (
        "/hidden",
        save({"ids": torch.tensor([1, 2]), "lengths": torch.tensor([5]), "starts": torch.tensor([0])}),
        400,
        "no texts",
    ),
    "unknown token": ("/hidden", wire.pack_texts([Text([1, 9999])]), 400, "token 9999"),
    "negative token": ("/hidden", wire.pack_texts([Text([-1])]), 400, "token -1"),
    "start behind the end": ("/hidden", wire.pack_texts([Text([1, 2], 2)]), 400, "from 2 on are none"),
    "no text": ("/hidden", wire.pack_texts([]), 413, "between 1 and 100"),
    "too many": ("/hidden", wire.pack_texts([Text([1] * 40)] * 3), 413, "--batch-cells 120"),
    "no JSON": ("/write", b"{", 400, "no order"),
    "a row of no trunk": ("/write", order(trunks=[]), 400, "no order"),
    "a trunk from behind": ("/write", order(trunk=-1), 400, "greater than or equal to 0"),
    "a negative seed": ("/write", order(seed=-1), 400, "greater than or equal to 0"),
    "nothing to write": ("/write", order(limit=0), 400, "greater than or equal to 1"),
    "nothing to go on from": ("/write", order(shared=0, own=[]), 400, "nothing to go on from"),
    "below zero": ("/write", order(temperature=-1), 400, "temperature"),
    "nothing but heat": ("/write", order(temperature=float("inf")), 400, "temperature"),
    "no token": ("/write", order(top_p=0), 400, "top_p"),
    "more than all": ("/write", order(top_p=1.1), 400, "top_p"),
    "nowhere": ("/v1/completions", b"{}", 404, "POST /hidden"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_request_that_makes_no_sense_is_refused_and_does_no_harm(name: str) -> None:
    path, body, status, said = BAD[name]
    with hidden(of(), cells=100) as server:
        got = httpx2.post(server.url + path, content=body)
        assert (got.status_code, said in got.text) == (status, True), got.text
        assert httpx2.get(server.url + "/about").status_code == 200


def test_a_model_that_fails_fails_one_request(capfd: pytest.CaptureFixture[str]) -> None:
    loaded = of()
    with hidden(loaded) as server:
        by = taught(server.url, loaded.tokens, STUDENT, retries=0)
        broken = loaded.model.register_forward_pre_hook(lambda *_: 1 / 0)
        body = loaded.model.model.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(TeacherError, match="HTTP 500: ZeroDivisionError"):
            answers(by, SCORES[0])
        broken.remove()
        body.remove()
        assert "ZeroDivisionError" in capfd.readouterr().err
        assert answers(by, SCORES[0])[0].logp is not None


def test_the_head_is_as_it_was() -> None:
    loaded = of("padded")
    split = Split.of(loaded.model, STUDENT.vocab)
    assert split is not None
    sent = load(Served(loaded).head())
    torch.testing.assert_close(sent["weight"], split.head.module.weight[: STUDENT.vocab], rtol=0, atol=0)
    assert sent.keys() == {"weight"}


def test_completions_are_another_kind() -> None:
    """vLLM at the same address: its 404 is told as what it is."""
    model = Completions(tiny.loaded(seed=1))

    def vllm(seen: servers.Seen) -> servers.Said:
        return model(seen) if seen.path.startswith("/v1") else servers.Said({"detail": "Not Found"}, 404)

    with servers.serving(vllm) as server, pytest.raises(TeacherError, match=r"kind = 'http'"):
        taught(server.url, STUDENT, STUDENT)
