"""Every answer of a paid teacher, written down before it is used: `ledger.sqlite` in the folder of a run.

    questions   key -> who was asked, with which parameters, after which prefix
    answers     (key, draw) -> one answer to it. Draws of a question are counted from 0; each is paid once
    requests    what one call to the teacher took: tokens, seconds, tries, or why it failed

SQLite in WAL mode: a killed process loses nothing that had arrived, a power cut at most the answers of one step, and
several runs may share a file. Needs no torch.
"""

import io
import json
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from potstill.errors import CheckpointError, TrainingError

NAME = "ledger.sqlite"
VERSION = 1
SCHEMA = """
create table if not exists requests (
  id integer primary key, run text not null, at real not null, key text, asker text, provider text not null,
  model text not null,
  tries integer not null, read integer not null, cached integer not null, stored integer not null,
  written integer not null, seconds real not null, error text);
create table if not exists questions (
  key text primary key, address text not null, provider text not null, model text not null,
  parameters text not null, messages text not null, prefix text not null);
create table if not exists answers (
  key text not null references questions, draw integer not null, request integer not null references requests,
  text text, finish text, verdict text, scores blob, primary key (key, draw));
create table if not exists facts (name text primary key, value text not null);
create index if not exists by_address on questions (address);
create index if not exists by_run on requests (run);
create index if not exists by_key on requests (key);
"""

Scores = Mapping[str, np.ndarray]


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What determines an answer, up to chance."""

    key: str
    """Of teacher, parameters and prefix."""
    address: str
    """Of the question alone, whoever is asked: what `replay` looks up."""
    provider: str
    model: str
    parameters: Mapping[str, Any]
    messages: Sequence[Mapping[str, str]]
    """The conversation, without the answer."""
    prefix: str
    """The part of the student's answer that the teacher saw."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One draw: a text as it came, or the scores of given tokens."""

    draw: int
    text: str | None = None
    finish: str | None = None
    """stop, length or refusal."""
    verdict: str | None = None
    """What was thought of the text when it came; for people, it is judged anew on every use."""
    scores: Scores = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One call, tries included."""

    provider: str
    model: str
    key: str | None = None
    asker: str | None = None
    """The rollout and the anchor for which it was made; another one at the same prefix shares the answer for nothing."""
    tries: int = 1
    read: int = 0
    """Input tokens, cached and stored ones included."""
    cached: int = 0
    stored: int = 0
    written: int = 0
    seconds: float = 0.0
    error: str | None = None
    """Why there was no answer in the end. Never holds a key."""


class Ledger:
    """The answers of one file; opened on first use, so that the run's folder may be made in between."""

    def __init__(self, path: Path, run: str):
        self.path, self.run = path, run
        self._open: sqlite3.Connection | None = None

    @property
    def _db(self) -> sqlite3.Connection:
        if self._open is None:
            self._open = connect(self.path)
        return self._open

    def settle(self) -> None:
        """Have what was kept so far reach the disk, so that it outlives the machine's power, too."""
        self._db.execute("pragma wal_checkpoint(passive)")

    def close(self) -> None:
        """Let go of the file; the next use opens it again."""
        if self._open is not None:
            self._open.close()
            self._open = None

    def answers(self, key: str) -> dict[int, Answer]:
        """What is known of a question, by draw."""
        rows = self._db.execute("select draw, text, finish, verdict, scores from answers where key = ?", (key,))
        return {draw: Answer(draw=draw, text=t, finish=f, verdict=v, scores=_unpack(s)) for draw, t, f, v, s in rows}

    def keep(self, question: Question, request: Request, answers: Sequence[Answer]) -> None:
        """Write down a request and what it brought, all or nothing. An answer that is there already stays.

        Raises TrainingError when the disk is full.
        """
        q = question
        with self._writing() as db:
            texts = [json.dumps(x, ensure_ascii=False) for x in (dict(q.parameters), [dict(m) for m in q.messages])]
            row = (q.key, q.address, q.provider, q.model, *texts, q.prefix)
            db.execute("insert or ignore into questions values (?, ?, ?, ?, ?, ?, ?)", row)
            of = self._request(db, request)
            db.executemany(
                "insert or ignore into answers values (?, ?, ?, ?, ?, ?, ?)",
                [(q.key, a.draw, of, a.text, a.finish, a.verdict, _pack(a.scores)) for a in answers],
            )

    def spent_on(self, request: Request) -> None:
        """Write down a request that brought no answer to a question: it failed, or it was a trial."""
        with self._writing() as db:
            self._request(db, request)

    def fact(self, name: str) -> str | None:
        """What was once found out about a teacher."""
        row = self._db.execute("select value from facts where name = ?", (name,)).fetchone()
        return row[0] if row else None

    def learn(self, name: str, value: str) -> None:
        """Remember a fact."""
        with self._writing() as db:
            db.execute("insert or replace into facts values (?, ?)", (name, value))

    def tokens(self) -> dict[tuple[str, str], tuple[int, int, int, int]]:
        """Of this run, by provider and model: read, cached, stored, written."""
        rows = self._db.execute(
            "select provider, model, sum(read), sum(cached), sum(stored), sum(written) from requests where run = ? "
            "group by provider, model",
            (self.run,),
        )
        return {(provider, model): tuple(numbers) for provider, model, *numbers in rows}

    def paid(self, key: str, asker: str) -> tuple[int, int, int]:
        """Tokens read, cached and written for one asker of a question, by this run, in this process or an earlier one."""
        row = self._db.execute(
            "select sum(read), sum(cached), sum(written) from requests where key = ? and asker = ? and run = ?",
            (key, asker, self.run),
        ).fetchone()
        return row[0] or 0, row[1] or 0, row[2] or 0

    def question(self, key: str) -> Question:
        """What was asked."""
        row = self._db.execute(
            "select key, address, provider, model, parameters, messages, prefix from questions where key = ?", (key,)
        ).fetchone()
        key, address, provider, model, parameters, messages, prefix = row
        return Question(
            key=key,
            address=address,
            provider=provider,
            model=model,
            parameters=json.loads(parameters),
            messages=json.loads(messages),
            prefix=prefix,
        )

    def keys_at(self, address: str, model: str | None) -> list[str]:
        """Questions of this address, the oldest first, to one model or to any."""
        rows = self._db.execute(
            "select key from questions where address = ? and ? in (model, '') order by rowid", (address, model or "")
        )
        return [key for (key,) in rows]

    def models(self) -> list[str]:
        """Who has answered."""
        return [m for (m,) in self._db.execute("select distinct model from questions order by 1")]

    def alternatives(self, model: str) -> int | None:
        """K of the largest top-K scores that a model was asked for; 0 for sampled tokens alone, None for text alone."""
        query = "select max(json_extract(parameters, '$.k')) from questions where model = ?"
        found: int | None = self._db.execute(query, (model,)).fetchone()[0]
        return found

    def _request(self, db: sqlite3.Connection, r: Request) -> int:
        who = (self.run, time.time(), r.key, r.asker, r.provider, r.model)
        took = (r.tries, r.read, r.cached, r.stored, r.written, r.seconds, r.error)
        done = db.execute("insert into requests values (null, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", (*who, *took))
        assert done.lastrowid is not None
        return done.lastrowid

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        db = self._db
        try:
            db.execute("begin immediate")
            with db:
                yield db
        except sqlite3.OperationalError as error:
            raise TrainingError(
                f"{self.path} cannot be written: {error}, and no answer is used that is not written down. "
                "Free some space, or let go of the file; then --resume asks for nothing that is in it"
            ) from None


