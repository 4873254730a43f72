"""What the geometry costs, in CPU seconds of one thread: the figures of docs/geometry.md.

pytest -m slow -s tests/unit/test_geometry_cost.py
"""

import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from potstill.geometry import update_sparsity

pytestmark = pytest.mark.slow
SIZE = 4096

MEASURE = """
import resource, sys, time
import torch
from potstill.geometry import decompose, rotation, shift_between, summarise_update
torch.set_num_threads(1)
made = torch.Generator().manual_seed(0)
w0 = 0.02 * torch.randn(4096, 4096, generator=made)
dw = 1e-4 * torch.randn(4096, 4096, generator=made)
before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
if sys.argv[1] == "trajectory":
    summarise_update(dw)
else:
    d0, d1 = (decompose(w, 512, route="gram") for w in (w0, w0 + dw))
    shift_between(d0.s, d1.s)
    rotation(d0, d1, (16, 64, 128, 512))
print(time.process_time() - began, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e6)
"""


def spent(what: str) -> tuple[float, float]:
    """CPU seconds, and GB of memory beyond the matrices, of a process of its own."""
    done = subprocess.run([sys.executable, "-c", MEASURE, what], capture_output=True, text=True, check=True)
    seconds, memory = map(float, done.stdout.split())
    print(f"{what} of {SIZE} x {SIZE}: {seconds:.1f} s, {memory:.2f} GB")
    return seconds, memory


def test_the_trajectory_of_a_matrix_takes_seconds_and_less_than_a_gigabyte():
    seconds, memory = spent("trajectory")
    assert seconds < 12, "6 s of two cores"
    assert memory < 1


def test_shift_and_rotation_of_a_pair_take_a_minute_and_a_half():
    seconds, _ = spent("shift and rotation")
    assert seconds < 180, "90 s of two cores"


def test_sparsity_reads_memory_at_a_good_part_of_the_speed_of_a_copy():
    made = torch.Generator().manual_seed(0)
    w0 = (0.02 * torch.randn(SIZE, SIZE, generator=made)).bfloat16()
    w1 = torch.where(torch.rand(SIZE, SIZE, generator=made) < 0.48, 1.01 * w0, w0)
    codes = w0.view(torch.int16).numpy()
    other = w1.view(torch.int16).numpy()
    into = np.empty_like(codes)
    runs: dict[str, Callable[[], object]] = {
        "sparsity": lambda: update_sparsity(w0, w1),
        "copy": lambda: np.copyto(into, codes),
        "xor": lambda: np.bitwise_xor(codes, other, out=into),
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(15):  # interleaved: the machine's speed changes
        for name, run in runs.items():
            began = time.process_time()
            run()
            times[name].append(time.process_time() - began)
    ms = {name: 1e3 * median(t) for name, t in times.items()}
    share = ms["copy"] / ms["sparsity"]
    print(", ".join(f"{name} {t:.1f} ms" for name, t in ms.items()), f"; {share:.0%} of a copy")
    assert share > 0.2  # under load; about a half on an idle machine


def smollm2(folder: Path, layers: int) -> tuple[Path, list[Path]]:
    """W0 and five fp32 checkpoints in the shapes of SmolLM2-135M: a random walk away from Gaussian weights."""
    q, kv, up, down = (576, 576), (192, 576), (1536, 576), (576, 1536)
    attention = {f"self_attn.{m}_proj": shape for m, shape in zip("qkvo", (q, kv, kv, q), strict=True)}
    shapes = attention | {"mlp.gate_proj": up, "mlp.up_proj": up, "mlp.down_proj": down}
    made = torch.Generator().manual_seed(0)
    weights = {
        f"model.layers.{i}.{m}.weight": 0.05 * torch.randn(*shape, generator=made)
        for i in range(layers)
        for m, shape in shapes.items()
    }
    folders = [folder / f"step_{20 * i}" for i in range(6)]
    for path in folders:
        path.mkdir()
        save_file(weights, path / "model.safetensors")
        weights = {name: w + 1e-4 * torch.randn(*w.shape, generator=made) for name, w in weights.items()}
    return folders[0], folders[1:]


def test_every_diagnostic_of_five_checkpoints_of_smollm2_takes_a_quarter_of_an_hour(tmp_path: Path):
    layers = int(os.environ.get("LAYERS", "30"))  # fewer give an estimate sooner
    w0, checkpoints = smollm2(tmp_path, layers)
    command = [sys.executable, "-m", "potstill", "geometry", str(w0), *map(str, checkpoints)]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    where = ["--out", str(tmp_path / "out"), "--cache", str(tmp_path / "cache")]
    subprocess.run([*command, *where], capture_output=True, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    minutes = (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) / 60
    cached = sum(file.stat().st_size for file in (tmp_path / "cache").iterdir())
    print(f"{7 * layers} matrices: {minutes:.1f} min, {after.ru_maxrss / 1e6:.2f} GB, cache {cached / 1e6:.0f} MB")
    assert minutes < 30, "15 minutes of two cores"
