"""Real HTTP servers on loopback that speak the wire formats of teachers, and count what they answered."""

import json
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from potstill import serve
from potstill.decode import Decoding, Row, write
from potstill.models import Loaded, Tokens
from potstill.teachers.keys import Key
from potstill.teachers.served import RemoteSplit, ServedTeacher
from potstill.teachers.settings import Potstill
from tests import tiny

JSON = dict[str, Any]


@dataclass(frozen=True)
class Said:
    """An answer on the wire. `cut`: the connection breaks in the middle of it. `pause`: seconds of silence there."""

    body: JSON | bytes
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    cut: bool = False
    pause: float = 0.0


@dataclass
class Seen:
    """A request."""

    path: str
    headers: Mapping[str, str]
    body: JSON
    answered: bool = False


Responder = Callable[[Seen], Said]


class Server:
    """`respond` answers each request in a thread of its own; `seen` are all requests, in the order of arrival."""

    def __init__(self, respond: Responder):
        self.respond, self.seen, self.most_at_once = respond, list[Seen](), 0
        self._now, self._lock = 0, threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self._answer({})

            def do_POST(self) -> None:
                self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

            def _answer(self, body: JSON) -> None:
                seen = Seen(self.path, {k.lower(): v for k, v in self.headers.items()}, body)
                with outer._lock:
                    outer.seen.append(seen)
                    outer._now += 1
                    outer.most_at_once = max(outer.most_at_once, outer._now)
                try:
                    said = outer.respond(seen)
                finally:
                    with outer._lock:
                        outer._now -= 1
                raw = said.body if isinstance(said.body, bytes) else json.dumps(said.body).encode()
                self.send_response(said.status)
                for name, value in {"Content-Type": "application/json", **said.headers}.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(raw)))
                self.end_headers()
                half = len(raw) // 2
                self.wfile.write(raw[:half])
                time.sleep(said.pause)
                self.wfile.write(b"" if said.cut else raw[half:])
                self.close_connection |= said.cut
                seen.answered = said.status == 200 and not said.cut

            def log_message(self, *_: Any) -> None:
                pass

        class Waiting(ThreadingHTTPServer):
            request_queue_size = 128  # with the usual 5, connections are refused before anybody is asked
            daemon_threads = True

            def handle_error(self, *_: Any) -> None:
                """A client that was killed breaks its connection; that is what it was killed for."""

        self._http = Waiting(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_port}"

    @property
    def answered(self) -> list[Seen]:
        return [s for s in self.seen if s.answered]

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()


@contextmanager
def serving(respond: Responder) -> Iterator[Server]:
    server = Server(respond)
    try:
        yield server
    finally:
        server.close()


# --- potstill serve --------------------------------------------------------------------------------------------------


@dataclass
class Passed:
    """An answer of `potstill serve`."""

    path: str
    status: int
    read: int
    """Bytes of the request's body,"""
    written: int
    """and of the answer's."""


class Hidden(serve.Server):
    """`potstill serve` in a thread. `faults(number of the request)` may be a status to answer with, or 0: hang up."""

    def __init__(self, served: serve.Served, port: int, key: Key):
        self.faults: Callable[[int], int | None] = lambda _: None
        self.passed: list[Passed] = []
        super().__init__("127.0.0.1", port, key)
        self.served = served
        self.RequestHandlerClass = Overheard

    def of(self, path: str) -> list[Passed]:
        return [p for p in self.passed if p.path == path]


class Overheard(serve.Handler):
    server: Hidden

    def _respond(self, body: bytes) -> None:
        self.read = len(body)
        fault = self.server.faults(len(self.server.passed))
        if fault == 0:
            self.server.passed.append(Passed(self.path, 0, len(body), 0))
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nhalf")
            self.close_connection = True
        elif fault:
            self._send(fault, b"told to")
        else:
            super()._respond(body)

    def _gone(self) -> bool:
        if gone := super()._gone():
            self.server.passed.append(Passed(self.path, 0, self.read, 0))
        return gone

    def _send(self, status: int, body: bytes, kind: str = "text/plain") -> None:
        self.server.passed.append(Passed(self.path, status, getattr(self, "read", 0), len(body)))
        super()._send(status, body, kind)


