"""Every command of the README and of the guides does what it says.

Those in `bash` blocks run, one after the other, in one empty folder; training and questions are cut short by what is
put behind them (SHORT). Commands that install, fetch or take minutes stand in `sh` blocks, and in RUN_ELSEWHERE: of
these, make targets have to exist, and potstill's verbs have to have the options.
"""

import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.e2e.small import Command, command

ROOT = Path(__file__).parents[2]
PAGES = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")))
SHORT = {
    "train": ["steps=2", "rollouts.prompts=2", "eval.questions=4", "eval.samples=2"],
    "eval": ["--questions", "4", "--samples", "2"],
}
RUN_ELSEWHERE = {("demo",), ("lab", "build")}
"""test_demo.py, test_lab.py"""


def commands(page: str, language: str) -> Iterator[list[str]]:
    """The lines of the blocks in one language, as words."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for block in re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line.removeprefix("$ "), comments=True)
            if words:
                yield words


@pytest.fixture
def potstill(capsys: pytest.CaptureFixture[str]) -> Command:
    return command(capsys)


@pytest.mark.parametrize("page", PAGES)
def test_commands_in_bash_blocks_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, potstill: Command):
    monkeypatch.chdir(tmp_path)
    for program, *arguments in commands(page, "bash"):
        assert program in ("potstill", "make"), f"{program} belongs into a ```sh block, for it cannot be tried here"
        if program == "make":
            make(arguments)
            continue
        if tuple(arguments[:1]) in RUN_ELSEWHERE or tuple(arguments[:2]) in RUN_ELSEWHERE:
            arguments = [*(a for a in arguments if not a.startswith("-") and a in ("demo", "lab", "build")), "--help"]
        ended = potstill(*arguments, *SHORT.get(arguments[0], []))
        assert ended.code == 0, f"{shlex.join([program, *arguments])}: {ended.err or ended.out}"


@pytest.mark.parametrize("page", PAGES)
def test_make_targets_exist(page: str):
    for program, *arguments in commands(page, "sh"):
        if program == "make":
            make(arguments)


def make(arguments: list[str]) -> None:
    done = subprocess.run(["make", "-n", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_readme_has_commands():
    assert any(words[0] == "potstill" for words in commands("README.md", "bash"))
