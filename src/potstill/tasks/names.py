"""Help for a name that does not exist."""

from collections.abc import Iterable


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """ "did you mean 'answers'? " for the closest of the known names, or "" where none is close."""
    from rapidfuzz import fuzz, process

    match = process.extractOne(name, list(known), scorer=fuzz.ratio, score_cutoff=60)
    return f"did you mean {match[0]!r}? " if match else ""
