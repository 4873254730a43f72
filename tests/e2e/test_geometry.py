"""`potstill geometry` on a run of two steps, and its pages."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.e2e.small import RECIPE, Command, command, recipe

import potstill.geometry as package
from potstill import models
from potstill.geometry.inputs import read_inputs
from potstill.geometry.matrices import choose
from potstill.geometry.moments import input_moments


@pytest.fixture
def potstill(capsys: pytest.CaptureFixture[str]) -> Command:
    return command(capsys)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("geometry")
    recipe(folder, RECIPE.replace("save = {every = 2", "save = {every = 1"))
    return folder


@pytest.fixture(autouse=True)
def _there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))


def test_a_run_is_measured_from_its_own_start(potstill: Command) -> None:
    assert potstill("train", "tiny.toml", "learner.weight_decay=0.1").code == 0
    ended = potstill("geometry", "runs/tiny")
    assert ended.code == 0, ended.err
    assert "stable rank of dW" in ended.out
    assert "k = 512 was cut to half" in ended.out
    assert "Left out: 2 embeddings or output layer; 5 not a matrix (norms, biases)." in ended.out
    out = Path("runs/geometry-tiny")
    figures = json.loads((out / "geometry.json").read_text())
    assert [c["step"] for c in figures["checkpoints"]] == [1, 2]
    floors = {row["step"]: row["wd_floor"] for row in figures["rows"]}
    assert floors == pytest.approx({1: 1e-4, 2: 2e-4}, rel=1e-3), "lr 1e-3 times decay 0.1, once and twice"
    assert "tokens of tiny's rollouts" in figures["inputs"]
    assert sorted(p.name for p in out.iterdir()) == [
        "geometry.csv",
        "geometry.html",
        "geometry.json",
        "masks.npz",
        "vectors.npz",
    ]
    assert potstill("geometry", "runs/tiny").code == 2, "nothing is overwritten"


def test_matrices_that_read_the_same_inputs_share_their_sample() -> None:
    inputs = read_inputs("runs/tiny", [])
    names, _ = choose(inputs.w0, inputs.checkpoints)
    found = input_moments(inputs, names)
    assert found
    for name in names:
        module = found.first[name.matrix].rpartition("_proj")[0].rpartition(".")[2]
        assert module == {"k": "q", "v": "q", "up": "gate"}.get(name.module[:-5], name.module[:-5])
        assert found.samples[found.first[name.matrix]].shape[1] == name.n
    model = models.load(str(inputs.w0.path)).model
    read = model.model.layers[0].input_layernorm(model.model.embed_tokens.weight)
    sample = found.samples["model.layers.0.self_attn.q_proj.weight"]
    assert torch.cdist(sample, read).min(1).values.max() < 0.1, "what the first layer reads: a token's normed embedding"
    x = sample.double()
    torch.testing.assert_close(found.of("model.layers.0.self_attn.k_proj.weight"), x.T @ x / len(x))


def test_an_adapters_run_is_measured_through_its_factors(potstill: Command) -> None:
    assert potstill("train", "tiny.toml", "name=lora", "student.lora={rank=4,alpha=8}").code == 0
    assert potstill("geometry", "runs/lora", "--only", "attention").code == 0
    figures = json.loads(Path("runs/geometry-lora/geometry.json").read_text())
    assert {row["stored"] for row in figures["rows"]} == {"LORA"}
    assert all(row["srank"] <= 4 and row.get("hill_k8") is None for row in figures["rows"])
    Path("merged").mkdir()
    shutil.copy("runs/lora/checkpoints/step_000002/model.safetensors", "merged")
    merged = package.measure("lab/student", ["merged"], only="attention", k=16)
    rows = [row for row in figures["rows"] if row["step"] == 2]
    for one, other in zip(rows, merged.rows, strict=True):
        assert one["fro"] == pytest.approx(other["fro"], rel=1e-3)
        assert one["density"] == pytest.approx(other["density"], abs=1e-3)
        assert (one["stored"], other["stored"]) == ("LORA", "F32")


def test_a_run_that_kept_one_checkpoint_is_followed_through_its_recordings(potstill: Command) -> None:
    recorded = ("name=seen", "steps=4", "geometry={every=1, most=9.0}", "save={every=4, keep=1, rollouts_every=1}")
    assert potstill("train", "tiny.toml", *recorded).code == 0
    assert potstill("geometry", "runs/seen", "--only", "attention").code == 0
    figures = json.loads(Path("runs/geometry-seen/geometry.json").read_text())
    assert [c["step"] for c in figures["checkpoints"]] == [4]
    points = figures["recorded"]["aggregate"]["attention"]
    assert [p["step"] for p in points] == [1, 2, 3, 4]
    last = {row["matrix"]: row for row in figures["rows"]}
    for row in figures["recorded"]["rows"]:
        assert 0 < row["sim_V"] <= 1
        assert row["sim_V_null"] > row["sim_V_chance"]
        if row["step"] == 4:
            for name in ("fro", "srank", "hill_k16", "e16", "part_ratio"):
                assert row[name] == pytest.approx(last[row["matrix"]][name], rel=1e-4), name
    assert figures["inputs"], "noise passes through the layers' own inputs"
    page = Path("runs/geometry-seen/geometry.html").read_text(encoding="utf-8")
    assert "dW with the last dW, right" in page
    assert "Lines with 4 points are of what was recorded" in page


def test_the_pages_need_no_network(potstill: Command) -> None:
    ended = potstill("geometry", "compare", "runs/geometry-tiny", "runs/geometry-lora", "--out", "both.html")
    assert ended.code == 0, ended.err
    assert "at equal norm" in ended.out
    for page in (Path("runs/geometry-tiny/geometry.html"), Path("both.html")):
        text = page.read_text(encoding="utf-8")
        links = re.findall(r"""(?:src|href)="([^"#]+)""", text)
        assert [link for link in links if not link.startswith("data:")] == []
        assert "nan" not in re.findall(r'<path class="line[^"]*" d="([^"]*)"', text)
        assert text.count('<svg class="chart"') >= 8


def test_finished_geometries_are_compared_without_torch() -> None:
    code = """
import sys
from potstill import cli
try:
    cli.main(["geometry", "compare", "runs/geometry-tiny", "runs/geometry-lora"])
except SystemExit as end:
    assert not end.code, end.code
assert not {"torch", "transformers"} & sys.modules.keys()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_mistakes_are_one_message(potstill: Command) -> None:
    for arguments, said in (
        (("lab/student",), "has no update"),
        (("runs/tiny", "runs/tiny"), "stands for all its checkpoints"),
        (("compare", "runs/tiny", "runs/geometry-tiny"), "has no geometry.json"),
        (("compare", "runs/geometry-tiny"), "nothing to be compared with"),
    ):
        ended = potstill("geometry", *arguments, "--out", "new")
        assert ended.code == 2
        assert said in ended.err
