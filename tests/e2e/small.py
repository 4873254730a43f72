"""Runs of a second: a recipe for the bundled models, and the command line called in this process."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from potstill import cli

RECIPE = """\
name = "tiny"
steps = 2
student.path = "lab/student"
teacher.path = "lab/teacher"
task.kind = "arithmetic"
method.name = "opd"
rollouts = {prompts = 4}
eval = {questions = 8, samples = 2, every = 2}
save = {every = 2, rollouts_every = 2}
"""

GROUP = "rollouts={prompts=2, group=3}"
OVERRIDES: dict[str, tuple[str, ...]] = {
    "opd": (),
    "sampled_kl": ("method.name=sampled_kl",),
    "sft": ("method.name=sft",),
    "omniopd": (
        "method={name='omniopd', chunks=3, continuations=2, chunk_length=3, similarity='exact', baseline='own'}",
        "teacher.text_only=true",
    ),
    "dagger": ("method={name='dagger', chunks=3, chunk_length=3}", "teacher.text_only=true"),
    "sgopd": ("method={name='sgopd', reference='start', phased={share=0.5}}", GROUP),
    "grpo": ("method={name='grpo', kl=0.1}", "teacher=NONE", "rollouts={prompts=4, group=3}", "learner.updates=2"),
    "mix": (
        "method={name='mix', cosine_every=1, phased={share=0.5, mode='prefix', loss='topk'}}",
        "rollouts={prompts=4, group=4}",
    ),
    "exopd": ("method.name=exopd", "reference.path=lab/teacher", "method.reference=base", "teacher.path=lab/student"),
    "opdvr": ("method.name=opdvr", "rollouts={prompts=4, horizon={start=8}, ahead=true}"),
    "grpd": ("method.name=grpd", GROUP, "rollouts.resample=2"),
    "rlsd": ("method.name=rlsd", GROUP),
    "r2opd": ("method.name=r2opd", "method.mean=sequence", "teacher={path='lab/foreign', align=true}"),
    "poweropd": ("method.name=poweropd", "select={by='tip'}", "geometry.every=1", "projection={from='random', at=0.0}"),
    "reopold": ("method.name=reopold", "budget.rollout_tokens=200", "steps=NONE"),
}
"""What turns RECIPE into a run of each method."""


class Ended(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


Command = Callable[..., Ended]


def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """`potstill ARGUMENTS` in this process."""

    def run(*arguments: object) -> Ended:
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            cli.main([str(a) for a in arguments])
        code = end.value.code
        out, err = capsys.readouterr()
        return Ended(code if isinstance(code, int) else int(code is not None), out, err)

    return run


def refused(ended: Ended, *words: str) -> None:
    """Exit code 2 and one message that holds all the words; no traceback."""
    message = " ".join(ended.err.split())
    assert "Traceback" not in message, message
    assert ended.code == 2, message
    assert message.count("potstill:") == 1, message
    for word in words:
        assert word in message, f"{word!r} is not in: {message}"
    assert len(message) < 1200, message


def recipe(folder: Path, text: str = RECIPE) -> Path:
    """A recipe file in `folder`."""
    path = folder / "tiny.toml"
    path.write_text(text, encoding="utf-8")
    return path


def parsed(*overrides: str) -> Any:
    """RECIPE as a Config, with overrides."""
    from potstill import recipes

    raw = recipes.tomllib.loads(RECIPE)
    for override in overrides:
        key, _, value = override.partition("=")
        if value == "NONE":
            del raw[key]
        else:
            recipes._apply(raw, override)
    return recipes.parse(raw)