@contextmanager
def hidden(loaded: Loaded, *, port: int = 0, key: str | None = None, cells: int = 65_536) -> Iterator[Hidden]:
    server = Hidden(serve.Served(loaded, cells=cells), port, Key(key))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def taught(
    url: str, own: Tokens, student: Tokens, *, key: str | None = None, hides: bool = False, **fields: Any
) -> ServedTeacher:
    """A teacher behind `potstill serve` whose tokenizer is at hand."""
    settings = Potstill(**{"base_url": url, "tokenizer": "unused", "retries": 2, **fields})
    return ServedTeacher(RemoteSplit(settings, Key(key), "cpu"), own, student, settings, hides=hides)


# --- completions: vLLM, and what has less ----------------------------------------------------------------------------


class Completions:
    """The completions of a model. `dialect`: vLLM's prompt_logprobs, the older echo, or neither; `most` for n."""

    def __init__(self, loaded: Loaded, dialect: str = "vllm", most: int = 100, name: str = "served"):
        self.loaded, self.dialect, self.most, self.name = loaded, dialect, most, name
        self.lock = threading.Lock()

    def __call__(self, seen: Seen) -> Said:
        if seen.path.endswith("/models"):
            return Said({"object": "list", "data": [{"id": self.name, "object": "model"}]})
        assert seen.path == "/v1/completions", seen.path
        with self.lock:
            return Said(self.complete(seen.body))

    def complete(self, body: JSON) -> JSON:
        tokens, ids, n = self.loaded.tokens, tuple(body["prompt"]), min(body.get("n", 1), self.most)
        how = Decoding(temperature=body.get("temperature", 1.0), top_p=body.get("top_p", 1.0))
        seed = body.get("seed", 0)
        rows = [Row(trunk=0, prefix=ids, limit=body["max_tokens"], seed=seed + i) for i in range(n)]
        written = write(self.loaded.model, [ids], rows, vocab=tokens.vocab, eos=tokens.eos, how=how)
        choices: list[JSON] = [
            {
                "index": i,
                "text": tokens.tokenizer.decode(list(w.ids), skip_special_tokens=True),
                "finish_reason": w.finish,
                "logprobs": None,
            }
            for i, w in enumerate(written)
        ]
        if self.dialect == "vllm" and (k := body.get("prompt_logprobs")) is not None:
            choices[0]["prompt_logprobs"] = self.prompt_logprobs(ids, k)
        if self.dialect == "echo" and body.get("echo"):
            logp = tiny.plain_logp(self.loaded.model, ids[:1], ids[1:], tokens.vocab)
            mine = [None, *(float(row[i]) for row, i in zip(logp, ids[1:], strict=True))]
            choices[0]["logprobs"] = {"token_logprobs": [*mine, -1.0], "tokens": [str(i) for i in (*ids, 0)]}
        usage = {"prompt_tokens": len(ids), "completion_tokens": sum(len(w.ids) for w in written)}
        return {"id": "c", "object": "text_completion", "model": self.name, "choices": choices, "usage": usage}

    def prompt_logprobs(self, ids: tuple[int, ...], k: int) -> list[JSON | None]:
        rows: list[JSON | None] = [None]
        logp = tiny.plain_logp(self.loaded.model, ids[:1], ids[1:], self.loaded.tokens.vocab)
        for row, mine in zip(logp, ids[1:], strict=True):
            order = row.argsort(descending=True).tolist()
            kept = dict.fromkeys([mine, *order[:k]])
            rows.append({str(i): {"logprob": float(row[i]), "rank": order.index(i) + 1} for i in kept})
        return rows


# --- chat: what is said is a function of the conversation ------------------------------------------------------------


Speaker = Callable[[list[dict[str, str]], int], str]
"""From the conversation, as role and content, and the number of the answer to what is said."""


def count(speak: Speaker) -> Callable[[list[dict[str, str]]], str]:
    """The speaker with the numbers filled in, by conversation."""
    counts: dict[str, int] = {}
    lock = threading.Lock()

    def said(messages: list[dict[str, str]]) -> str:
        with lock:
            key = json.dumps(messages)
            counts[key] = counts.get(key, -1) + 1
            return speak(messages, counts[key])

    return said