def connect(path: Path, *, new: bool = True) -> sqlite3.Connection:
    """Open a ledger; `new` makes one where there is none. Raises CheckpointError."""
    if not new and not path.is_file():
        raise CheckpointError(f"there is no ledger {path}. A run has one if its teacher is behind an API")
    try:
        db = sqlite3.connect(path, timeout=30, isolation_level=None)
        db.execute("pragma journal_mode = wal")
        db.execute("pragma synchronous = normal")  # safe from a killed process; `settle` makes it safe from a power cut
        version = db.execute("pragma user_version").fetchone()[0]
        if version not in (0, VERSION):
            raise CheckpointError(
                f"{path} is a ledger of form {version}, this potstill reads {VERSION}. Update potstill"
            )
        db.executescript(SCHEMA + f"pragma user_version = {VERSION};")
    except sqlite3.DatabaseError as error:
        raise CheckpointError(
            f"{path} cannot be opened as a ledger: {error}. Give the ledger.sqlite of a run"
        ) from None
    return db


def ledger_path(path: Path) -> Path:
    """The ledger of a run's folder, or the file itself."""
    return path / NAME if path.is_dir() else path


def rows(path: Path) -> Iterator[dict[str, Any]]:
    """Every answer with its question, in the order in which they came: lines of `potstill ledger --export`."""
    db = connect(path, new=False)
    found = db.execute(
        "select r.run, r.at, q.provider, q.model, q.parameters, q.messages, q.prefix, a.draw, a.text, a.finish, a.verdict,"
        " a.scores from answers a join questions q using (key) join requests r on r.id = a.request order by r.id, a.draw"
    )
    for run, at, provider, model, parameters, messages, prefix, draw, text, finish, verdict, scores in found:
        yield {
            "run": run,
            "at": at,
            "provider": provider,
            "model": model,
            "parameters": json.loads(parameters),
            "messages": json.loads(messages),
            "prefix": prefix,
            "draw": draw,
            "text": text,
            "finish": finish,
            "verdict": verdict,
            "scores": {name: np.asarray(values).tolist() for name, values in _unpack(scores).items()},
        }
    db.close()


def summary(path: Path) -> list[dict[str, Any]]:
    """A row for each run and model: what was asked, what came, what it took."""
    db = connect(path, new=False)
    db.row_factory = sqlite3.Row
    found = db.execute(
        "select run, provider, model, count(*) requests, sum(tries - 1) retried, sum(error is not null) failed,"
        " sum(read) read, sum(cached) cached, sum(stored) stored, sum(written) written, sum(seconds) seconds,"
        " sum((select count(*) from answers a where a.request = requests.id)) answers"
        " from requests group by run, provider, model order by min(id)"
    )
    done = [dict(row) for row in found]
    for row in done:
        who = (row["run"], row["provider"], row["model"])
        row["verdicts"] = _counts(
            db,
            "select a.verdict, count(*) from answers a join requests r on r.id = a.request where r.run = ? and"
            " r.provider = ? and r.model = ? and a.verdict is not null group by 1 order by 2 desc",
            who,
        )
        row["errors"] = _counts(
            db,
            "select error, count(*) from requests where run = ? and provider = ? and model = ? and error is not null"
            " group by 1 order by 2 desc",
            who,
        )
    db.close()
    return done


def _counts(db: sqlite3.Connection, query: str, values: Iterable[str]) -> dict[str, int]:
    return dict(db.execute(query, tuple(values)).fetchall())


def _pack(scores: Scores) -> bytes | None:
    if not scores:
        return None
    file = io.BytesIO()
    np.savez_compressed(file, allow_pickle=False, **dict(scores))
    return file.getvalue()


def _unpack(blob: bytes | None) -> Scores:
    if blob is None:
        return {}
    with np.load(io.BytesIO(blob), allow_pickle=False) as found:
        return dict(found)
