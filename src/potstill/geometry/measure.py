"""`potstill geometry`: every number for a start and a row of checkpoints, one matrix at a time."""

import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from potstill.errors import CheckpointError, ConfigError
from potstill.geometry.aggregate import aggregate, by_module, groups, growth
from potstill.geometry.cache import Cache, default_folder
from potstill.geometry.floors import storage
from potstill.geometry.inputs import Inputs, read_inputs
from potstill.geometry.matrices import Name, choose, mismatched
from potstill.geometry.moments import Moments, input_moments
from potstill.geometry.nulls import Bits, packed_masks
from potstill.geometry.recorded import noise_times, recorded
from potstill.geometry.rows import Row, Settings, example, measure_update
from potstill.geometry.trajectory import Bases, K, Trajectory, bases, follow, later
from potstill.geometry.write import clean, decay_floors, training, warnings, write
from potstill.run import whole_directory
from potstill.seeds import derive

ARRAYS = ("vectors", "masks")
"""Files of arrays, filled matrix by matrix."""
UNSOLVED: type[Exception] = torch.linalg.LinAlgError  # type: ignore[attr-defined]
"""A decomposition that did not converge."""
Watch = Callable[[int, int, str], None]
"""Matrices done, matrices in all, the next one's name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """What was measured."""

    figures: Row
    """What geometry.json holds: `rows` (one for each matrix and checkpoint), `aggregate`, `similarity`, ..."""
    folder: Path | None
    """Where it was written."""

    @property
    def rows(self) -> list[Row]:
        """One for each matrix and checkpoint."""
        return self.figures["rows"]


def measure(
    w0: str | Path,
    checkpoints: Sequence[str | Path] = (),
    *,
    out: str | Path | None = None,
    k: int = 512,
    rank: int = 64,
    only: str = "all",
    nulls: int = 2,
    seed: int = 0,
    cache: str | Path | None = None,
    device: str = "cpu",
    watch: Watch | None = None,
) -> Geometry:
    """The geometry of the updates W0 -> W_t: the same as the verb `potstill geometry`.

    Args:
        w0: the start, or a run alone: its student is the start, its checkpoints follow.
        checkpoints: in order of training: Hugging Face folders, LoRA adapters on `w0`, or one run.
        out: a new folder for geometry.json, geometry.csv, vectors.npz and geometry.html.
        k: dimension of the leading subspaces whose rotation is measured; cut to half of a smaller matrix.
        rank: of the rank reduction behind the principal weights; likewise.
        only: `attention` leaves out the other linear matrices.
        nulls: draws of each random null, at least 2.
        seed: of the nulls.
        cache: folder of W0's decompositions; default: see `cache.default_folder`.
        device: where to compute. Doubles on a consumer GPU are slower than on its CPU.
        watch: told of the progress.

    Raises:
        ConfigError: arguments that cannot work, or no matrix that can be measured.
        CheckpointError: a folder that is missing or damaged.
    """
    _check(out, k, rank, nulls, device)
    inputs = read_inputs(w0, list(checkpoints))
    names, left = choose(inputs.w0, inputs.checkpoints, only)
    settings = Settings(k=k, rank=rank, nulls=nulls, seed=seed)
    kept = Cache(Path(cache) if cache else default_folder())
    run = _Measuring(inputs, names, settings, kept, input_moments(inputs, names), torch.device(device))
    run.failed |= mismatched(inputs.w0, inputs.checkpoints, only)
    with ExitStack() as stack:
        folder = stack.enter_context(whole_directory(Path(out))) if out else None
        files = (
            [zipfile.ZipFile(folder / f"{name}.npz", "w", zipfile.ZIP_DEFLATED) for name in ARRAYS] if folder else []
        )
        arrays = dict(zip(ARRAYS, map(stack.enter_context, files), strict=False))
        for i, name in enumerate(names):
            if watch:
                watch(i, len(names), name.matrix)
            run.matrix(name, arrays)
        figures = clean(run.figures() | {"left_out": left, "only": only})
        for file in files:
            file.close()
        if folder:
            write(folder, figures)
    return Geometry(figures=figures, folder=Path(out) if out else None)


def _check(out: str | Path | None, k: int, rank: int, nulls: int, device: str) -> None:
    if out and Path(out).exists():
        raise ConfigError(
            f"{out} exists already, and no measurement overwrites another. Give another folder with --out"
        )
    if k < 1:
        raise ConfigError(
            f"k = {k} must be at least 1: it is the dimension of the subspaces that turn, 512 in the paper"
        )
    if rank < 1:
        raise ConfigError(
            f"rank = {rank} must be at least 1: principal weights are those of W0 cut to it, 64 in the paper"
        )
    if nulls < 2:
        raise ConfigError(f"nulls = {nulls}: a null has no spread with fewer than 2 draws. Give 2 or more")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise ConfigError(f"device = {device!r} is none that computes in double precision. Give cpu, cuda or cuda:1")
    if device.startswith("cuda") and int(device.partition(":")[2] or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count() or "no"
        raise ConfigError(f"device = {device!r}, but torch sees {count} GPU here. Leave it out to compute on the CPU")


class _Measuring:
    """A measurement under way."""

    def __init__(
        self,
        inputs: Inputs,
        names: Sequence[Name],
        settings: Settings,
        cache: Cache,
        moments: Moments | None,
        device: torch.device,
    ):
        self.inputs, self.names, self.settings, self.cache = inputs, names, settings, cache
        self.moments, self.device = moments, device
        self.rows: list[Row] = []
        self.failed: dict[str, str] = {}
        self.followed: dict[str, Trajectory] = {}
        self.example: Row | None = None
        self._shown = _middle(names)
        self._decay = decay_floors(inputs)
        self._times = noise_times(inputs.run, [p.step for p in inputs.checkpoints])

    def matrix(self, name: Name, files: Mapping[str, zipfile.ZipFile]) -> None:
        """Measure one matrix at every checkpoint. One that cannot be measured is named, and the others go on."""
        try:
            rows, found, masks = self._measure(name)
        except (ConfigError, CheckpointError, UNSOLVED) as error:
            self.failed[name.matrix] = str(error)
            return
        self.rows += rows
        if files:
            for row, one in zip(rows, found, strict=True):
                if one:
                    _add(files["vectors"], f"{name.matrix}/{row['step']}", one["V"][:, :K].float().cpu().numpy())
            for which, bits in masks.items():
                _add(files["masks"], f"{name.matrix}/{which}", bits)

    def _measure(self, name: Name) -> tuple[list[Row], list[Bases | None], dict[str, Bits]]:
        s, points = self.settings, self.inputs.checkpoints
        w0 = self.inputs.w0.read(name.matrix).to(self.device)
        origin = self.cache.origin(w0, s.k, s.rank, s.fraction)
        last = points[-1].weights.update(name.matrix, w0)
        rows: list[Row] = []
        found: list[Bases | None] = []
        after: list[Bases | None] = []
        for point in points:
            update = last if point is points[-1] else point.weights.update(name.matrix, w0)
            key = derive("geometry", name.matrix, point.step, s.seed)
            measured = measure_update(name, w0, origin, update, key, s)
            stored = point.weights.stored(name.matrix)
            row = self._identity(name, point.step, stored) | measured.row | {"wd_floor": self._decay.get(point.step)}
            if stored == "BF16" and measured.top:
                row["warning"] = storage(w0, update.dw).warning
            rows.append(row)
            found.append(bases(measured.top))
            if update is not last:
                after.append(bases(later(update, last)))
            elif name is self._shown and measured.top:
                self.example = example(name, w0, origin, update, measured) | {"step": point.step}
        seed = derive("geometry", name.matrix, "walk", s.seed)
        covariance = self.moments.of(name.matrix) if self.moments else None
        if covariance is not None:
            covariance = covariance.to(self.device)
        self.followed[name.matrix] = follow(found, after, self._times, (name.m, name.n), seed, covariance)
        for row, time in zip(rows, self._times, strict=True):
            row["fro_noise"] = rows[-1]["fro"] * (time / self._times[-1]) ** 0.5
        columns = self.followed[name.matrix].columns
        masks = packed_masks(w0, last.w1, derive("geometry", name.matrix, rows[-1]["fro"].hex(), s.seed))
        return [row | more for row, more in zip(rows, columns, strict=True)], found, masks

    def _identity(self, name: Name, step: int, stored: str) -> Row:
        return {
            "run": self.inputs.label,
            "step": step,
            "progress": step / self.inputs.total,
            **asdict(name),
            "stored_w0": self.inputs.w0.stored(name.matrix),
            "stored": stored,
        }

    def figures(self) -> Row:
        """Everything that geometry.json holds."""
        if not self.rows:
            name, why = next(iter(self.failed.items()))
            raise ConfigError(f"none of {len(self.failed)} matrices can be measured. The first, {name}: {why}")
        points = aggregate(self.rows)
        last = [row for row in self.rows if row["step"] == self.inputs.checkpoints[-1].step]
        return {
            "run": self.inputs.label,
            "w0": str(self.inputs.w0.path),
            "checkpoints": [{"step": p.step, "path": str(p.weights.path)} for p in self.inputs.checkpoints],
            "clock": self.inputs.clock,
            "total_steps": self.inputs.total,
            "settings": asdict(self.settings),
            "inputs": self.moments.told if self.moments else None,
            "training": training(self.inputs),
            "matrices": len({row["matrix"] for row in self.rows}),
            "failed": self.failed,
            "warnings": warnings(self.rows, self.inputs, self.settings, self.failed),
            "cache": {"hits": self.cache.hits, "misses": self.cache.misses},
            "aggregate": points,
            "growth": growth(points),
            "growth_noise": growth(points, "fro_noise"),
            "modules": by_module(last),
            "similarity": self._similarity(last),
            "recorded": self._recorded(),
            "example": self.example,
            "rows": self.rows,
        }

    def _recorded(self) -> Row | None:
        run = self.inputs.run
        return recorded(run, self.names, self.inputs.total, self.moments, self.settings.seed) if run else None

    def _similarity(self, last: Sequence[Row]) -> Row:
        """Group -> side -> K -> mean over the matrices of Sim_K between every two checkpoints."""
        out: Row = {}
        for group, rows in groups(last).items():
            sides: dict[str, dict[str, Any]] = {}
            for side in "UV":
                every = [self.followed[row["matrix"]].similarity.get(side, {}) for row in rows]
                ks = sorted({k for one in every for k in one})
                sides[side] = {str(k): _mean([one[k] for one in every if k in one]) for k in ks}
            out[group] = sides
        return out


def _add(file: zipfile.ZipFile, name: str, array: np.ndarray) -> None:
    with file.open(f"{name}.npy", "w", force_zip64=True) as entry:
        np.lib.format.write_array(entry, array)


def _mean(found: Sequence[Float[Tensor, "t t"]]) -> list[list[float]]:
    return torch.stack([one.cpu() for one in found]).mean(0).tolist()


def _middle(names: Sequence[Name]) -> Name:
    """The first attention matrix of the middle layer, or any matrix of it."""
    layers = sorted({n.layer for n in names})
    there = [n for n in names if n.layer == layers[len(layers) // 2]]
    attention = [n for n in there if n.kind == "attention"] or there
    return max(attention, key=lambda n: (n.module == "q_proj", n.m * n.n))