def anthropic(speak: Speaker, *, prefill: bool = True, thinking: bool = False) -> Responder:
    """Messages. `prefill` off: as Claude 4.6 and later. `thinking`: as models that cannot do without."""
    say = count(speak)

    def respond(seen: Seen) -> Said:
        assert seen.path.startswith("/v1/messages"), seen.path
        body = seen.body

        def wrong(message: str) -> Said:
            error = {"type": "error", "error": {"type": "invalid_request_error", "message": message}}
            return Said(error, 400)

        messages = [{"role": m["role"], "content": "".join(b["text"] for b in m["content"])} for m in body["messages"]]
        if thinking and body.get("thinking", {}).get("type") == "disabled":
            return wrong('"thinking.type.disabled" is not supported for this model.')
        if messages[-1]["role"] == "assistant":
            if not prefill:
                return wrong(
                    "This model does not support assistant message prefill. The conversation must end with a user message."
                )
            if messages[-1]["content"] != messages[-1]["content"].rstrip():
                return wrong("messages: final assistant content cannot end with trailing whitespace")
        text = say(messages)
        content: list[JSON] = [{"type": "text", "text": text}]
        if thinking:
            content.insert(0, {"type": "thinking", "thinking": "Hm, let me see.", "signature": "x"})
        stored = sum("cache_control" in b for m in body["messages"] for b in m["content"])
        return Said(
            {
                "id": "m",
                "type": "message",
                "role": "assistant",
                "model": body["model"],
                "content": content,
                "stop_reason": "refusal" if text == "REFUSED" else "end_turn",
                "stop_sequence": None,
                "usage": {
                    "input_tokens": 10,
                    "output_tokens": 5,
                    "cache_read_input_tokens": 3,
                    "cache_creation_input_tokens": stored,
                },
            }
        )

    return respond


def openai(speak: Speaker, *, most: int = 100, knows: tuple[str, ...] = ()) -> Responder:
    """Chat completions. Fields beyond the usual ones are refused unless it `knows` them."""
    say = count(speak)
    usual = {"model", "messages", "max_tokens", "max_completion_tokens", "temperature", "top_p", "n", *knows}

    def respond(seen: Seen) -> Said:
        assert seen.path.endswith("/chat/completions"), seen.path
        body = seen.body
        if unknown := sorted(set(body) - usual):
            complaint = f"Unrecognized request argument supplied: {unknown[0]}"
            return Said({"error": {"message": complaint, "type": "invalid_request_error", "code": None}}, 400)
        messages = [{"role": m["role"], "content": m["content"]} for m in body["messages"]]
        choices: list[JSON] = []
        for i in range(min(body.get("n", 1), most)):
            text = say(messages)
            no = text == "REFUSED"
            message = {"role": "assistant", "content": None if no else text, "refusal": "I will not." if no else None}
            choices.append({"index": i, "message": message, "finish_reason": "stop"})
        usage = {"prompt_tokens": 20, "completion_tokens": 5 * len(choices), "total_tokens": 20 + 5 * len(choices)}
        usage_details = {"prompt_tokens_details": {"cached_tokens": 4}}
        reply = {"id": "c", "object": "chat.completion", "created": 1, "model": body["model"], "choices": choices}
        return Said(reply | {"usage": usage | usage_details})

    return respond


def gemini(speak: Speaker, *, most: int = 8) -> Responder:
    """generateContent."""
    say = count(speak)
    roles = {"user": "user", "model": "assistant"}

    def respond(seen: Seen) -> Said:
        assert re.search(r"/models/[\w.-]+:generateContent$", seen.path), seen.path
        body = seen.body
        messages = [
            {"role": roles[c["role"]], "content": "".join(p["text"] for p in c["parts"])} for c in body["contents"]
        ]
        n = body["generationConfig"].get("candidateCount", 1)
        if n > most:
            message = f"Only {most} candidates can be specified"
            return Said({"error": {"code": 400, "message": message, "status": "INVALID_ARGUMENT"}}, 400)
        candidates: list[JSON] = []
        for i in range(n):
            text = say(messages)
            if text == "REFUSED":
                candidates.append({"index": i, "finishReason": "SAFETY"})
            else:
                parts = [{"text": "Let me think.", "thought": True}, {"text": text}]
                candidates.append({"index": i, "finishReason": "STOP", "content": {"role": "model", "parts": parts}})
        usage = {"promptTokenCount": 30, "candidatesTokenCount": 5 * n, "thoughtsTokenCount": 2}
        return Said({"candidates": candidates, "usageMetadata": usage | {"cachedContentTokenCount": 6}})

    return respond


def flaky(respond: Responder, faults: Callable[[int], Said | None]) -> Responder:
    """Before each answer, a fault if `faults(number of the request)` gives one."""
    lock, numbers = threading.Lock(), iter(range(10**9))

    def either(seen: Seen) -> Said:
        with lock:
            number = next(numbers)
        return faults(number) or respond(seen)

    return either
