"""Where the weights come from, read one matrix at a time: model folders, LoRA adapters, runs.

    W0     a Hugging Face folder, a hub name or lab/NAME; of a run: its student
    W_t    a folder of the same model, an adapter trained on it, or a run, which stands for its checkpoints in order

A run trained in fp32 keeps its master weights in its checkpoints, so dW = W_t - W0 is exact; a run with an adapter has
dW = (alpha / r) B A, exact as well. Files in bf16 hold dW only to half a bf16 spacing (`floors.storage`).
"""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open

from potstill.errors import CheckpointError, ConfigError, ModelError
from potstill.geometry.checks import Matrix
from potstill.lab import model_path
from potstill.run import Run

Factors = tuple[Matrix, Matrix, float]
"""B [m, r], A [r, n] and alpha / r of a low-rank update."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """One matrix of one checkpoint."""

    w1: Matrix
    dw: Float[torch.Tensor, "m n"]
    """w1 - w0 in fp32."""
    factors: Factors | None = None
    """Of an adapter's update."""


@runtime_checkable
class Weights(Protocol):
    """A checkpoint."""

    path: Path
    shapes: dict[str, tuple[int, ...]]
    """Of every tensor, or of every matrix that an adapter adds to."""

    def stored(self, name: str) -> str:
        """The type of a tensor in the file: BF16, F32, ..."""
        ...

    def update(self, name: str, w0: Matrix) -> Update:
        """What became of one matrix."""
        ...


class Folder:
    """A model in Hugging Face format, perhaps in several safetensors files.

    Raises:
        CheckpointError: no safetensors, a missing or damaged file.
        ConfigError: a quantised model.
    """

    def __init__(self, path: Path):
        self.path = path
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._files: dict[str, Path] = {}
        self._types: dict[str, str] = {}
        config = path / "config.json"
        if config.is_file() and "quantization_config" in _json(config):
            raise ConfigError(
                f"{path} is quantised: its codes are not numbers on one scale, and two of them have no difference. "
                "Take the checkpoint it was made from"
            )
        for file in _model_files(path):
            with _opened(file) as tensors:
                for name in tensors.keys():  # noqa: SIM118 - a safetensors file is no mapping
                    part = tensors.get_slice(name)
                    self._files[name], self._types[name] = file, part.get_dtype()
                    self.shapes[name] = tuple(part.get_shape())

    def stored(self, name: str) -> str:
        """The type of a tensor in the file."""
        return self._types[name]

    def read(self, name: str) -> Matrix:
        """One tensor, as stored."""
        with _opened(self._files[name]) as tensors:
            return tensors.get_tensor(name)

    def update(self, name: str, w0: Matrix) -> Update:
        """The matrix and its difference to `w0`."""
        w1 = self.read(name).to(w0.device)
        return Update(w1=w1, dw=w1.float() - w0.float())


