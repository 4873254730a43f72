"""A model behind HTTP: it reads texts and tells its hidden states, and it writes. `potstill.wire` says in which words.

    ids, start  ->  h = body(ids)[start:]  [n, H]

For a teacher that does not fit beside its student. One request is worked on at a time, as the model is one; the others wait,
and one whose sender did not wait that long is dropped.
"""

import hmac
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from typing import Any, ClassVar
from urllib.parse import urlsplit

import torch
from pydantic import ValidationError
from safetensors import SafetensorError

from potstill import wire
from potstill.decode import Decoding, Row, write
from potstill.errors import ConfigError, ModelError
from potstill.models import Loaded, fingerprint
from potstill.split import Split, Text
from potstill.teachers.keys import Key
from potstill.wire import About, Order

LONGEST = 1 << 26
"""Bytes of a request: a hundred times what potstill sends."""


class Refused(Exception):
    """A request that is not answered; the message is for whoever sent it."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


class Served:
    """A model, and its answers. Raises ModelError for one that is no body with a plain output layer."""

    def __init__(self, loaded: Loaded, *, cells: int = 65_536):
        split = Split.of(loaded.model, loaded.tokens.vocab)
        if split is None or not isinstance(split.head.module, torch.nn.Linear):
            raise ModelError(
                f"{loaded.tokens.name} cannot be served: its logits are not one matrix times its last hidden states, which are "
                "all that is sent. Use it in the training process (teacher.kind = 'hf'), or behind vLLM (kind = 'http')"
            )
        self.loaded, self.split, self.cells = loaded, split, cells
        tokens, head = loaded.tokens, split.head
        self.weights = wire.weights_of(loaded.model)
        self.about = About(
            model=tokens.name,
            tokenizer=fingerprint(tokens),
            vocab=tokens.vocab,
            width=split.head.module.in_features,
            context=tokens.context,
            cells=cells,
            scale=head.scale,
            cap=head.cap,
        )

    def answer(self, method: str, path: str, body: bytes) -> bytes:
        """The body of an answer. Raises Refused."""
        known: dict[tuple[str, str], Callable[[bytes], bytes]] = {
            ("GET", "/about"): lambda _: self.about.model_dump_json().encode(),
            ("GET", "/head"): self.head,
            ("POST", "/hidden"): self.hidden,
            ("POST", "/write"): self.write,
        }
        if (method, path) not in known:
            raise Refused(404, f"there is no {method} {path}; there are {', '.join(' '.join(k) for k in known)}")
        return known[method, path](body)

    def head(self, _: bytes = b"") -> bytes:
        """W [V, H] and b [V]."""
        module, vocab = self.split.head.module, self.about.vocab
        bias = {} if module.bias is None else {"bias": module.bias[:vocab]}
        return wire.pack(weight=module.weight[:vocab], **bias)

    @torch.no_grad()
    def hidden(self, body: bytes) -> bytes:
        """h [N, H] of some texts."""
        try:
            texts = wire.unpack_texts(body)
        except (SafetensorError, ValueError) as error:
            raise Refused(400, f"no texts: {error}") from None
        self._check(texts)
        return wire.pack(hidden=self.split.hidden(texts))

    def _check(self, texts: list[Text]) -> None:
        about = self.about
        for at, text in enumerate(texts):
            self._readable(text.ids, f"text {at}")
            if not 0 <= text.start < len(text.ids):
                raise Refused(
                    400, f"text {at} has {len(text.ids)} tokens, and hidden states from {text.start} on are none"
                )
        cells = len(texts) * max((len(t.ids) for t in texts), default=0)
        if not texts or (cells > about.cells and len(texts) > 1):
            raise Refused(
                413,
                f"{len(texts)} texts of up to {cells // max(len(texts), 1)} tokens are {cells} cells, but a request has between "
                f"1 and {about.cells}. Send fewer, or start the server with --batch-cells {cells}",
            )

    def _readable(self, ids: Sequence[int], what: str) -> None:
        about = self.about
        if len(ids) > about.context:
            raise Refused(
                413, f"{what} has {len(ids)} tokens, but {about.model} reads {about.context}. Lower rollouts.max_tokens"
            )
        if strange := [i for i in ids if not 0 <= i < about.vocab]:
            raise Refused(
                400, f"{what} has the token {strange[0]}, but {about.model} has {about.vocab} tokens, from 0 on"
            )

    def _writable(self, row: Row, what: str) -> None:
        about, whole = self.about, len(row.prefix) + row.limit
        if not row.prefix:
            raise Refused(400, f"{what} has nothing to go on from: a prefix has at least one token")
        if whole > about.context:
            raise Refused(
                400,
                f"{what} asks for {row.limit} tokens after {len(row.prefix)}, which are {whole}, but {about.model} reads and "
                f"writes {about.context} in all. Lower rollouts.max_tokens, or how much the method asks for at once",
            )

    def write(self, body: bytes) -> bytes:
        """What the model writes after some prefixes: the log-probs and entropies of `decode.write` with it."""
        try:
            order = Order.model_validate_json(body)
            rows = order.prefixed()
        except (ValidationError, IndexError) as error:
            raise Refused(400, f"no order: {' '.join(str(error).split())[:300]}") from None
        for at, trunk in enumerate(order.trunks):
            self._readable(trunk, f"trunk {at}")
        for at, row in enumerate(rows):
            self._readable(row.prefix, f"row {at}")
            self._writable(row, f"row {at}")
        how = Decoding(temperature=order.temperature, top_p=order.top_p, cells=self.cells)
        written = write(self.loaded.model, order.trunks, rows, vocab=self.about.vocab, eos=order.eos, how=how)
        return wire.pack_written(written)


class Server(ThreadingHTTPServer):
    """Listens from the moment it is made, and answers once there is a model: until then connections wait."""

    daemon_threads = True
    request_queue_size = 128
    """Connections that wait, at most."""
    served: Served

    def __init__(self, host: str, port: int, key: Key):
        self.key = key
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.lock = threading.Lock()
        """Held by whoever uses the model."""
        super().__init__((host, port), Handler)

    @property
    def url(self) -> str:
        """Where it is reached. One that listens everywhere goes by this machine's name, as "everywhere" is no address."""
        host, port = str(self.server_address[0]), self.server_address[1]
        name = socket.gethostname() if ip_address(host).is_unspecified else host
        return f"http://[{name}]:{port}" if ":" in name else f"http://{name}:{port}"

    def run(self, served: Served) -> None:
        """Answer until Ctrl-C, which lets the model come to rest: a process that ends while it computes may crash."""
        self.served = served
        with suppress(KeyboardInterrupt):
            self.serve_forever()
        self.lock.acquire()  # for good: whoever waits for the model will not get it, and ends with the process
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away in the middle is no news."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    timeout = 60
    """Seconds of silence after which a connection is closed; computing is not counted."""
    disable_nagle_algorithm = True
    wbufsize = 1 << 16
    server: Server
    TYPES: ClassVar = {"/about": "application/json", "/write": "application/json"}

    def do_GET(self) -> None:
        """An answer to nothing but a path."""
        self._serve()

    def do_POST(self) -> None:
        """An answer to a body."""
        self._serve()

    def _serve(self) -> None:
        try:
            self._admit()
            length = self._length()
        except Refused as refused:
            self.close_connection = True  # what else it sends is not read, and not taken for a request
            self._send(refused.status, str(refused).encode())
        else:
            self._respond(self.rfile.read(length))

    def _admit(self) -> None:
        """Raises Refused for whoever may not ask.

        Without a key that is everybody who calls this machine by a name of the network's, as a page in a browser here does
        once the page's own name was made to point here: the browser would let it read the answers.
        """
        secret, host = self.server.key.reveal(), self.headers.get("Host", "")
        if secret is None and not loopback(hostname(host)):
            raise Refused(
                403,
                f"without a key only requests to 127.0.0.1, [::1] or localhost are answered, and this one is to {host[:80]!r}. "
                f"Use one of these names, or set {wire.KEYS[0]} for the server and for whoever asks",
            )
        given = self.headers.get("Authorization", "")
        if secret is not None and not hmac.compare_digest(given.encode(), f"Bearer {secret}".encode()):
            raise Refused(401, "the key is missing or another one")

    def _length(self) -> int:
        """Bytes of the body. Raises Refused."""
        given, chunks = self.headers.get_all("Content-Length", []), "Transfer-Encoding" in self.headers
        if self.command == "GET" and (chunks or given not in ([], ["0"])):
            raise Refused(400, "a GET has no body: leave it out")
        if self.command == "GET":
            return 0
        if chunks or not given:
            raise Refused(411, "the length of the request is not said, and chunks are not read: send a Content-Length")
        if len(given) > 1 or not given[0].isdecimal():
            raise Refused(400, f"Content-Length is no number of bytes: {', '.join(given)[:80]!r}")
        if len(given[0]) > len(str(LONGEST)) or int(given[0]) > LONGEST:
            raise Refused(413, f"no more than {LONGEST:,} bytes are read, and the request has more. Ask in several")
        return int(given[0])

    def _respond(self, body: bytes) -> None:
        try:
            with self.server.lock:
                if self._gone():
                    self.close_connection = True
                    return
                said = self.server.served.answer(self.command, self.path, body)
        except Refused as refused:
            self._send(refused.status, str(refused).encode())
        except Exception as error:  # out of memory, say: this request fails, and the next one may not
            traceback.print_exc()
            self._send(500, f"{type(error).__name__}: {error}".encode())
        else:
            self._send(200, said, self.TYPES.get(self.path, "application/octet-stream"))

    def _gone(self) -> bool:
        """Whether nobody waits for the answer any more: who asked has closed the connection, and may ask again in another."""
        self.connection.settimeout(0)
        try:
            return not self.connection.recv(1, socket.MSG_PEEK)
        except BlockingIOError:  # nothing more was sent, as is usual
            return False
        except OSError:
            return True
        finally:
            self.connection.settimeout(self.timeout)

    def _send(self, status: int, body: bytes, kind: str = "text/plain; charset=utf-8") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        if self.close_connection:
            self.send_header("Connection", "close")
        if status == 200:
            self.send_header(wire.WEIGHTS, self.server.served.weights)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing is said of single requests."""


def check_host(host: str, key: Key) -> None:
    """Refuse to let in anybody there is. Raises ConfigError."""
    if not loopback(host) and key.reveal() is None:
        raise ConfigError(
            f"--host {host} opens the server to the network, but {wire.KEYS[0]} is not set, so anybody there could use the "
            f"model and read its output layer. Set {wire.KEYS[0]} here and where the student is trained, or keep the host "
            "127.0.0.1 and come through an SSH tunnel"
        )


def listen(host: str, port: int, key: Key) -> Server:
    """A server that listens. Raises ConfigError where it cannot."""
    check_host(host, key)
    try:
        return Server(host, port, key)
    except OSError as error:
        raise ConfigError(
            f"the server cannot listen at {host}:{port}: {error.strerror or error}. Give another --port (0: any that is free), "
            "or a --host of this machine"
        ) from None


def loopback(host: str) -> bool:
    """Whether nobody but this machine can reach it."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def hostname(header: str) -> str:
    """The name in a Host header, without its port; "" if there is none."""
    try:
        return urlsplit(f"//{header}").hostname or ""
    except ValueError:
        return ""
