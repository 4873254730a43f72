"""A run on disk: what is written, in which order, and how it is read back.

    runs/NAME/
      config.toml      the recipe, as given          resolved.json   every field, as understood
      env.json         versions, hardware            metrics.jsonl   one row a step (see `potstill.logged`)
      evals.jsonl      one row an evaluation         rollouts/step_000010.jsonl
      checkpoints/step_000100/  loads in transformers, plus trainer.pt      checkpoints/latest  the newest step's name
      finished.json    what the whole run took       .lock           held while a process trains it

A directory appears whole or not at all: it is written under a temporary name and renamed. Rows are appended and
flushed one by one, so a running job can be tailed; a row cut short by a kill is dropped by `rewind`.
Needs no torch.
"""

import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from potstill.errors import CheckpointError, ConfigError, TrainingError

Row = dict[str, Any]
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a full disk into a message. Raises TrainingError."""
    try:
        yield
    except Exception as error:
        code = _errno(error)
        if code not in FULL:
            raise
        raise TrainingError(
            f"the disk is full: {path} could not be written ({os.strerror(code)}). "
            "Free some space; then `potstill train ... --resume` goes on from the last checkpoint"
        ) from None


def _errno(error: BaseException | None) -> int:
    """The system's error number. Rust (safetensors) has it in its message, C++ (torch) hides it behind its own error."""
    if error is None:
        return 0
    if isinstance(error, OSError):
        return error.errno or 0
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else _errno(error.__context__)


