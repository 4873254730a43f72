"""Folders, adapters and runs as the geometry reads them, and what it refuses."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from tests import tiny

from potstill.errors import CheckpointError, ConfigError
from potstill.geometry.inputs import Adapter, Folder, read_inputs
from potstill.geometry.matrices import choose
from potstill.geometry.trajectory import later
from potstill.geometry.update import summarise_product, summarise_update


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A random model of two layers, in bf16 and in several files."""
    folder = tmp_path / "w0"
    tiny.model("llama", 40).to(torch.bfloat16).save_pretrained(folder, max_shard_size="20KB")
    return folder


def trained(folder: Path, to: Path, change: Callable[[str, torch.Tensor], torch.Tensor]) -> Path:
    """Another folder with other weights."""
    whole = Folder(folder)
    to.mkdir(parents=True)
    save_file({n: change(n, whole.read(n).float()).contiguous() for n in whole.shapes}, to / "model.safetensors")
    return to


def test_a_sharded_bf16_folder_is_read_as_transformers_reads_it(llama: Path):
    assert len(list(llama.glob("*.safetensors"))) > 1
    folder, state = Folder(llama), tiny.model("llama", 40).to(torch.bfloat16).state_dict()
    assert folder.shapes == {name: tuple(w.shape) for name, w in state.items()}
    assert all(torch.equal(folder.read(name), w) and folder.stored(name) == "BF16" for name, w in state.items())


def test_only_linear_layers_are_measured_and_the_rest_is_counted(llama: Path, tmp_path: Path):
    other = trained(llama, tmp_path / "w1", lambda n, w: w[:, :8] if n.endswith("0.mlp.up_proj.weight") else w)
    inputs = read_inputs(llama, [other])
    names, left = choose(inputs.w0, inputs.checkpoints)
    assert len(names) == 2 * 7 - 1
    assert left == {
        "embeddings or output layer": 2,
        "not a matrix (norms, biases)": 5,
        "of another shape in a checkpoint": 1,
    }
    attention, left = choose(inputs.w0, inputs.checkpoints, "attention")
    assert [(n.layer, n.module) for n in attention] == [(i, f"{p}_proj") for i in (0, 1) for p in "koqv"]
    assert left["not attention"] == 5
    with pytest.raises(ConfigError, match="did you mean 'attention'"):
        choose(inputs.w0, inputs.checkpoints, "atention")


def test_models_without_a_common_matrix_are_refused(llama: Path, tmp_path: Path):
    other = tmp_path / "other"
    tiny.model("llama", 40, hidden_size=64).save_pretrained(other)
    inputs = read_inputs(llama, [other])
    with pytest.raises(ConfigError, match="share no matrix to measure"):
        choose(inputs.w0, inputs.checkpoints)


@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapter_is_exactly_its_merged_model(tmp_path: Path, rslora: bool):
    base = tiny.model("llama", 40)
    base.save_pretrained(tmp_path / "w0")
    config = LoraConfig(
        r=4, lora_alpha=12, use_rslora=rslora, target_modules=["q_proj", "down_proj"], init_lora_weights=False
    )
    wrapped: Any = get_peft_model(base, config)
    wrapped.save_pretrained(tmp_path / "adapter")
    wrapped.merge_and_unload().save_pretrained(tmp_path / "merged")

    w0, adapter, merged = Folder(tmp_path / "w0"), Adapter(tmp_path / "adapter"), Folder(tmp_path / "merged")
    assert len(adapter.shapes) == 4
    for name, shape in adapter.shapes.items():
        assert shape == w0.shapes[name]
        start = w0.read(name)
        low, dense = adapter.update(name, start), merged.update(name, start)
        torch.testing.assert_close(low.w1, dense.w1, rtol=0, atol=1e-6)
        assert low.factors
        assert low.factors[2] == (6.0 if rslora else 3.0)
        a, b = summarise_product(*low.factors, ks=(4,)), summarise_update(dense.dw, (4,))
        assert a.stable_rank == pytest.approx(b.stable_rank, rel=1e-5)
        assert a.participation_ratio == pytest.approx(b.participation_ratio, rel=1e-5)
        torch.testing.assert_close(a.top.s[:4], b.top.s[:4], rtol=1e-5, atol=0)


def test_what_came_after_an_adapter_is_the_difference_of_two_products(tmp_path: Path):
    w0 = torch.zeros(20, 30)
    points = []
    for i in range(2):
        folder = tmp_path / str(i)
        folder.mkdir()
        (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "lora_alpha": 2 + i}))
        a, b = torch.randn(3, 30), torch.randn(20, 3)
        stem = "base_model.model.layers.0.q"
        save_file({f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}, folder / "adapter_model.safetensors")
        points.append(Adapter(folder).update("layers.0.q.weight", w0))
    found = later(points[0], points[1])
    assert found
    s = torch.linalg.svdvals((points[1].dw - points[0].dw).double())
    torch.testing.assert_close(found.s[:6], s[:6], rtol=1e-5, atol=0)
    assert later(points[0], points[0]) is None


def test_what_is_no_plain_product_must_be_merged(tmp_path: Path):
    for odd in ({"use_dora": True}, {"peft_type": "LOHA"}, {"alpha_pattern": {"q": 3}}):
        (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "lora_alpha": 2} | odd))
        with pytest.raises(ConfigError, match="Merge it into its base"):
            Adapter(tmp_path)


def test_an_adapter_needs_its_base_first(llama: Path, tmp_path: Path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="the start must be a whole model"):
        read_inputs(tmp_path, [llama])


def test_folders_that_cannot_be_read(llama: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match="has no update"):
        read_inputs(llama, [])
    with pytest.raises(CheckpointError, match="does not exist"):
        read_inputs(llama, [tmp_path / "nothing"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="no safetensors files"):
        read_inputs(llama, [tmp_path / "empty"])
    shards = sorted(llama.glob("*.safetensors"))
    cut = shutil.copytree(llama, tmp_path / "cut")
    (cut / shards[1].name).write_bytes(shards[1].read_bytes()[:100])
    with pytest.raises(CheckpointError, match="cut short"):
        read_inputs(llama, [cut])
    (cut / shards[1].name).unlink()
    with pytest.raises(CheckpointError, match=f"lacks {shards[1].name}"):
        read_inputs(llama, [cut])
    config = json.loads((llama / "config.json").read_text()) | {"quantization_config": {"quant_method": "gptq"}}
    (cut / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="quantised"):
        read_inputs(cut, [llama])


def test_steps_come_from_the_folders_names_if_they_grow(llama: Path, tmp_path: Path):
    folders = [
        shutil.copytree(llama, tmp_path / name) for name in ("checkpoint-500", "iter_0001000", "step_001500", "final")
    ]
    named = read_inputs(llama, list(folders[:3]))
    assert ([p.step for p in named.checkpoints], named.clock, named.total) == ([500, 1000, 1500], "names", 1500)
    for row in (folders, folders[1::-1]):
        counted = read_inputs(llama, list(row))
        assert ([p.step for p in counted.checkpoints], counted.clock) == (list(range(1, len(row) + 1)), "order")
    assert math.isclose(counted.total, 2)
