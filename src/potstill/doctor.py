"""What this machine has: the facts that decide whether a recipe can run, each with its remedy."""

import importlib.util
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

Finding = tuple[bool | None, str, str, str]
"""ok (None: optional and absent), what, found, what to do."""

EXTRAS = {
    "math_verify": ("math", "verifier math"),
    "datasets": ("hub", "task hub"),
    "reasoning_gym": ("gym", "task reasoning_gym"),
    "gguf": ("gguf", ".gguf models"),
    "anthropic": ("anthropic", "teacher Claude"),
    "google.genai": ("google", "teacher Gemini"),
    "openai": ("openai", "teacher OpenAI"),
    "sentence_transformers": ("embedding", "similarity embedding"),
}


def findings() -> Iterator[Finding]:
    """Everything worth knowing, one by one."""
    enough = sys.version_info >= (3, 11)
    yield enough, "Python", platform.python_version(), "" if enough else "install Python 3.11 or newer"
    for package in ("potstill", "torch", "transformers", "peft"):
        try:
            yield True, package, version(package), ""
        except PackageNotFoundError:
            yield False, package, "not installed", f"pip install {package}"
    yield from _hardware()
    for module, (extra, feature) in EXTRAS.items():
        there = _installed(module)
        remedy = "" if there else f"pip install 'potstill[{extra}]'"
        yield True if there else None, feature, "installed" if there else "not installed", remedy
    yield _lab()


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package around it
        return False


def _hardware() -> Iterator[Finding]:
    import torch

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30 if hasattr(os, "sysconf") else 0
    yield True, "CPU", f"{os.cpu_count()} cores, {memory:.0f} GiB memory", ""
    threads = os.environ.get("OMP_NUM_THREADS", "unset")
    yield True, "threads", f"OMP_NUM_THREADS={threads}", "" if threads == "1" else "1 is fastest for the lab's models"
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    yield True if gpu != "none" else None, "GPU", gpu, "" if gpu != "none" else "not needed for the lab"
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    yield free > 1, "disk", f"{free:.1f} GiB free here", "" if free > 1 else "a run of a small model needs about 1 GiB"
    began = time.process_time()
    x = torch.randn(512, 512)
    for _ in range(20):
        x = (x @ x).tanh()
    speed = 20 * 2 * 512**3 / (time.process_time() - began) / 1e9
    yield True, "speed", f"{speed:.0f} GFLOP/s in float32 per CPU second", ""


def _lab() -> Finding:
    from potstill.lab import model_path

    size = sum(f.stat().st_size for name in ("teacher", "student", "foreign") for f in model_path(name).iterdir())
    return True, "bundled models", f"teacher, student, foreign: {size / 2**20:.1f} MiB", ""
