"""`potstill geometry` on what it cannot measure: one message and exit code 2, or all but the bad matrix."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tests import tiny
from tests.e2e.small import Command, command, refused

Weights = dict[str, torch.Tensor]
Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def potstill(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    monkeypatch.chdir(tmp_path)
    tiny.model("llama", 40).save_pretrained("w0", max_shard_size="20KB")
    return command(capsys)


def changed(to: str, change: Callable[[Weights], object]) -> None:
    """A copy of w0 in one file, after `change` of its weights."""
    weights: Weights = {}
    for part in sorted(Path("w0").glob("*.safetensors")):
        weights |= load_file(part)
    weights = {name: w + 0.01 * torch.randn_like(w) for name, w in weights.items()}
    change(weights)
    Path(to).mkdir()
    save_file(weights, f"{to}/model.safetensors")


def other_shapes() -> None:
    tiny.model("llama", 40, hidden_size=64).save_pretrained("w1")


def other_names() -> None:
    def rename(weights: Weights) -> None:
        for name in list(weights):
            weights[f"backbone.{name}"] = weights.pop(name)

    changed("w1", rename)


def missing_shard() -> None:
    shutil.copytree("w0", "w1")
    sorted(Path("w1").glob("*.safetensors"))[1].unlink()


def nan_everywhere() -> None:
    changed("w1", lambda weights: [w.fill_(torch.nan) for w in weights.values()])


def quantised() -> None:
    shutil.copytree("w0", "w1")
    config = json.loads(Path("w1/config.json").read_text()) | {"quantization_config": {"quant_method": "awq"}}
    Path("w1/config.json").write_text(json.dumps(config))


def codes() -> None:
    changed("w1", lambda weights: weights.update({n: w.to(torch.int8) for n, w in weights.items()}))


def adapter() -> None:
    wrapped = get_peft_model(tiny.model("llama", 40), LoraConfig(r=2, target_modules=["q_proj"]))
    wrapped.save_pretrained("w1")


def nothing() -> None:
    return


@pytest.mark.parametrize(
    ("make", "arguments", "words"),
    [
        (other_shapes, ("w0", "w1"), ["share no matrix to measure", "of another shape in a checkpoint"]),
        (other_names, ("w0", "w1"), ["share no matrix to measure", "not in every checkpoint", "backbone."]),
        (missing_shard, ("w0", "w1"), ["w1 lacks model-", "its index names"]),
        (nan_everywhere, ("w0", "w1"), ["none of 14 matrices can be measured", "nan or infinite weights"]),
        (quantised, ("w0", "w1"), ["w1 is quantised", "Take the checkpoint it was made from"]),
        (codes, ("w0", "w1"), ["none of 14 matrices can be measured", "torch.int8", "Dequantise"]),
        (nothing, ("w0",), ["one checkpoint (w0) has no update", "Give the start first"]),
        (adapter, ("w1",), ["one checkpoint (w1) has no update"]),
        (adapter, ("w1", "w0"), ["w1 is an adapter", "Give its base first"]),
        (nothing, ("w0", "w0", "-k", "0"), ["k = 0 must be at least 1"]),
    ],
)
def test_one_message(potstill: Command, make: Callable[[], None], arguments: tuple[str, ...], words: list[str]) -> None:
    make()
    refused(potstill("geometry", *arguments, "--out", "out", "--cache", "cache"), *words)
    assert not Path("out").exists()


def test_a_k_beyond_a_matrix_is_cut_and_told(potstill: Command) -> None:
    changed("w1", lambda weights: None)
    ended = potstill("geometry", "w0", "w1", "-k", "4000", "--out", "out", "--cache", "cache")
    assert ended.code == 0, ended.err
    assert "k = 4000 was cut to half of the smaller side of 14 matrices" in ended.out


def test_one_bad_matrix_does_not_stop_the_others(potstill: Command) -> None:
    changed("w1", lambda weights: weights[Q].view(-1)[7].fill_(torch.nan))
    ended = potstill("geometry", "w0", "w1", "--out", "out", "--cache", "cache")
    assert ended.code == 0, ended.err
    assert f"1 matrices could not be measured: {Q}" in ended.out
    figures = json.loads(Path("out/geometry.json").read_text())
    assert len({row["matrix"] for row in figures["rows"]}) == 13
    assert "1 nan or infinite weights" in figures["failed"][Q]
