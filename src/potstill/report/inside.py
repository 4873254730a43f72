"""A look inside: single rollouts, token by token, with what the teacher said about them."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import exp
from typing import Any

from rapidfuzz.distance import Levenshtein

from potstill.report.numbers import finite, percent, quantile, round_up, short
from potstill.run import Row, Run

SHADES = 8
"""Steps of a colour scale; shade 0 is no colour."""
PER_STEP = 4
"""Rollouts shown of one step."""
MOST_TOKENS = 1200
"""Tokens shown of one rollout."""
MOST_CHARACTERS = 400
"""Characters shown of one prompt message, chunk or continuation."""
MOST_PIECES = 24
"""A continuation that agrees with the student in more, shorter places than this is simply different."""
BUDGET = 1_200_000
"""Characters of HTML for all rollouts together: keeps the page below 3 MB."""


@dataclass(frozen=True, slots=True)
class Scale:
    """A colour scale: values from 0 to `top` in SHADES equal steps; larger ones get the last shade."""

    name: str
    unit: str
    top: float
    signed: bool = False

    def shade(self, value: float | None) -> int:
        """0 for nothing to see, 1 .. SHADES otherwise; negative for negative values of a signed scale."""
        if value is None or not self.top:
            return 0
        size = min(SHADES, round(SHADES * abs(value) / self.top))
        return -size if self.signed and value < 0 else size

    @property
    def legend(self) -> list[tuple[int, str]]:
        """(shade, the value it stands for), ascending."""
        shades = range(-SHADES if self.signed else 0, SHADES + 1, 2)
        last = SHADES if self.top else 0
        return [(s, short(self.top * s / SHADES) + ("+" if s == last else "")) for s in shades]


@dataclass(frozen=True, slots=True)
class Token:
    """One token: its text, its shade on both scales, and its tooltip."""

    text: str
    entropy: int
    credit: int
    tip: str
    kind: str = ""
    """"newline", "end" or "part" (of a character that takes several tokens)."""


@dataclass(frozen=True, slots=True)
class Continuation:
    """What the teacher wrote in place of a chunk: pieces (text, as the student wrote it?), how often, how similar."""

    pieces: list[tuple[str, bool]]
    times: int
    similarity: float | None


@dataclass(frozen=True, slots=True)
class Chunk:
    """An audited stretch of a rollout, and the verdict on it (OmniOPD Eq. 3-5)."""

    number: int
    start: int
    length: int
    text: str
    continuations: list[Continuation]
    asked: int
    k_sem: float | None
    pi_bar: float | None
    target: float | None

    @property
    def level(self) -> str:
        """low, middle or high: how strongly the target backs what the student wrote."""
        value = self.target or 0.0
        return "low" if value < 1 / 3 else "middle" if value < 2 / 3 else "high"


@dataclass(frozen=True, slots=True)
class Sheet:
    """One rollout, ready to be shown."""

    anchor: str
    row: Row
    stretches: list[tuple[Chunk | None, list[Token]]]
    chunks: list[Chunk]
    hidden_tokens: int
    mean_entropy: float | None

    @property
    def cost(self) -> int:
        """Characters of HTML that this rollout takes, about."""
        tokens = sum(70 + len(t.tip) + len(t.text) for _, stretch in self.stretches for t in stretch)
        pieces = [p for c in self.chunks for k in c.continuations for p in k.pieces]
        return 3000 + tokens + 900 * len(self.chunks) + sum(40 + len(text) for text, _ in pieces)


@dataclass(frozen=True, slots=True)
class Kept:
    """The rollouts of one kept step: how many there are, how many were right, and those that are shown."""

    step: int
    count: int
    right: int | None
    sheets: list[Sheet]


@dataclass(frozen=True, slots=True)
class Inside:
    """Everything shown of one run."""

    run: Run
    colour: int
    entropy: Scale
    credit: Scale | None
    kept: list[Kept]

    @property
    def words(self) -> str:
        """What the second colour scale means."""
        if not self.credit or self.credit.name == "teacher_kl":
            return "teacher_kl: likelier to the student than to the teacher (blue), or less likely (red)"
        return "advantage: write this more often (blue)" + (" or less often (red)" if self.credit.signed else "")

    @property
    def has_chunks(self) -> bool:
        """Whether any rollout that is shown was audited."""
        return any(sheet.chunks for kept in self.kept for sheet in kept.sheets)

    @property
    def alpha(self) -> float | None:
        """The pseudo-count of the chunk target, from the run's recipe."""
        method = self.run.resolved.get("method")
        return finite(method.get("alpha")) if isinstance(method, Mapping) else None


