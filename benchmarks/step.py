"""Whole training steps, sampling and teacher included: OPD, GRPO and SFT against TRL's trainers."""

from importlib import import_module
from typing import Any

from benchmarks.case import ROOT, Case, Goal, Params
from benchmarks.models import SMOLLM2

LAB = str(ROOT / "src/potstill/lab/models")
ARITHMETIC = {"kind": "arithmetic"}


def recipe(student: str, task: Params, method: Params, rollouts: Params, steps: int, teacher: str = "") -> Params:
    """A run without evaluations, saved once at its end, which is not measured."""
    return {
        "name": "benchmark",
        "steps": steps,
        "student": {"path": student},
        **({"teacher": {"path": teacher}} if teacher else {}),
        "task": task,
        "method": method,
        "rollouts": rollouts,
        "learner": {"lr": 1e-4},
        "eval": {"questions": 0},
        "save": {"every": 10**6, "rollouts_every": 10**6},
    }


def pair(student: str, teacher: str, task: Params, rollouts: Params, steps: int) -> Params:
    """Reverse KL between two models."""
    method = {"name": "opd", "beta": 1.0}
    return {
        "recipe": recipe(student, task, method, rollouts, steps, teacher),
        "student": student,
        "teacher": teacher,
    }


def lab(method: Params, rollouts: Params, steps: int) -> Params:
    """The bundled student without a teacher."""
    return {"recipe": recipe(f"{LAB}/student", ARITHMETIC, method, rollouts, steps), "student": f"{LAB}/student"}


def cases(smoke: bool) -> list[Case]:
    """`{out}` stands for the folder with the built models."""
    steps = 2 if smoke else 6
    vocab = 300 if smoke else 32_000
    length = 16 if smoke else 128
    random = pair(
        f"{{out}}/student-{vocab}",
        f"{{out}}/teacher-{vocab}",
        {"kind": "jsonl", "path": "{out}/prompts.jsonl"},
        {"prompts": 2 if smoke else 8, "max_tokens": length},
        steps,
    )
    batch = 4 if smoke else 32
    many = 2 if smoke else 20
    group = 2 if smoke else 4
    same = {"losses": 1e-4, "grad_norms": 1e-3}
    own = pair(f"{LAB}/student", f"{LAB}/teacher", ARITHMETIC, {"prompts": batch, "max_tokens": 48}, many)
    groups = {"prompts": batch // group, "group": group, "max_tokens": 48}
    rewards = lab({"name": "grpo", "std": False}, groups, many)
    answers = lab({"name": "sft", "source": "data"}, {"prompts": batch, "max_tokens": 48}, many)
    out = [
        Case(
            name="step-opd-32k",
            subject="step",
            title=f"OPD step, V = {vocab:,}, ragged, batch 8",
            params=random,
            goals=(
                Goal(measure="cpu_s", peer="trl", at_least=2.5),
                Goal(measure="rss_mb", peer="trl", at_least=2.0),
            ),
            equal=same,
            models=(f"student-{vocab}", f"teacher-{vocab}"),
        ),
        Case(
            name="step-opd-lab",
            subject="step",
            title=f"OPD step, lab models, batch {batch}",
            params=own,
            goals=(
                Goal(measure="cpu_s", peer="trl", at_least=3.0),
                Goal(measure="rss_mb", peer="trl", at_least=2.0, note="mostly imported libraries on both sides"),
            ),
            equal=same,
        ),
        Case(
            name="step-grpo-lab",
            subject="step",
            title=f"GRPO step, lab student, {batch // group} prompts x {group}",
            params=rewards,
            goals=(Goal(measure="cpu_s", peer="trl", at_least=1.5), Goal(measure="rss_mb", peer="trl")),
            equal=same,
        ),
        Case(
            name="step-sft-lab",
            subject="step",
            title=f"SFT step, lab student, batch {batch}",
            params=answers,
            goals=(Goal(measure="cpu_s", peer="trl"), Goal(measure="rss_mb", peer="trl")),
            equal=same,
        ),
    ]
    return out if smoke else [*out, _smollm2()]


def _smollm2() -> Case:
    return Case(
        name="step-opd-smollm2",
        subject="step",
        title="OPD step, SmolLM2-135M and a copy with noise, batch 8",
        params=pair(
            str(ROOT / SMOLLM2),
            "{out}/smollm2-teacher",
            {"kind": "jsonl", "path": "{out}/prompts.jsonl"},
            {"prompts": 8, "max_tokens": 64},
            3,
        ),
        goals=(Goal(measure="cpu_s", peer="trl"), Goal(measure="rss_mb", peer="trl")),
        equal={"losses": 1e-4, "grad_norms": 1e-3},
        models=("smollm2-teacher",),
        needs=SMOLLM2,
    )


def ours(params: Params) -> dict[str, Any]:
    """A run of ours."""
    found: dict[str, Any] = import_module("benchmarks.ours").steps(params)
    return found


def trl(params: Params) -> dict[str, Any]:
    """The same steps by TRL."""
    found: dict[str, Any] = import_module("benchmarks.trainers").steps(params)
    return found


SIDES = {"ours": ours, "trl": trl}
