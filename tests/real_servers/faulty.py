"""A server that answers after a while, in a process of its own: `python faulty.py PORT SECONDS FAULTS`.

It prints a line for each answer that it sent whole: the prompt, the seed, how many samples. FAULTS is the share of
requests that fail, in every way there is; a fifth of the samples are then refusals, and some answers have too few or too many.
"""

import asyncio
import hashlib
import json
import re
import sys
from typing import Any

PORT, SECONDS, FAULTS = int(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3])
KINDS: list[tuple[int, str, bytes]] = [
    (429, "Retry-After: 0.02\r\n", b'{"error": "slow down"}'),
    (500, "", b'{"error": "oops"}'),
    (503, "Retry-After: 0\r\n", b'{"error": "later"}'),
    (408, "", b'{"error": "too late"}'),
    (200, "", b'{"choices": []}'),
    (200, "", b"<html>gateway</html>"),
    (200, "", b'{"choices": [{"text": "\xff\xfe"}]}'),
    (0, "", b'{"choices": [{"text": "half of it"'),  # the connection breaks
    (-1, "", b'{"choices'),  # a body that comes too slowly to wait for
]
requests = 0


def chance(number: int) -> float:
    """In [0, 1), the same for the same number."""
    return int.from_bytes(hashlib.blake2b(b"%d" % number, digest_size=4).digest()) / 2**32


def fault(number: int) -> tuple[int, str, bytes] | None:
    """What goes wrong with a request, if anything does."""
    return KINDS[number % len(KINDS)] if chance(number) < FAULTS else None


def completion(body: dict[str, Any]) -> bytes:
    texts = [f" {(body['seed'] + i) % 9973}" for i in range(body["n"])]
    if body["seed"] % 10 == 0:
        texts = texts[:1]  # fewer than were asked for
    if body["seed"] % 10 == 1:
        texts *= 2  # more than were asked for
    refused = [FAULTS > 0 and chance(body["seed"] + i) < 0.2 for i in range(len(texts))]
    finishes = ["content_filter" if no else "length" for no in refused]
    choices = [{"index": i, "text": text, "finish_reason": finishes[i]} for i, text in enumerate(texts)]
    return json.dumps({"choices": choices, "usage": {"prompt_tokens": 1, "completion_tokens": 1}}).encode()


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    global requests
    try:
        while head := await reader.readuntil(b"\r\n\r\n"):
            length = re.search(rb"(?i)content-length: (\d+)", head)
            body = json.loads(await reader.readexactly(int(length[1]))) if length else {}
            requests += 1
            status, headers, said = fault(requests) or (200, "", b"")
            await asyncio.sleep(SECONDS)
            good = status == 200 and not said
            said = said or completion(body)
            size = len(said) + (100 if status <= 0 else 0)
            head = f"HTTP/1.1 {status if status > 0 else 200} x\r\n{headers}Content-Type: application/json\r\n"
            writer.write(f"{head}Content-Length: {size}\r\n\r\n".encode() + said)
            await writer.drain()
            if status == -1:
                await asyncio.sleep(6)
            if status <= 0:
                break
            if good:
                count = min(body["n"], len(json.loads(said)["choices"]))
                print(json.dumps([body["prompt"], body["seed"], count]), flush=True)
    except (asyncio.IncompleteReadError, ConnectionError):
        pass
    finally:
        writer.close()


async def main() -> None:
    print("begin", flush=True)
    async with await asyncio.start_server(serve, "127.0.0.1", PORT, backlog=256) as server:
        await server.serve_forever()


asyncio.run(main())