def cut(text: str, most: int = MOST_CHARACTERS) -> str:
    """At most `most` characters; an ellipsis says that there were more."""
    return text if len(text) <= most else text[:most] + "\N{HORIZONTAL ELLIPSIS}"


def first_middle_last(steps: Sequence[int]) -> list[int]:
    """Three of the kept steps, or as many as there are."""
    return [steps[i] for i in sorted({0, (len(steps) - 1) // 2, len(steps) - 1})] if steps else []


def choose(rows: Sequence[Row], most: int = PER_STEP) -> list[Row]:
    """Wrong and right ones in turn, audited ones first: the rollouts that have most to tell."""
    audited = sorted(rows, key=lambda row: not row.get("audits"))
    right = [row for row in audited if (finite(row.get("verdict")) or 0.0) >= 1]
    wrong = [row for row in audited if (finite(row.get("verdict")) or 0.0) < 1]
    in_turn = [row for pair in zip(wrong, right, strict=False) for row in pair]
    shorter = min(len(wrong), len(right))
    return (in_turn + wrong[shorter:] + right[shorter:])[:most]


def per_token(row: Row, name: str) -> list[float | None]:
    """One number per token, with None where it is missing; empty if the rollout does not have it."""
    info = row.get("info")
    values = row.get(name) or (info.get(name) if isinstance(info, Mapping) else None) or []
    return [finite(value) for value in values]


def _scale(rows: Sequence[Row], name: str, unit: str) -> Scale:
    """A scale whose last shade begins at the 98th percentile, so that one outlier cannot bleach the page."""
    values = [v for row in rows for v in per_token(row, name) if v]
    return Scale(name, unit, round_up(quantile(map(abs, values), 0.98)), signed=any(v < 0 for v in values))


def credit_scale(rows: Sequence[Row]) -> Scale | None:
    """What the teacher's signal was, token by token: the advantage, else the log-ratio, where a run has one."""
    for name, unit in (("advantage", ""), ("teacher_kl", "nats")):
        scale = _scale(rows, name, unit)
        if scale.top:
            return scale
    return None


def tokens(row: Row, entropy: Scale, credit: Scale | None) -> list[Token]:
    """The tokens of a rollout, coloured; at most MOST_TOKENS."""
    pieces: Sequence[str] = row.get("pieces") or []
    info: Mapping[str, Any] = row.get("info") or {}
    numbers = {name: per_token(row, name) for name in ("entropy", "old_logp", "advantage", "weight", "anchor", *info)}

    def at(name: str, i: int) -> float | None:
        values = numbers.get(name, [])
        return values[i] if i < len(values) else None

    def tip(i: int) -> str:
        said = [f"token {i + 1} of {len(pieces)}"]
        if (nats := at("entropy", i)) is not None:
            said.append(f"entropy {short(nats)} nats")
        if (logp := at("old_logp", i)) is not None:
            said.append(f"probability {percent(exp(min(logp, 0.0)))}")
        others = {name: at(name, i) for name in ("advantage", "weight", "anchor", *info)}
        said += [f"{name.replace('_', ' ')} {short(value)}" for name, value in others.items() if value is not None]
        return "\n".join(said)

    def kind(i: int, piece: str) -> str:
        if piece:
            return "newline" if "\n" in piece and not piece.strip() else ""
        return "end" if i == len(pieces) - 1 and row.get("finish") == "stop" else "part"

    return [
        Token(p, entropy.shade(at("entropy", i)), credit.shade(at(credit.name, i)) if credit else 0, tip(i), kind(i, p))
        for i, p in enumerate(pieces[:MOST_TOKENS])
    ]


def compare(student: str, teacher: str) -> list[tuple[str, bool]]:
    """The teacher's text in pieces: (text, whether the student wrote the same there), by edit distance."""
    pieces = [
        (teacher[op.dest_start : op.dest_end], op.tag == "equal")
        for op in Levenshtein.opcodes(student, teacher)
        if op.dest_end > op.dest_start
    ]
    return pieces if len(pieces) <= MOST_PIECES else [(teacher, False)]


def chunk(number: int, audit: Mapping[str, Any]) -> Chunk:
    """An audit as it is shown: equal continuations together, the most similar first."""
    student = cut(str(audit.get("text") or ""))
    written = [cut(str(text)) for text in audit.get("continuations") or []]
    similarity = [finite(value) for value in audit.get("similarity") or []]
    similarity += [None] * (len(written) - len(similarity))
    counted = Counter(zip(written, similarity, strict=False))
    grouped = [Continuation(compare(student, text), times, like) for (text, like), times in counted.items()]
    grouped.sort(key=lambda c: (-(c.similarity or 0.0), -c.times))
    k_sem, pi_bar, target = (finite(audit.get(name)) for name in ("k_sem", "pi_bar", "target"))
    return Chunk(number, audit["start"], audit["length"], student, grouped, len(written), k_sem, pi_bar, target)


def stretches(all_tokens: Sequence[Token], chunks: Sequence[Chunk]) -> Iterator[tuple[Chunk | None, list[Token]]]:
    """The tokens in runs that lie in the same chunk, or in none."""
    owner: dict[int, int] = {}
    for c in chunks:
        for i in range(c.start, c.start + c.length):
            owner.setdefault(i, c.number)
    for number, group in groupby(enumerate(all_tokens), key=lambda pair: owner.get(pair[0], 0)):
        yield (chunks[number - 1] if number else None), [token for _, token in group]


def sheet(anchor: str, row: Row, entropy: Scale, credit: Scale | None) -> Sheet:
    """Prepare one rollout."""
    shown = tokens(row, entropy, credit)
    audits: Sequence[Mapping[str, Any]] = row.get("audits") or []
    chunks = [chunk(n, audit) for n, audit in enumerate(sorted(audits, key=lambda a: a["start"]), 1)]
    nats = [v for v in per_token(row, "entropy") if v is not None]
    hidden = len(row.get("pieces") or []) - len(shown)
    mean = sum(nats) / len(nats) if nats else None
    return Sheet(anchor, row, list(stretches(shown, chunks)), chunks, hidden, mean)


def look_inside(runs: Sequence[Run], budget: int = BUDGET) -> list[Inside]:
    """Rollouts of the first, middle and last kept step of each run, within the budget shared by all runs."""
    found: list[Inside] = []
    for colour, run in enumerate(runs):
        rows = {step: run.rollouts(step) for step in first_middle_last(run.rollout_steps)}
        every = [row for kept in rows.values() for row in kept]
        if not every:
            continue
        entropy, credit = _scale(every, "entropy", "nats"), credit_scale(every)
        share = budget // (len(runs) * len(rows))
        kept: list[Kept] = []
        for step, at_step in rows.items():
            verdicts = [v for row in at_step if (v := finite(row.get("verdict"))) is not None]
            right = sum(v >= 1 for v in verdicts) if verdicts else None
            made = (sheet(f"r{colour}s{step}n{n}", row, entropy, credit) for n, row in enumerate(choose(at_step)))
            kept.append(Kept(step, len(at_step), right, list(_affordable(made, share))))
        found.append(Inside(run, colour, entropy, credit, kept))
    return found


def _affordable(sheets: Iterator[Sheet], budget: int) -> Iterator[Sheet]:
    """The sheets that fit into `budget` characters of HTML together."""
    for one in sheets:
        if one.cost <= budget:
            budget -= one.cost
            yield one
