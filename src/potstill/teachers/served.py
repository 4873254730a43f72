"""A model behind `potstill serve` as teacher: its hidden states come over the wire, and its head is applied here.

    there:  h = body(ids)  [n, H]          here:  z = head(h)  [n, V]

The head is fetched when the first scores are asked for, and never where only text is.

Everything else is as with a model in this process (`teachers.hf`): the same scores, and the same texts. What it reads is not
paid for, so nothing is kept, and a run that is resumed asks again.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property

import httpx2
from jaxtyping import Float
from pydantic import ValidationError
from safetensors import SafetensorError
from tenacity import Retrying
from torch import Tensor

from potstill import models, wire
from potstill.decode import Decoding, Row, Written
from potstill.errors import ModelError, TeacherError
from potstill.models import Tokens
from potstill.split import Head, Text
from potstill.teachers.hf import ModelTeacher
from potstill.teachers.keys import Key, read_key
from potstill.teachers.line import Failed, again
from potstill.teachers.settings import Potstill
from potstill.wire import About, Order


class RemoteSplit:
    """A model's two parts, of which the body is elsewhere: in the place of `split.Split`."""

    def __init__(self, settings: Potstill, key: Key, device: str):
        """Meet the server. Raises TeacherError if there is none that can be used."""
        self.url, self.key, self.timeout, self.device = settings.base_url, key, settings.timeout, device
        self._client: httpx2.Client | None = None
        self._trusted = httpx2.create_ssl_context()  # once: it takes longer than a step's answers may
        self.weights, self.retries = "", 0  # that there is no server at all is said at once
        with self.open():
            try:
                self.about = About.model_validate_json(self.ask("/about"))
            except ValidationError as error:
                raise TeacherError(_stranger(self.url, f"{type(error).__name__} {error}")) from None
        self.retries = settings.retries

    @contextmanager
    def open(self) -> Iterator[None]:
        """With one client, for the requests of a step."""
        secret = self.key.reveal()
        with httpx2.Client(
            headers={"Authorization": f"Bearer {secret}"} if secret else {},
            timeout=httpx2.Timeout(self.timeout, connect=min(self.timeout, 30.0)),
            verify=self._trusted,
        ) as self._client:
            yield

    @cached_property
    def head(self) -> Head:
        """The output layer, on `device`: the largest matrix of most models, so it waits until there is a use for it.

        Raises TeacherError.
        """
        with nullcontext() if self._client and not self._client.is_closed else self.open():
            try:
                return wire.output_layer(wire.unpack(self.ask("/head")), self.about, self.device)
            except (SafetensorError, ValueError) as error:
                raise TeacherError(_stranger(self.url, str(error))) from None

    def hidden(self, texts: Sequence[Text]) -> Float[Tensor, "N H"]:
        """The wanted hidden states of all texts, one text behind the other, in the model's own precision."""
        try:
            found = wire.unpack(self.ask("/hidden", wire.pack_texts(texts)))["hidden"]
        except (SafetensorError, KeyError) as error:
            raise TeacherError(_stranger(self.url, f"{type(error).__name__} {error}")) from None
        wanted = (sum(len(t.ids) - t.start for t in texts), self.about.width)
        if found.shape != wanted:
            raise TeacherError(
                _stranger(self.url, f"hidden states {list(found.shape)} where {list(wanted)} were asked for")
            )
        return found

    def write(
        self, trunks: Sequence[tuple[int, ...]], rows: Sequence[Row], own: Tokens, how: Decoding
    ) -> list[Written]:
        """`decode.write` with the model, some trunks at a time."""
        out: dict[int, Written] = {}
        for part in portions(trunks, rows, self.about.cells):
            used = sorted({rows[i].trunk for i in part})
            some = [replace(rows[i], trunk=used.index(rows[i].trunk)) for i in part]
            order = Order.of([trunks[t] for t in used], some, own.eos, how)
            try:
                written = wire.unpack_written(self.ask("/write", order.model_dump_json().encode()))
                out |= zip(part, written, strict=True)
            except ValueError as error:
                raise TeacherError(_stranger(self.url, str(error)[:300])) from None
        return [out[i] for i in range(len(rows))]

    def ask(self, path: str, body: bytes | None = None) -> bytes:
        """The body of an answer, in several tries if need be. Raises TeacherError."""
        try:
            return Retrying(**again(self.retries))(self._once, path, body)
        except Failed as failed:
            raise TeacherError(self._gave_up(failed)) from None

    def _once(self, path: str, body: bytes | None) -> bytes:
        assert self._client is not None
        try:
            response = self._client.request("GET" if body is None else "POST", self.url + path, content=body)
        except httpx2.ReadTimeout:
            raise Failed(
                f"nothing came in teacher.timeout = {self.timeout:g} seconds. The server may still be loading its model, or be "
                "busy, as it answers one request at a time: raise teacher.timeout"
            ) from None
        except httpx2.HTTPError as error:
            raise Failed(f"{type(error).__name__} {error}") from None
        if response.status_code != 200:
            raise Failed(response.text[:400], response.status_code, response.headers)
        weights = response.headers.get(wire.WEIGHTS)
        if weights is None:
            raise TeacherError(_stranger(self.url, f"its answer has no {wire.WEIGHTS}"))
        self.weights = self.weights or weights
        if weights != self.weights:
            raise TeacherError(
                f"{self.url} now serves other weights ({weights}) than when the run began ({self.weights}): the head that is "
                "here and the hidden states from there would not belong together. Serve the first ones again, then --resume; "
                "or start a new run under another name"
            )
        return response.content

    def _gave_up(self, failed: Failed) -> str:
        why = self.key.scrub(" ".join(failed.message.split()))[:400]
        if failed.status == 401:
            given = "another key than this one" if self.key.reveal() else "a key, and none is set here"
            return (
                f"{self.url} wants {given}. Set {wire.KEYS[0]} to the server's (or name its variable in teacher.key_env, or a "
                "file in teacher.key_file)"
            )
        if failed.status == 404:
            return _stranger(self.url, f"HTTP 404: {why}")
        if failed.status is not None:
            why = f"HTTP {failed.status}: {why}"
        if not self.weights:
            return (
                f"there is no usable teacher at {self.url}: {why}. Start it there (potstill serve MODEL), or put "
                "teacher.base_url right"
            )
        tries = self.retries + 1 if failed.temporary else 1
        return (
            f"teacher {self.about.model!r} at {self.url} gave no answer after {tries} {'try' if tries == 1 else 'tries'}: "
            f"{why}. Put it right, then --resume goes on from the last checkpoint"
        )


