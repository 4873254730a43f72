"""Planted faults: each ends with exit code 2 and one message that names the value and the way out."""

import asyncio
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.e2e.small import OVERRIDES, Command, Ended, command, parsed, recipe, refused

from potstill import loop, models
from potstill.build import build
from potstill.errors import TeacherError, TrainingError
from potstill.lab import model_path
from potstill.run import Run, load_run
from potstill.spent import Spent
from potstill.types import Turn
from potstill.writing import Writing


@pytest.fixture
def potstill(capsys: pytest.CaptureFixture[str]) -> Command:
    return command(capsys)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory with tiny.toml and lab models to spoil: ./student and ./teacher."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    recipe(tmp_path)
    return tmp_path


def copy(name: str, to: Path) -> Path:
    return Path(shutil.copytree(model_path(name), to))


def edit(path: Path, **values: Any) -> None:
    """Set top-level fields of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | values), encoding="utf-8")


RECIPES = {
    "unknown field": (["learner.learning_rate=1"], "learner.learning_rate: ", "lr, micro_batch"),
    "misspelt field": (["learner.warmpu=1"], "learner.warmpu", "did you mean 'warmup'?"),
    "misspelt table": (["learnr.lr=1"], "learnr: ", "did you mean 'learner'?"),
    "misspelt field of the method": (["method.betta=1"], "method.betta", "did you mean 'beta'?"),
    "misspelt field of the task": (["task.digit=[2]"], "task.digit", "did you mean 'digits'?"),
    "misspelt field deep down": (
        ["task={kind='jsonl', path='x', verify={kind='exact', patern='x'}}"],
        "patern",
        "did you mean 'pattern'?",
    ),
    "misspelt field of lora": (["student.lora.rnk=1"], "student.lora.rnk", "did you mean 'rank'?"),
    "several faults at once": (
        ["steps=0", "learner.lr=-1", "method.beta=2"],
        "steps = 0",
        "learner.lr = -1",
        "method.beta = 2",
    ),
    "out of range": (["method.beta=1.5"], "method.beta = 1.5", "less than or equal to 1"),
    "not a number": (["learner.lr=fast"], "learner.lr = 'fast'", "valid number"),
    "infinite": (["learner.lr=inf"], "learner.lr = inf", "finite"),
    "no name": (["name=../x"], "name = '../x'", "pattern"),
    "no override": (["steps"], "'steps' is no override", "key=value"),
    "override inside a value": (["steps.x=1"], "steps is a value, not a table"),
    "unknown method": (["method.name=opdd"], "no method 'opdd'", "did you mean 'opd'?", "omniopd"),
    "method that is no name": (["method.name=5"], "method.name", "5"),
    "no method": (["method={}"], "[method] needs name"),
    "method file that is missing": (["method.name=mine.py:Mine"], "no file mine.py", "path/to/file.py:Class"),
    "unknown task": (["task.kind=arithmetics"], "no task 'arithmetics'", "did you mean 'arithmetic'?"),
    "unknown similarity": (["method={name='omniopd', similarity='rouge'}"], "method.similarity = 'rouge'", "'rouge1'"),
    "no teacher": (["method.name=omniopd"], "omniopd learns from a teacher (text)", "Add [teacher]"),
    "no teacher for sft": (["method.name=sft"], "sft learns from a teacher (its answers)", "Add [teacher]"),
    "teacher without effect": (["method={name='sft', source='data'}"], "asks no teacher", "Remove the table"),
    "text teacher for opd": (["teacher.text_only=true"], "opd needs its whole distribution", "Use method omniopd"),
    "greedy teacher": (
        [*OVERRIDES["omniopd"], "teacher.temperature=0"],
        "teacher.temperature = 0",
        "the same text",
        "Set teacher.temperature = 1",
    ),
    "greedy teacher, many answers": (
        ["method.name=sft", "teacher.temperature=0", "rollouts.group=2"],
        "rollouts.group = 2",
        "teacher.temperature = 0",
    ),
    "data set, many answers": (
        ["method={name='sft', source='data'}", "rollouts.group=2"],
        "rollouts.group = 2",
        "rollouts.group = 1",
    ),
    "temperature without effect": (
        ["teacher.temperature=0.7"],
        "teacher.temperature",
        "no effect",
        "teacher_temperature",
    ),
    "chunks longer than answers": (
        ["method.name=omniopd", "teacher.text_only=true"],
        "method.chunk_length = 50",
        "rollouts.max_tokens = 48",
    ),
    "tokenizer mismatch": (
        ["teacher.path=lab/foreign"],
        "do not share a tokenizer",
        "lab/student has 23 tokens, lab/foreign has",
        "teacher.align = true",
        "omniopd",
    ),
    "aligned to its own tokenizer": (["teacher.align=true"], "lab/teacher has the student's own", "no effect"),
    "aligned, but text only": (
        ["teacher={path='lab/foreign', align=true, text_only=true}"],
        "teacher.text_only leaves only text",
    ),
    "aligned without scores": (
        [*OVERRIDES["omniopd"], "teacher={path='lab/foreign', align=true}"],
        "omniopd as set here asks for none",
        "such as opd",
    ),
    "aligned server for top-k": (
        [
            "method.top_k=4",
            "teacher={kind='http', base_url='http://localhost:1/v1', tokenizer='lab/foreign', align=true}",
        ],
        "do not say which the student's would be",
        "Use sampled_kl",
    ),
    "unknown lab model": (["student.path=lab/studnet"], "no lab model 'studnet'", "did you mean 'student'?"),
    "missing model folder": (["student.path=./nowhere"], "no folder ./nowhere", "lab/NAME"),
    "missing gguf file": (["student.path=nowhere.gguf"], "no file nowhere.gguf"),
    "eos that is no token": (["student.eos=['<end>']"], "no token '<end>'"),
    "no GPU": (["student.device=cuda"], "device = 'cuda'", "no GPU", "'cpu'"),
    "no such device": (["teacher.device=gpu"], "device = 'gpu'", "'cuda'"),
    "lora on no layer": (["student.lora.modules=['nothing']"], "student.lora.modules", "nothing"),
    "answers longer than the context": (["rollouts.max_tokens=125"], "may take 125", "reads 128", "lower max_tokens"),
    "more questions than there are": (["eval.questions=100000"], "were asked for, but there are", "fewer"),
    "more prompts than there are": (["rollouts.prompts=100000"], "were asked for, but there are", "fewer"),
    "warm-up without end": (["learner.warmup=2"], "learner.warmup = 2", "steps = 2", "Lower warmup"),
    "learning rate that breaks everything": (["learner={lr=10, schedule='linear'}"], "learner.lr = 10", "1e-3"),
    "missing data": (["task={kind='jsonl', path='nowhere.jsonl'}"], "nowhere.jsonl cannot be read", "JSON Lines"),
}
DROP_TEACHER = {"no teacher", "no teacher for sft", "data set, many answers"}


@pytest.mark.parametrize("fault", RECIPES)
def test_a_faulty_recipe_is_refused_and_leaves_nothing(fault: str, here: Path, potstill: Command):
    overrides, *words = RECIPES[fault]
    if fault in DROP_TEACHER:
        text = (here / "tiny.toml").read_text().replace('teacher.path = "lab/teacher"\n', "")
        recipe(here, text)
    if fault == "no GPU" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    refused(potstill("train", "tiny.toml", *overrides), *words)
    assert not (here / "runs").exists()
    if fault != "lora on no layer":  # the layers' names are known once the model is loaded
        refused(potstill("check", "tiny.toml", *overrides), *words)


def test_files_that_are_no_recipe(here: Path, potstill: Command):
    refused(potstill("train", "tiny.tml"), "no recipe 'tiny.tml'", "demo-opd")
    refused(potstill("train", "demo-odp"), "did you mean 'demo-opd'?")
    (here / "broken.toml").write_text('name = "x\n')
    refused(potstill("train", "broken.toml"), "broken.toml is not TOML", "line 1")
    (here / "bytes.toml").write_bytes(b"name = '\xff'\n")
    refused(potstill("train", "bytes.toml"), "bytes.toml", "UTF-8")
    assert not (here / "runs").exists()


def test_faulty_data(here: Path, potstill: Command):
    data = here / "data.jsonl"
    train = ("train", "tiny.toml", "task={kind='jsonl', path='data.jsonl', holdout=0.4}", "eval.questions=2")
    data.write_text("")
    refused(potstill(*train), "data.jsonl is empty", '"prompt"')
    data.write_text('{"prompt": "1*2=", "answer": "2"}\n{"prompt": \n')
    refused(potstill(*train), "data.jsonl:2", "JSON")
    data.write_text('{"question": "1*2=", "answer": "2"}\n')
    refused(potstill(*train), "no column 'prompt'", "question")
    rows = [{"prompt": f"{i}" * 30 + "*2=", "answer": "2"} for i in range(1, 10)] * 1
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    refused(potstill(*train), "were asked for, but the data set has")
    long = [{"prompt": f"{i}*" + "1" * 90 + "=", "answer": "2"} for i in range(100)]
    data.write_text("".join(json.dumps(row) + "\n" for row in long))
    refused(potstill(*train), "tokens and its answer may take 48", "reads 128", "Shorten or drop")
    assert not (here / "runs").exists()


def test_packing_that_would_have_no_effect(here: Path, potstill: Command):
    (here / "mine.py").write_text(
        "from typing import ClassVar\nfrom potstill.methods.sft import SFT\n\n\n"
        "class Whole(SFT):\n    per_token: ClassVar[bool] = False\n"
    )
    overrides = ("method.name=mine.py:Whole", "learner.packed=true")
    refused(potstill("train", "tiny.toml", *overrides), "learner.packed", "no effect", "whole answers", "micro_tokens")
    assert not (here / "runs").exists()


def test_folders_that_are_no_model(here: Path, potstill: Command):
    (here / "empty").mkdir()
    refused(potstill("train", "tiny.toml", "student.path=./empty"), "./empty", "causal language model", "config.json")
    refused(potstill("train", "tiny.toml", "student.path=nobody/nothing"), "nobody/nothing", "hub name")
    cut = copy("student", here / "cut") / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:5000])
    refused(potstill("train", "tiny.toml", "student.path=./cut"), "weights of ./cut", "complete")
    tokenizer = copy("student", here / "torn") / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text()[:200])
    refused(potstill("train", "tiny.toml", "student.path=./torn"), "./torn cannot be loaded")
    config = copy("student", here / "odd") / "config.json"
    config.write_text("{")
    refused(potstill("train", "tiny.toml", "student.path=./odd"), "./odd cannot be loaded")
    assert not (here / "runs").exists()


def test_a_tokenizer_longer_than_the_vocabulary(here: Path, potstill: Command):
    weights = copy("student", here / "short") / "model.safetensors"
    edit(here / "short" / "config.json", vocab_size=20)
    state = load_file(weights)
    rows = ("model.embed_tokens.weight", "lm_head.weight")
    save_file({k: v[:20].clone() if k in rows else v for k, v in state.items()}, weights, {"format": "pt"})
    refused(
        potstill("train", "tiny.toml", "student.path=./short"), "23 tokens", "only 20 rows", "resize_token_embeddings"
    )
    assert not (here / "runs").exists()


def test_a_teacher_that_ends_elsewhere(here: Path, potstill: Command):
    edit(copy("teacher", here / "teacher") / "generation_config.json", eos_token_id=[1, 5])
    ended = potstill("train", "tiny.toml", "teacher.path=./teacher")
    refused(ended, "the teacher ends its answers with", "would grow to the limit", "Set student.eos = ")
    assert not (here / "runs").exists()


def test_a_student_whose_weights_are_no_numbers(here: Path, potstill: Command):
    weights = copy("student", here / "student") / "model.safetensors"
    state = load_file(weights)
    next(iter(state.values())).fill_(torch.nan)
    save_file(state, weights, {"format": "pt"})
    refused(potstill("train", "tiny.toml", "student.path=./student"), "step 1", "nan", "learning rate")
    run = load_run(here / "runs" / "tiny")
    assert run.metrics == []
    assert run.latest() is None
    assert [row["step"] for row in run.evals] == [0, 0]


def test_a_loss_that_is_no_number_leaves_the_weights_alone():
    config = parsed("steps=3")
    parts = build(config)
    before = {k: v.clone() for k, v in parts.learner.model.state_dict().items()}
    targets = asyncio.run(loop._step(config, parts, Writing(config, parts), 1, Spent(config, [])))[1]
    after = {k: v.clone() for k, v in parts.learner.model.state_dict().items()}
    assert any(not torch.equal(before[k], after[k]) for k in before)
    spoilt = [replace(t, weight=t.weight * float("inf")) for t in targets]
    with pytest.raises(TrainingError, match=r"step 2: loss is (nan|inf).*weights are those of step 1"):
        parts.learner.step(spoilt, parts.method, 2)
    assert all(torch.equal(v, parts.learner.model.state_dict()[k]) for k, v in after.items())


def test_too_few_continuations_and_missing_entropies():
    config = parsed(*OVERRIDES["omniopd"])
    parts = build(config)
    assert parts.teacher is not None
    [[rollout]] = asyncio.run(parts.sampler.sample(parts.questions[:1], 1, Turn(seed=0, step=1, max_tokens=48)))
    asks = parts.method.asks(rollout)
    said = asyncio.run(parts.teacher.feedback(asks))
    fewer = [replace(f, texts=f.texts[:-1]) for f in said]
    [[reviewed]] = loop.review([[rollout]], fewer)
    with pytest.raises(TeacherError, match=r"returned 1 of 2 continuations.*lower method.continuations"):
        parts.method.targets([reviewed])
    with pytest.raises(TrainingError, match=r"has none: its sampler does not return.*uniform"):
        parts.method.asks(replace(rollout, entropy=None))


def test_a_teacher_that_gives_up_in_the_middle(here: Path, monkeypatch: pytest.MonkeyPatch, potstill: Command):
    """A run of four steps whose teacher answers too little at the third: three rows are not written, two are."""
    from potstill.teachers.hf import HFTeacher

    answer, calls = HFTeacher.feedback, []

    async def fewer(self: HFTeacher, asks: Any) -> Any:
        said = await answer(self, asks)
        if asks[0].of == "teacher":
            calls.append(1)
        return said if len(calls) < 3 else [replace(f, texts=f.texts[:-1]) for f in said]

    monkeypatch.setattr(HFTeacher, "feedback", fewer)
    arguments = ("train", "tiny.toml", *OVERRIDES["omniopd"], "steps=4", "save.every=1")
    refused(potstill(*arguments), "returned 1 of 2 continuations", "lower method.continuations")
    run = load_run(here / "runs" / "tiny")
    assert [row["step"] for row in run.metrics] == [1, 2]
    latest = run.latest()
    assert latest
    assert latest[0] == 2
    models.load(str(latest[1]))
    monkeypatch.setattr(HFTeacher, "feedback", answer)
    assert potstill(*arguments, "--resume").code == 0
    assert [row["step"] for row in run.metrics] == [1, 2, 3, 4]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """runs/tiny, two steps long, to be copied and spoilt."""
    root = tmp_path_factory.mktemp("finished")
    loop.train(parsed(), root)
    return root / "tiny"


@pytest.fixture
def run(finished: Path, here: Path) -> Run:
    return Run(Path(shutil.copytree(finished, here / "runs" / "tiny")))


def test_runs_that_cannot_go_on(run: Run, potstill: Command):
    before = sorted(p.name for p in run.path.rglob("*"))
    refused(potstill("train", "tiny.toml"), "runs/tiny exists already", "--resume", "name=")
    refused(potstill("train", "tiny.toml", "learner.lr=0.01", "--resume"), "another recipe: learner.lr", "new run")
    refused(potstill("train", "tiny.toml", "name=other", "--resume"), "runs/other does not exist")
    assert sorted(p.name for p in run.path.rglob("*")) == before
    (run.path / "resolved.json").write_text('{"name": ')
    refused(potstill("train", "tiny.toml", "--resume"), "resolved.json", "not JSON")
    refused(potstill("eval", "runs/tiny"), "resolved.json", "not JSON")
    (run.path / "resolved.json").unlink()
    refused(potstill("train", "tiny.toml", "--resume"), "no run directory")
    refused(potstill("report", "runs/tiny"), "no run directory")


@pytest.mark.parametrize("file", ["model.safetensors", "trainer.pt"])
@pytest.mark.parametrize("size", [0, 3000])
def test_a_damaged_checkpoint(file: str, size: int, run: Run, potstill: Command):
    path = run.path / "checkpoints" / "step_000002" / file
    path.write_bytes(path.read_bytes()[:size])
    metrics = run.metrics
    refused(potstill("train", "tiny.toml", "--resume"), "step_000002 is damaged", "latest")
    assert run.metrics == metrics
    if file == "model.safetensors":
        refused(potstill("eval", "runs/tiny"), "step_000002", "complete")


def test_a_checkpoint_that_is_gone(run: Run, potstill: Command):
    (run.path / "checkpoints" / "latest").write_text("step_000009\n")
    refused(potstill("train", "tiny.toml", "--resume"), "names step_000009", "missing")
    refused(potstill("eval", "runs/tiny"), "names step_000009", "missing")
    (run.path / "checkpoints" / "latest").unlink()
    refused(potstill("eval", "runs/tiny"), "no checkpoint yet", "save.every")


def test_a_damaged_record(run: Run, potstill: Command):
    path = run.path / "metrics.jsonl"
    path.write_text("{\n" + path.read_text())
    refused(potstill("train", "tiny.toml", "--resume"), "metrics.jsonl:1 is not JSON", "Remove that line")


def test_wrong_arguments(here: Path, run: Run, potstill: Command):
    refused(potstill("eval", "runs/tiny", "--split", "train"), "'train'", "validation and test")
    refused(potstill("eval", "runs/tiny", "--questions", "100000"), "were asked for, but there are")
    refused(potstill("eval", "lab/student"), "is no run", "--task")
    refused(potstill("eval", "lab/student", "--task", "arithmetics"), "arithmetics")
    refused(potstill("eval", "lab/student", "--task", "arithmetic", "digit=[2]"), "did you mean 'digits'?")
    refused(potstill("eval", "lab/student", "--task", "arithmetic", "--max-tokens", "500"), "may take 500", "reads 128")
    refused(potstill("sample", "lab/studnet", "1*2="), "did you mean 'student'?")
    refused(potstill("sample", "lab/student", ""), "is empty")
    refused(potstill("methods", "omniodp"), "did you mean 'omniopd'?")
    refused(potstill("report", "nowhere"), "nowhere does not exist", "runs/NAME")
    refused(potstill("report", "runs/tiny", "--out", "no/such/folder/page.html"), "no/such/folder")
    refused(potstill("demo", "--out", "runs"), "runs exists already", "--out")
    assert potstill("eval", "runs/tiny", "--samples", "0").code == 2  # the parser of the command line says why
    assert potstill("trian", "tiny.toml").code == 2
    (here / "file").write_text("")
    refused(potstill("train", "tiny.toml", "--root", "file"), "file", "folder")


# --- full disks and kills -----------------------------------------------------------------------------------------


@contextmanager
def small_disk(folder: Path, kib: int) -> Iterator[Path]:
    folder.mkdir()
    if (
        os.geteuid()
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", folder], capture_output=True
        ).returncode
    ):
        pytest.skip("only root can mount a small disk")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)  # a failed test's traceback may still hold a file


@pytest.mark.parametrize("kib", [8, 200, 700, 2500])
def test_a_full_disk(kib: int, here: Path, potstill: Command):
    """Too small for the run's folder, for the weights, for the optimiser, and for the second checkpoint."""
    with small_disk(here / "disk", kib) as disk:
        arguments = ("train", "tiny.toml", "steps=6", "save.every=1", "save.keep=9", "--root", "disk")
        refused(potstill(*arguments), "the disk is full", "--resume")
        if not (disk / "tiny").exists():
            assert list(disk.iterdir()) == []
            return
        run = load_run(disk / "tiny")
        assert [row["step"] for row in run.metrics] == list(range(1, len(run.metrics) + 1))
        assert not list((run.path / "checkpoints").glob(".*"))
        latest = run.latest()
        if latest:
            models.load(str(latest[1]))


def test_a_file_size_limit(here: Path):
    """What a quota does, for those who are not root."""
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000));"
        "from potstill.cli import main; main(['train', 'tiny.toml'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    refused(Ended(done.returncode, done.stdout, done.stderr), "the disk is full", "checkpoints/step_000002")
    assert not list((here / "runs" / "tiny" / "checkpoints").iterdir())
