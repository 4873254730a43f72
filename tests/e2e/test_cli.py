"""The verbs, as a user types them."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tests.e2e.small import Command, command, parsed, recipe

import potstill as package
from potstill.recipes import packaged


@pytest.fixture
def potstill(capsys: pytest.CaptureFixture[str]) -> Command:
    return command(capsys)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny.toml and a finished runs/tiny, made through the Python interface."""
    folder = tmp_path_factory.mktemp("cli")
    recipe(folder)
    package.train(parsed(), folder / "runs", text=(folder / "tiny.toml").read_text())
    return folder


@pytest.fixture(autouse=True)
def _there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


@pytest.mark.parametrize("name", packaged())
def test_every_recipe_that_comes_with_potstill_can_be_read(name: str):
    text = packaged()[name].read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 30
    from potstill import recipes

    recipes.read(name)


def test_check(potstill: Command, folder: Path):
    ended = potstill("check", "tiny.toml", "learner.lr=5e-4", "method={name='sft'}")
    assert ended.code == 0, ended.err
    shown, _ = json.JSONDecoder().raw_decode(ended.out)
    assert shown["learner"]["lr"] == 5e-4
    assert shown["method"] == {"name": "sft", "source": "teacher"}
    assert "tiny.toml can run." in ended.out
    assert {p.name for p in folder.iterdir()} == {"tiny.toml", "runs"}


def test_train(potstill: Command, folder: Path):
    ended = potstill("train", "tiny.toml", "name=again", "method.name=sft", "method.source=data", "teacher.path=x")
    assert ended.code == 2
    ended = potstill("train", "tiny.toml", "name=again", "--root", "elsewhere")
    assert ended.code == 0, ended.err
    assert ended.err == ""
    assert "\x1b" not in ended.out, "no terminal, no colours and no bar"
    assert len(ended.out.splitlines()) < 20
    assert "potstill report elsewhere/again" in " ".join(ended.out.split())
    run = folder / "elsewhere" / "again"
    assert "# name=again" in (run / "config.toml").read_text()
    names = {"config.toml", "resolved.json", "env.json", "metrics.jsonl", "evals.jsonl", "rollouts", "checkpoints"}
    assert {p.name for p in run.iterdir()} - {".lock"} == names | {"finished.json"}
    first, second = (package.load_run(p).metrics for p in (run, "runs/tiny"))
    assert [row["loss"] for row in first] == [row["loss"] for row in second], "same seed, same numbers"


@pytest.mark.parametrize("what", ["runs/tiny", "runs/tiny/checkpoints/step_000002", "lab/student"])
def test_eval(what: str, potstill: Command):
    task = () if what == "runs/tiny" else ("--task", "arithmetic" if what == "lab/student" else "tiny.toml")
    few = ("--questions", "6", "--samples", "2")
    ended = potstill("eval", what, *task, *few, "--json")
    assert ended.code == 0, ended.err
    row = json.loads(ended.out)
    assert row["split"] == "test"
    assert row["questions"] == 6
    assert len(row["scores"]) == 6
    for name in ("avg@2", "pass@2", "maj@2", "format_failure", "truncated", "repetition", "length"):
        assert row[name]["low"] <= row[name]["value"] <= row[name]["high"]
    greedy = potstill("eval", what, *task, "--questions", "6", "--samples", "1", "--temperature", "0")
    assert greedy.code == 0
    assert "with 95 % intervals" in " ".join(greedy.out.split())


def test_eval_of_a_run_agrees_with_its_own_evaluation(potstill: Command):
    arguments = ("--questions", "8", "--samples", "2", "--split", "validation", "--json")
    row = json.loads(potstill("eval", "runs/tiny", *arguments).out)
    assert row["scores"] == package.load_run("runs/tiny").evals[-2]["scores"]


def test_eval_with_fields_of_the_task(potstill: Command):
    ended = potstill("eval", "lab/teacher", "--task", "arithmetic", "digits=[2]", "--questions", "4", "--json")
    assert ended.code == 0, ended.err


def test_sample(potstill: Command):
    ended = potstill("sample", "lab/teacher", "34*7=", "12*3=", "-n", "2", "--temperature", "0")
    assert ended.code == 0, ended.err
    assert ended.out.splitlines() == ["34*7= 4*7+0=28;3*7+2=23;#238"] * 2 + ["12*3= 2*3+0=6;1*3+0=3;#36"] * 2
    assert potstill("sample", "runs/tiny", "34*7=").code == 0


def test_report(potstill: Command, folder: Path):
    ended = potstill("report", "runs/tiny", "--out", "page.html")
    assert ended.code == 0, ended.err
    assert "Wrote page.html" in ended.out
    page = (folder / "page.html").read_text(encoding="utf-8")
    assert "tiny" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    (folder / "page.html").unlink()
    assert potstill("report", "runs/tiny").code == 0
    assert (folder / "runs" / "tiny" / "report.html").is_file()


def test_methods(potstill: Command):
    ended = potstill("methods")
    assert ended.code == 0
    for name in ("opd", "omniopd", "sft", "sampled_kl"):
        assert name in ended.out
        shown = potstill("methods", name)
        assert shown.code == 0
        assert re.search(r"^ +L += ", shown.out, re.M), "the equation"
        assert "default" in shown.out


def test_doctor(potstill: Command):
    ended = potstill("doctor")
    assert ended.code == 0, ended.out
    for word in ("Python", "torch", "bundled models", "GFLOP/s"):
        assert word in ended.out


@pytest.mark.parametrize(
    "verb", ["", "demo", "check", "train", "eval", "sample", "report", "methods", "doctor", "lab build"]
)
def test_help(verb: str, potstill: Command):
    ended = potstill(*verb.split(), "--help")
    assert ended.code == 0
    assert "Usage: potstill" in ended.out


def test_no_verb_shows_the_help(potstill: Command):
    assert "Usage: potstill" in potstill().out


def test_python_interface():
    run = package.load_run("runs/tiny")
    assert [row["step"] for row in run.metrics] == [1, 2]
    assert [(row["step"], row["name"]) for row in run.evals] == [(s, n) for s in (0, 2) for n in ("sampled", "greedy")]
    assert run.resolved["method"]["name"] == "opd"
    assert run.rollout_steps == [1, 2]
    assert len(run.rollouts(2)) == 4


LIGHT = [("--help",), ("train", "--help"), ("methods",), ("methods", "omniopd"), ("report", "runs/tiny")]


def test_light_verbs_do_not_import_torch():
    """In one process, for its start is what takes time; each verb ends by SystemExit."""
    code = f"""
import sys
from potstill.cli import main
for arguments in {LIGHT!r}:
    try:
        main(list(arguments))
    except SystemExit as end:
        assert not end.code, (arguments, end.code)
    heavy = {{"torch", "transformers", "datasets", "matplotlib"}} & sys.modules.keys()
    assert not heavy, (arguments, heavy)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