class ServedTeacher(ModelTeacher):
    """Scores and continues with a model that is elsewhere."""

    def __init__(self, remote: RemoteSplit, own: Tokens, student: Tokens, settings: Potstill, *, hides: bool):
        self.remote = remote
        super().__init__(
            own,
            None,
            student,
            decoding=Decoding(temperature=settings.temperature, top_p=settings.top_p, cells=remote.about.cells),
            text_only=settings.text_only,
            align=settings.align,
            hides=hides,
            around=remote.open,
        )
        self.split = remote  # not given above, where types may be checked: that would look at the head, and so fetch it

    def _write(self, trunks: Sequence[tuple[int, ...]], rows: Sequence[Row]) -> list[Written]:
        return self.remote.write(trunks, rows, self.own, self.how)


def load(settings: Potstill, student: Tokens, *, device: str, hides: bool) -> ServedTeacher:
    """The teacher, once its server was met. Raises TeacherError, ModelError if the server's tokenizer is another."""
    own = models.load_tokens(settings.tokenizer, settings.eos)
    key = read_key(settings.key_env, settings.key_file, wire.KEYS, needed=False)
    remote = RemoteSplit(settings, key, device)
    about, mine = remote.about, models.fingerprint(own)
    if about.tokenizer != mine:
        raise ModelError(
            f"teacher.tokenizer = {settings.tokenizer!r} ({own.vocab} tokens, fingerprint {mine}) is not that of "
            f"{about.model!r} at {settings.base_url} ({about.vocab} tokens, fingerprint {about.tokenizer}), so the ids that "
            "are sent would mean other words there. Set teacher.tokenizer to the folder or name of the served model's"
        )
    return ServedTeacher(remote, replace(own, name=about.model, context=about.context), student, settings, hides=hides)


def portions(trunks: Sequence[tuple[int, ...]], rows: Sequence[Row], cells: int) -> list[list[int]]:
    """Rows by index, cut where a request would come to more than `cells` tokens to read and to write; never in a trunk."""
    of: dict[int, list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        of[row.trunk].append(i)
    out: list[list[int]] = []
    room = 0
    for trunk, mine in of.items():
        size = len(trunks[trunk]) + sum(rows[i].limit for i in mine)
        if not out or size > room:
            out.append([])
            room = cells
        out[-1] += mine
        room -= size
    return out


def _stranger(url: str, why: str) -> str:
    return (
        f"{url} answers, but not as `potstill serve` of this version does: {why}. Put teacher.base_url right; vLLM, SGLang and "
        "llama.cpp are teachers of kind = 'http'"
    )
