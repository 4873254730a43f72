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


def float8() -> None:
    changed("w1", lambda weights: weights.update({n: w.to(torch.float8_e4m3fn) for n, w in weights.items()}))


def cut_config() -> None:
    changed("w1", lambda weights: None)
    Path("w1/config.json").write_text("{")


def empty_index() -> None:
    shutil.copytree("w0", "w1")
    Path("w1/model.safetensors.index.json").write_text("{}")


def adapter_without_scale() -> None:
    adapter()
    Path("w1/adapter_config.json").write_text('{"peft_type": "LORA"}')


def half_an_adapter() -> None:
    adapter()
    file = "w1/adapter_model.safetensors"
    save_file({name: w for name, w in load_file(file).items() if "lora_A" in name}, file)


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
        (float8, ("w0", "w1"), ["none of 14 matrices can be measured", "torch.float8_e4m3fn", "Dequantise"]),
        (cut_config, ("w0", "w1"), ["w1/config.json is no JSON", "download it again"]),
        (empty_index, ("w0", "w1"), ["model.safetensors.index.json names no files"]),
        (adapter_without_scale, ("w0", "w1"), ["adapter_config.json has no lora_alpha"]),
        (half_an_adapter, ("w0", "w1"), ["lora_A.weight without base_model", "save the adapter again"]),
        (nothing, ("w0", "w0", "--device", "gpu"), ["device = 'gpu'", "Give cpu"]),
        (nothing, ("w0", "w0", "--device", "cuda:99"), ["device = 'cuda:99'", "GPU here"]),
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


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (
            lambda weights: weights.update({Q: weights[Q][:, :8].contiguous()}),
            "its shape is [32, 32] in w0 and [32, 8] in w1",
        ),
        (lambda weights: weights.pop(Q), "w1 does not have it"),
    ],
)
def test_a_matrix_of_another_shape_or_name_is_named(
    potstill: Command, change: Callable[[Weights], object], why: str
) -> None:
    changed("w1", change)
    ended = potstill("geometry", "w0", "w1", "--out", "out", "--cache", "cache")
    assert ended.code == 0, ended.err
    assert f"1 matrices could not be measured: {Q}" in ended.out
    figures = json.loads(Path("out/geometry.json").read_text())
    assert figures["matrices"] == 13
    assert figures["failed"] == {Q: why}


def test_what_an_adapter_was_not_meant_for_is_no_fault(potstill: Command) -> None:
    adapter()
    ended = potstill("geometry", "w0", "w1", "--out", "out", "--cache", "cache")
    assert ended.code == 0, ended.err
    assert "could not be measured" not in ended.out
    assert "12 not in every checkpoint" in ended.out


def test_one_bad_matrix_does_not_stop_the_others(potstill: Command) -> None:
    changed("w1", lambda weights: weights[Q].view(-1)[7].fill_(torch.nan))
    ended = potstill("geometry", "w0", "w1", "--out", "out", "--cache", "cache")
    assert ended.code == 0, ended.err
    assert f"1 matrices could not be measured: {Q}" in ended.out
    figures = json.loads(Path("out/geometry.json").read_text())
    assert len({row["matrix"] for row in figures["rows"]}) == 13
    assert "1 nan or infinite weights" in figures["failed"][Q]
