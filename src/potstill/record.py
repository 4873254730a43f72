"""What a step writes down: rows for metrics.jsonl, and rollouts for people to read. Every key is in `potstill.logged`."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from types import MappingProxyType
from typing import Any

from potstill.metrics import repetition
from potstill.types import Feedback, Rollout, Target, Usage
from potstill.verifiers.base import Verifier

Row = dict[str, Any]
VERDICTS = ("accepted", "repaired", "rejected", "unanswered")
"""What is said of the texts of a teacher that may write something else, and of its silence."""


def degenerate(group: Sequence[Rollout]) -> bool:
    """Whether the student's answers to a prompt all score alike, so that comparing them teaches nothing."""
    return len(set(_judged(group))) == 1


def _judged(group: Sequence[Rollout]) -> list[float]:
    return [r.verdict for r in group if r.author == "student" and r.verdict is not None]


def rollout_means(verifier: Verifier, groups: Sequence[Sequence[Rollout]]) -> Row:
    """About what was written in a step: the student's answers where there are any, else the others."""
    rollouts = [r for group in groups for r in group]
    mine = [r for r in rollouts if r.author == "student" and not r.guided] or rollouts
    verdicts = [r.verdict for r in mine if r.verdict is not None]
    known: dict[str, list[float] | list[bool]] = {
        "entropy": [h for r in mine for h in (r.entropy or ())[r.guided :]],
        "verdict": verdicts,
        "format_failure": [verifier.extract(r.text()) is None for r in mine if r.verdict is not None],
        "degenerate": [degenerate(group) for group in groups if len(_judged(group)) > 1],
    }
    row = {
        "tokens": sum(len(r.response_ids) for r in rollouts),
        "length": fmean(len(r.response_ids) for r in mine),
        "truncated": fmean(r.finish == "length" for r in mine),
        "repetition": fmean(repetition(r.response_ids) for r in mine),
    }
    return row | _examples(groups) | {name: fmean(values) for name, values in known.items() if values}


def _examples(groups: Sequence[Sequence[Rollout]]) -> Row:
    """Teacher answers among the student's: for how many prompts there were some, and how many were accepted."""
    asked = [r for group in groups for r in group if r.tries]
    if not asked:
        return {}
    return {
        "examples/share": len(asked) / len(groups),
        "examples/found": fmean(r.right > 0 for r in asked),
        "examples/accepted": sum(r.right for r in asked) / sum(r.tries for r in asked),
    }


def usage(said: Sequence[Feedback], rollouts: Sequence[Rollout]) -> Row:
    """What the teacher read and wrote, and how its continuations ended."""
    said = [f for f in said if f.ask.of == "teacher"]
    total = sum([f.usage for f in said] + [r.usage for r in rollouts], Usage())
    row: Row = {"teacher/read": total.read, "teacher/cached": total.cached, "teacher/written": total.written}
    ends = [end for f in said for end in f.finishes]
    if not ends:
        return row
    asked = sum(f.ask.n * (f.ask.length or 0) for f in said)
    written = sum(f.usage.written for f in said)
    return row | {"teacher/stopped": fmean(e == "stop" for e in ends), "teacher/length_ratio": written / asked}


def manners(notes: Mapping[str, int]) -> Row:
    """How many texts of a step could be used; nothing about a teacher that is a mere model."""
    if not notes:
        return {}
    return {f"teacher/{what}": sum(n for note, n in notes.items() if note.startswith(what)) for what in VERDICTS}


def describe(target: Target, step: int, told: Mapping[str, Any] = MappingProxyType({})) -> Row:
    """A rollout and all that is known about it, as a row of rollouts/step_N.jsonl; `told` comes beside `target.info`."""
    r = target.rollout

    def numbers(values: Any) -> list[float | None] | None:
        return None if values is None else [None if x != x else round(float(x), 5) for x in values]

    return {
        "step": step,
        "id": r.prompt.id,
        "sample": r.sample,
        "author": r.author,
        "guided": r.guided,
        "messages": [dict(m) for m in r.prompt.messages],
        "answer": r.prompt.answer,
        "pieces": list(r.pieces),
        "entropy": numbers(r.entropy),
        "old_logp": numbers(r.old_logp),
        "weight": numbers(target.weight),
        "anchor": numbers(target.anchor),
        "advantage": numbers(target.advantage),
        "imitate": numbers(target.imitate),
        "verdict": r.verdict,
        "finish": r.finish,
        "policy_version": r.policy_version,
        "info": {name: numbers(values) for name, values in {**target.info, **told}.items()},
        "audits": [{name: getattr(a, name) for name in a.__slots__} for a in target.audits],
    }