def write_whole(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old text or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with writing(path):
            with temporary.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def whole_directory(path: Path) -> Iterator[Path]:
    """A temporary directory that becomes `path` when the block ends, and vanishes if it raises."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with writing(path):
            temporary.mkdir(parents=True)
            yield temporary
            temporary.replace(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def locked(folder: Path, otherwise: str) -> Iterator[None]:
    """Hold `folder`/.lock; the system lets go of it when the process ends, however it ends.

    Raises ConfigError(otherwise) if another process holds it. Nothing is locked on a system without flock.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(otherwise) from None
        yield


def read_rows(path: Path) -> list[Row]:
    """The rows of a JSONL file; a last line cut short by a kill is left out. Raises CheckpointError."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    rows: list[Row] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            if number == len(lines):  # no newline yet: the writer was killed in the middle of this row
                break
            raise CheckpointError(
                f"{path}:{number} is not JSON, so the run's record is damaged. Remove that line, or start the run anew"
            ) from None
    return rows


@dataclass(frozen=True, slots=True)
class Run:
    """A run directory. Reading one needs nothing but this class."""

    path: Path

    @classmethod
    def create(cls, path: Path, *, config: str, resolved: Mapping[str, Any], env: Mapping[str, Any]) -> "Run":
        """Make a new run directory. Raises ConfigError if there is something at `path` already."""
        if path.exists():
            raise ConfigError(
                f"{path} exists already, and a run never overwrites another. "
                "Continue it with --resume, or give another name (name = ... in the recipe, or name=... behind it)"
            )
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"{path.parent} cannot be a folder of runs: {error.strerror}. Give one that can be written to with --root"
            ) from None
        with whole_directory(path) as folder:
            (folder / "config.toml").write_text(config, encoding="utf-8")
            (folder / "resolved.json").write_text(json.dumps(resolved, indent=2) + "\n", encoding="utf-8")
            (folder / "env.json").write_text(json.dumps(env, indent=2) + "\n", encoding="utf-8")
            (folder / "rollouts").mkdir()
            (folder / "checkpoints").mkdir()
        return cls(path)

    @classmethod
    def open(cls, path: Path) -> "Run":
        """An existing run. Raises CheckpointError if `path` holds none."""
        if not (path / "resolved.json").is_file():
            what = "does not exist" if not path.exists() else "is no run directory: it has no resolved.json"
            raise CheckpointError(f"{path} {what}. Give the folder that `potstill train` made, such as runs/NAME")
        return cls(path)

    @property
    def resolved(self) -> Row:
        """Every field of the recipe, as understood. Raises CheckpointError."""
        path = self.path / "resolved.json"
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise CheckpointError(
                f"{path} is not JSON ({error}), so nobody can tell what was run. Restore the file, or start the run anew"
            ) from None

    @property
    def metrics(self) -> list[Row]:
        """One row a step."""
        return read_rows(self.path / "metrics.jsonl")

    @property
    def evals(self) -> list[Row]:
        """One row an evaluation."""
        return read_rows(self.path / "evals.jsonl")

    @property
    def rollout_steps(self) -> list[int]:
        """The steps whose rollouts were kept, ascending."""
        return sorted(int(p.stem.removeprefix("step_")) for p in (self.path / "rollouts").glob("step_*.jsonl"))

    def rollouts(self, step: int) -> list[Row]:
        """The rollouts of one step, with what their teachers said."""
        return read_rows(self.path / "rollouts" / f"step_{step:06d}.jsonl")

    def append(self, name: str, row: Mapping[str, Any]) -> None:
        """Add a row to metrics.jsonl or evals.jsonl. Raises TrainingError when the disk is full."""
        path = self.path / f"{name}.jsonl"
        with writing(path), path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def keep_rollouts(self, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write the rollouts of a step."""
        write_whole(self.path / "rollouts" / f"step_{step:06d}.jsonl", "".join(json.dumps(r) + "\n" for r in rows))

    def keep_geometry(self, step: int, rows: Iterable[Mapping[str, Any]], arrays: Mapping[str, Any]) -> None:
        """Write what was recorded of the update at a step: vectors to a file of their own, rows behind those before."""
        import numpy as np

        folder = self.path / "geometry"
        folder.mkdir(exist_ok=True)
        temporary = folder / f".step_{step:06d}.npz"
        with writing(temporary):
            np.savez(temporary, **arrays)
            temporary.replace(folder / f"step_{step:06d}.npz")
            with (folder / "trajectory.jsonl").open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)

    @property
    def trajectory(self) -> list[Row]:
        """What was recorded of the update: one row for each matrix and step."""
        return read_rows(self.path / "geometry" / "trajectory.jsonl")

    def checkpoint(self, step: int, save: Callable[[Path], None], keep: int) -> Path:
        """Save with `save(folder)` as checkpoints/step_N, make it the latest, and drop all but the newest `keep`."""
        folder = self.path / "checkpoints" / f"step_{step:06d}"
        with whole_directory(folder) as temporary:
            save(temporary)
        write_whole(self.path / "checkpoints" / "latest", folder.name + "\n")
        for old in sorted((self.path / "checkpoints").glob("step_*"))[:-keep]:
            shutil.rmtree(old)
        return folder

    def latest(self) -> tuple[int, Path] | None:
        """Step and folder of the newest complete checkpoint; None before the first. Raises CheckpointError."""
        pointer = self.path / "checkpoints" / "latest"
        if not pointer.exists():
            return None
        folder = self.path / "checkpoints" / pointer.read_text(encoding="utf-8").strip()
        if not (folder / "trainer.pt").is_file():
            raise CheckpointError(
                f"{pointer} names {folder.name}, which is missing or has no trainer.pt, so the run cannot go on from it. "
                f"Write the name of a whole checkpoint into {pointer}, or start anew under another name"
            )
        return int(folder.name.removeprefix("step_")), folder

    def finish(self, row: Mapping[str, Any]) -> None:
        """Say that the last step is taken and saved: `step`, `rollout_tokens`, `teacher_tokens`, `cpu_s`, `why`."""
        write_whole(self.path / "finished.json", json.dumps(row, indent=2) + "\n")

    @property
    def finished(self) -> Row | None:
        """What `finish` was told; None for a run that is not finished."""
        path = self.path / "finished.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    @contextmanager
    def locked(self) -> Iterator[None]:
        """No other process may train this run inside the block. Raises ConfigError if one does."""
        with locked(self.path, f"another process is training {self.path}. Wait until it has ended, or end it"):
            yield

    def rewind(self, step: int) -> None:
        """Forget everything after `step`, so that a resumed run writes it again, once; step 0: everything."""
        for name in ("metrics", "evals", "geometry/trajectory"):
            path = self.path / f"{name}.jsonl"
            if path.exists():
                kept = [row for row in read_rows(path) if 0 < step >= row["step"]]
                write_whole(path, "".join(json.dumps(row) + "\n" for row in kept))
        (self.path / "finished.json").unlink(missing_ok=True)
        for vectors in (self.path / "geometry").glob("step_*.npz"):
            if int(vectors.stem.removeprefix("step_")) > step:
                vectors.unlink()
        for later in self.rollout_steps:
            if later > step:
                (self.path / "rollouts" / f"step_{later:06d}.jsonl").unlink()
        for folder in (self.path / "checkpoints").iterdir():  # of later steps, and what a kill left half-written
            if folder.is_dir() and (folder.name.startswith(".") or int(folder.name.removeprefix("step_")) > step):
                shutil.rmtree(folder)


def load_run(path: str | Path) -> Run:
    """Read a finished or running run: `.metrics`, `.evals`, `.rollouts(step)`, `.resolved`. Raises CheckpointError."""
    return Run.open(Path(path))
