"""Requests as `potstill serve` gets them: whose are read, how much of them, and for how long an answer is of use."""

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx2
import pytest
from tests import tiny
from tests.servers import Hidden, Passed, hidden, taught

from potstill import wire
from potstill.errors import TeacherError
from potstill.models import Loaded
from potstill.serve import LONGEST, Served, listen
from potstill.split import Text
from potstill.teachers.keys import Key

TEXT = wire.pack_texts([Text([1, 2, 3])])


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return tiny.loaded(seed=1)


@contextlib.contextmanager
def connected(address: Any) -> Iterator[socket.socket]:
    with socket.create_connection(address[:2], timeout=20) as connection:
        yield connection


def told(connection: socket.socket) -> str:
    """Everything that comes until the server closes the connection."""
    parts = []
    while part := connection.recv(1 << 16):
        parts.append(part)
    return b"".join(parts).decode()


def reply(server: Hidden, request: str) -> str:
    with connected(server.server_address) as connection:
        connection.sendall(request.replace("\n", "\r\n").encode())
        return told(connection)


def soon(true: Callable[[], Any]) -> None:
    end = time.monotonic() + 20
    while not true():
        assert time.monotonic() < end, "it never was"
        time.sleep(0.01)


# --- who may ask -----------------------------------------------------------------------------------------------------


def test_nothing_is_read_of_whoever_has_no_key(loaded: Loaded) -> None:
    """64 MiB are announced, and none sent: the answer comes, and the connection ends."""
    with hidden(loaded, key="secret") as server:
        for own in ("", "Authorization: Bearer another\n"):
            said = reply(server, f"POST /hidden HTTP/1.1\nHost: x\n{own}Content-Length: {LONGEST}\n\n")
            assert said.startswith("HTTP/1.1 401")
            assert "Connection: close" in said
        assert [p.read for p in server.passed] == [0, 0]
        late = httpx2.post(f"{server.url}/hidden", content=bytes(1 << 20))
        assert late.status_code == 401, "to whoever sends it all the same"


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8123", "10.0.0.7", "localhost.evil.example", "[::2]", "[", ""]
)
def test_without_a_key_a_name_of_the_network_is_none_of_ours(loaded: Loaded, host: str) -> None:
    """A page whose name is made to point to this machine asks under that name."""
    with hidden(loaded) as server:
        got = httpx2.get(f"{server.url}/head", headers={"Host": host})
        assert got.status_code == 403
        assert f"this one is to {host!r}. Use one of these names, or set POTSTILL_KEY" in got.text
    with hidden(loaded, key="secret") as server:
        named = {"Host": host, "Authorization": "Bearer secret"}
        assert httpx2.get(f"{server.url}/about", headers=named).status_code == 200


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost:1", "LOCALHOST", "[::1]:8123", "127.3.2.1:80"])
def test_names_of_this_machine_are_answered(loaded: Loaded, host: str) -> None:
    with hidden(loaded) as server:
        assert httpx2.get(f"{server.url}/about", headers={"Host": host}).status_code == 200


def test_a_teacher_that_is_refused_its_name_says_so(loaded: Loaded) -> None:
    with hidden(loaded) as server:
        server.faults = lambda _: 403
        with pytest.raises(TeacherError, match=r"no usable teacher at http.*HTTP 403: told to.*teacher.base_url"):
            taught(server.url, loaded.tokens, loaded.tokens)
        assert len(server.passed) == 1


# --- how much is read ------------------------------------------------------------------------------------------------

