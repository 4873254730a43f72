"""Peak memory of an OPD step against the length of the answers."""

from benchmarks import step
from benchmarks.case import Case, Goal

SIDES = step.SIDES


def cases(smoke: bool) -> list[Case]:
    """Answers that all have the full length."""
    vocab = 300 if smoke else 32_000
    names = (f"student-{vocab}-dense", f"teacher-{vocab}-dense")
    return [
        Case(
            name=f"memory-{length}",
            subject="memory",
            title=f"OPD step, V = {vocab:,}, batch 4, all answers of {length} tokens",
            params=step.pair(
                f"{{out}}/{names[0]}",
                f"{{out}}/{names[1]}",
                {"kind": "jsonl", "path": "{out}/prompts.jsonl"},
                {"prompts": 2 if smoke else 4, "max_tokens": length},
                2,
            ),
            goals=(Goal(measure="rss_mb", peer="trl"), Goal(measure="cpu_s", peer="trl")),
            equal={"losses": 1e-4, "grad_norms": 1e-3},
            models=names,
        )
        for length in ((8, 12) if smoke else (64, 128, 256, 512))
    ]