class Adapter:
    """A LoRA adapter in peft's format: dW = (alpha / r) B A, and W1 = W0 + dW in fp32.

    Raises:
        CheckpointError: no adapter_model.safetensors, or a damaged one, or one without its other factor or its scale.
        ConfigError: an adapter whose update is no plain product.
    """

    def __init__(self, path: Path):
        self.path = path
        self.config = _json(path / "adapter_config.json")
        odd = [n for n in ("use_dora", "alpha_pattern", "rank_pattern", "fan_in_fan_out") if self.config.get(n)]
        if self.config.get("peft_type", "LORA") != "LORA" or odd:
            what = odd or [self.config["peft_type"]]
            raise ConfigError(
                f"{path} is an adapter with {', '.join(what)}, whose update is not one scale times B A. "
                "Merge it into its base (peft's merge_and_unload, save_pretrained) and give that folder"
            )
        self._file = path / "adapter_model.safetensors"
        if not self._file.is_file():
            raise CheckpointError(
                f"{path} has no adapter_model.safetensors. Save the adapter again with save_pretrained"
            )
        if "lora_alpha" not in self.config:
            raise CheckpointError(
                f"{path}/adapter_config.json has no lora_alpha, so the scale alpha / r of its update is not known. "
                "Save the adapter again with save_pretrained"
            )
        self.shapes: dict[str, tuple[int, ...]] = {}
        with _opened(self._file) as tensors:
            names = set(tensors.keys())
            for name in sorted(n for n in names if n.endswith(".lora_A.weight")):
                other = name.replace("lora_A", "lora_B")
                if other not in names:
                    raise CheckpointError(f"{self._file} has {name} without {other}. Copy or save the adapter again")
                rows, columns = tensors.get_slice(other).get_shape()[0], tensors.get_slice(name).get_shape()[1]
                self.shapes[_without_peft(name)] = (rows, columns)

    def stored(self, name: str) -> str:
        """`LORA`: the factors are exact enough whatever their type."""
        return "LORA"

    def factors(self, name: str) -> Factors:
        """B, A and the scale of one matrix."""
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        with _opened(self._file) as tensors:
            a, b = tensors.get_tensor(f"{stem}.lora_A.weight"), tensors.get_tensor(f"{stem}.lora_B.weight")
        rank = a.shape[0]
        scale = self.config["lora_alpha"] / (math.sqrt(rank) if self.config.get("use_rslora") else rank)
        return b.float(), a.float(), scale

    def update(self, name: str, w0: Matrix) -> Update:
        """The product, added to `w0`."""
        b, a, scale = self.factors(name)
        b, a = b.to(w0.device), a.to(w0.device)
        dw = scale * (b @ a)
        return Update(w1=w0.float() + dw, dw=dw, factors=(b, a, scale))


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A point of the trajectory."""

    step: int
    weights: Weights


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """Everything that is measured, validated."""

    w0: Folder
    checkpoints: list[Checkpoint]
    """In order."""
    clock: str
    """Where the steps come from: `run`, `names` of the folders, or `order`, counted 1, 2, ..."""
    total: int
    """Steps of the whole training, for the progress axis."""
    run: Run | None = None

    @property
    def label(self) -> str:
        """What to call the trajectory."""
        path = (self.run.path if self.run else self.checkpoints[-1].weights.path).resolve()
        return f"{path.parent.name}-{path.name}" if re.fullmatch(r"seed-\d+", path.name) else path.name


def read_inputs(w0: str | Path, checkpoints: list[str | Path]) -> Inputs:
    """Open the start and a row of checkpoints; reads names and shapes, no weights.

    Args:
        w0: the start, or a run alone: then its student.
        checkpoints: folders, adapters on `w0`, or one run.

    Raises:
        ConfigError: nothing to compare with, a run among folders, an adapter without its base.
        CheckpointError: a folder that is missing or damaged, a run without checkpoints.
    """
    paths = [_local(str(p)) for p in (w0, *checkpoints)]
    runs = [p for p in paths if (p / "resolved.json").is_file()]
    if not runs:
        if len(paths) < 2:
            raise ConfigError(
                f"one checkpoint ({w0}) has no update: an update is the difference of two. Give the start first, then "
                "one or more checkpoints trained from it, or a run alone, which knows its start"
            )
        return _of_folders(_start(paths[0]), paths[1:])
    if len(runs) > 1 or len(paths) > 2 or (len(paths) == 2 and paths[1] != runs[0]):
        raise ConfigError(
            f"{runs[0]} is a run and stands for all its checkpoints, so it cannot be one point among others. Give it "
            "alone, or alone behind its start; measure several runs one by one, then `potstill geometry compare`"
        )
    run = Run.open(runs[0])
    return _of_run(run, _start(paths[0] if len(paths) == 2 else _local(run.resolved["student"]["path"])))


def _start(path: Path) -> Folder:
    if (path / "adapter_config.json").is_file():
        raise ConfigError(
            f"{path} is an adapter, and the start must be a whole model. Give its base first; if training began from "
            "this adapter, merge it into its base and give that folder"
        )
    return Folder(path)


def _of_folders(w0: Folder, paths: list[Path]) -> Inputs:
    found = [re.search(r"(?:step|iter|checkpoint|epoch|update)s?[-_]?(\d+)$", p.name) for p in paths]
    steps = [int(m[1]) for m in found if m]
    named = len(steps) == len(paths) and all(a < b for a, b in zip([0, *steps], steps, strict=False))
    steps = steps if named else list(range(1, len(paths) + 1))
    points = [Checkpoint(step=s, weights=_weights(p)) for s, p in zip(steps, paths, strict=True)]
    return Inputs(w0=w0, checkpoints=points, clock="names" if named else "order", total=steps[-1])


def _of_run(run: Run, w0: Folder) -> Inputs:
    points = [
        Checkpoint(step=int(p.name.removeprefix("step_")), weights=_weights(p))
        for p in sorted((run.path / "checkpoints").glob("step_*"))
    ]
    if not points:
        raise CheckpointError(
            f"{run.path} has no checkpoint yet. Let it reach save.every steps; save.keep says how many stay"
        )
    finished = run.finished
    total = (finished or {}).get("step") or run.resolved.get("steps") or points[-1].step
    return Inputs(w0=w0, checkpoints=points, clock="run", total=max(total, points[-1].step), run=run)


def _weights(path: Path) -> Weights:
    for place in (path, path / "adapter"):  # a run's checkpoint holds the merged model, and its adapter beside it
        if (place / "adapter_config.json").is_file():
            return Adapter(place)
    return Folder(path)


def _local(path: str) -> Path:
    """A folder on this machine for lab/NAME, a path or a hub name."""
    if path.startswith("lab/"):
        return model_path(path.removeprefix("lab/"))
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", path) or path.startswith(("models/", "runs/", ".")):
        what = "is a file" if folder.exists() else "does not exist"
        raise CheckpointError(
            f"{path} {what}. Give folders in Hugging Face format, adapters, runs, hub names or lab/NAME"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path, allow_patterns=["*.safetensors", "*.json"]))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{path} is no folder here, and no model of that name came from the hub "
            f"({str(error).strip().partition(chr(10))[0]}). Check the path, or download it first"
        ) from None


def _model_files(path: Path) -> list[Path]:
    index = path / "model.safetensors.index.json"
    if index.is_file():
        weights = _json(index).get("weight_map")
        if not isinstance(weights, dict) or not weights:
            raise CheckpointError(f"{index} names no files (weight_map). Download or copy it again")
        names = set(weights.values())
        if missing := sorted(n for n in names if not (path / n).is_file()):
            raise CheckpointError(
                f"{path} lacks {missing[0]} ({len(missing)} of {len(names)} files that its index names). "
                "Download or copy it again"
            )
        return [path / n for n in sorted(names)]
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise CheckpointError(
            f"{path} has no safetensors files, so there are no weights to read. Give the model's folder; older files "
            "(pytorch_model.bin) become safetensors with from_pretrained and save_pretrained"
        )
    return files


def _json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file} is no JSON ({error}). It was cut short: copy or download it again") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{file} holds no JSON object. Copy or download it again")
    return found


def _opened(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise CheckpointError(f"{file} cannot be read ({error}). It was cut short: copy or download it again") from None


def _without_peft(name: str) -> str:
    return name.removeprefix("base_model.model.").replace(".lora_A.weight", ".weight")