LOCAL = "HTTP/1.1\nHost: localhost\n"
INNER = "GET /none HTTP/1.1\nHost: localhost\n\n"
UNREAD = {
    "5,000 digits": (f"POST /write {LOCAL}Content-Length: {'9' * 5000}\n\n", 413, "no more than 67,108,864 bytes"),
    "a byte too many": (f"POST /write {LOCAL}Content-Length: {LONGEST + 1}\n\n", 413, "Ask in several"),
    "no number": (f"POST /write {LOCAL}Content-Length: -5\n\n", 400, "no number of bytes: '-5'"),
    "two lengths": (
        f"POST /write {LOCAL}Content-Length: 2\nContent-Length: 2\n\n{{}}",
        400,
        "no number of bytes: '2, 2'",
    ),
    "no length": (f"POST /write {LOCAL}\n", 411, "send a Content-Length"),
    "chunks": (f"POST /write {LOCAL}Transfer-Encoding: chunked\n\n2\n{{}}\n0\n\n", 411, "chunks are not read"),
    "a body of a GET": (f"GET /about {LOCAL}Content-Length: {len(INNER) + 3}\n\n{INNER}", 400, "a GET has no body"),
    "chunks of a GET": (f"GET /about {LOCAL}Transfer-Encoding: chunked\n\n{INNER}", 400, "a GET has no body"),
}


@pytest.mark.parametrize("name", UNREAD)
def test_a_body_of_unknown_length_is_refused_and_is_no_request(
    name: str, loaded: Loaded, capfd: pytest.CaptureFixture[str]
) -> None:
    request, status, words = UNREAD[name]
    with hidden(loaded) as server:
        said = reply(server, request)
        assert said.count("HTTP/1.1 ") == 1
        assert said.startswith(f"HTTP/1.1 {status}")
        assert words in said
        assert len(said) < 500
        assert httpx2.get(f"{server.url}/about").status_code == 200
    assert not capfd.readouterr().err


# --- for how long ----------------------------------------------------------------------------------------------------


@pytest.fixture
def read(loaded: Loaded) -> Iterator[list[int]]:
    """As long as the number of times that the model was used."""
    times: list[int] = []
    hook = loaded.model.model.register_forward_pre_hook(lambda *_: times.append(1))
    yield times
    hook.remove()


def test_what_nobody_waits_for_is_not_computed(loaded: Loaded, read: list[int]) -> None:
    with hidden(loaded) as server:
        read.clear()
        head = f"POST /hidden HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(TEXT)}\r\n\r\n".encode()
        with server.lock:  # as if it were busy with another
            for _ in range(3):
                with connected(server.server_address) as connection:
                    connection.sendall(head + TEXT)
        soon(lambda: len(server.passed) == 3)
        assert server.passed == [Passed("/hidden", 0, len(TEXT), 0)] * 3
        assert not read
        with connected(server.server_address) as connection:  # what is waited for is, and what was sent early is no end
            connection.sendall((head + TEXT) * 2)
            soon(lambda: len(server.passed) == 5)
        assert len(read) == 2


def test_a_teacher_that_waited_in_vain_names_its_patience(loaded: Loaded, read: list[int]) -> None:
    with hidden(loaded) as server:
        by = taught(server.url, loaded.tokens, loaded.tokens, retries=1, timeout=0.2)
        read.clear()
        with (
            server.lock,
            by.remote.open(),
            pytest.raises(
                TeacherError, match=r"after 2 tries: nothing came in teacher.timeout = 0.2 seconds.*--resume"
            ),
        ):
            by.remote.hidden([Text([1, 2, 3])])
        soon(lambda: len(server.passed) == 3)
        assert [p.status for p in server.passed] == [200, 0, 0]
        assert not read


# --- where it listens ------------------------------------------------------------------------------------------------


def test_connections_wait_until_there_is_a_model(loaded: Loaded) -> None:
    with listen("127.0.0.1", 0, Key(None)) as server, connected(server.server_address) as connection:
        connection.sendall(b"GET /about HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        server.served = Served(loaded)
        server.handle_request()
        assert told(connection).startswith("HTTP/1.1 200")


def test_an_address_of_the_newer_kind(loaded: Loaded) -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6")
    with listen("::1", 0, Key(None)) as server:
        server.served = Served(loaded)
        assert server.url == f"http://[::1]:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        by = taught(server.url, loaded.tokens, loaded.tokens)
        assert by.name == by.remote.about.model == loaded.tokens.name
        server.shutdown()
        thread.join()


def test_everywhere_is_no_address() -> None:
    with listen("0.0.0.0", 0, Key("secret")) as server:
        assert server.url == f"http://{socket.gethostname()}:{server.server_port}"
