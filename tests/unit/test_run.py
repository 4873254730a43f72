"""What is on disk is whole: nothing half-written, nothing written twice, nothing overwritten."""

import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from potstill.errors import CheckpointError, ConfigError, TrainingError
from potstill.run import Run, load_run, read_rows, write_whole


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run.create(tmp_path / "runs" / "a", config="x = 1\n", resolved={"x": 1}, env={"python": "3"})


def tree(path: Path) -> set[str]:
    return {str(p.relative_to(path)) for p in path.rglob("*")}


def saves(text: str = "weights") -> Callable[[Path], None]:
    def save(folder: Path) -> None:
        (folder / "model.safetensors").write_text(text)
        (folder / "trainer.pt").write_text(text)

    return save


def test_a_new_run_holds_its_recipe(run: Run) -> None:
    assert tree(run.path) == {"config.toml", "resolved.json", "env.json", "rollouts", "checkpoints"}
    again = load_run(str(run.path))
    assert again == run
    assert again.resolved == {"x": 1}
    assert again.metrics == again.evals == again.rollout_steps == []
    assert again.latest() is None


def test_a_run_never_overwrites_another(run: Run) -> None:
    run.append("metrics", {"step": 1})
    with pytest.raises(ConfigError, match=r"exists already.*--resume"):
        Run.create(run.path, config="", resolved={}, env={})
    assert run.metrics == [{"step": 1}]
    assert run.resolved == {"x": 1}


def test_a_run_that_cannot_be_created_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        Run.create(tmp_path / "b", config="", resolved={"x": object()}, env={})
    assert tree(tmp_path) == set()


def test_folders_that_are_no_run(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        load_run(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match=r"no run directory: it has no resolved\.json"):
        load_run(tmp_path)


def test_rows_come_back_as_they_went(run: Run) -> None:
    rows: list[dict[str, Any]] = [{"step": 1, "loss": 0.1, "text": "你好 🙂\n\u2028"}, {"step": 2, "loss": None}]
    for row in rows:
        run.append("metrics", row)
    assert run.metrics == rows
    run.keep_rollouts(10, rows)
    run.keep_rollouts(2, rows[:1])
    assert run.rollout_steps == [2, 10]
    assert run.rollouts(10) == rows
    assert run.rollouts(3) == []


@pytest.mark.parametrize("cut", range(1, 20))
def test_a_row_cut_short_by_a_kill_is_left_out(run: Run, cut: int) -> None:
    run.append("metrics", {"step": 1})
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "text": "\\u4f60"}'[:cut])
    assert run.metrics == [{"step": 1}]
    run.rewind(1)
    run.append("metrics", {"step": 2})
    assert run.metrics == [{"step": 1}, {"step": 2}]


def test_a_damaged_row_in_the_middle_is_refused_with_its_number(run: Run) -> None:
    (run.path / "metrics.jsonl").write_text('{"step": 1}\n{"step"\n{"step": 3}\n')
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl:2 is not JSON"):
        _ = run.metrics
    assert read_rows(run.path / "absent.jsonl") == []


def test_rewind_forgets_what_came_after(run: Run) -> None:
    for step in range(1, 6):
        run.append("metrics", {"step": step})
        run.keep_rollouts(step, [{"step": step}])
        run.checkpoint(step, saves(), keep=9)
    for step in (0, 2, 4):
        run.append("evals", {"step": step, "name": "greedy"})
    (run.path / "checkpoints" / ".step_000006.123").mkdir()
    run.rewind(3)
    assert [r["step"] for r in run.metrics] == [1, 2, 3]
    assert [r["step"] for r in run.evals] == [0, 2]
    assert run.rollout_steps == [1, 2, 3]
    assert tree(run.path / "checkpoints") & {"step_000003", "step_000004", ".step_000006.123"} == {"step_000003"}
    run.rewind(0)
    assert run.metrics == run.evals == run.rollout_steps == []


def test_checkpoints_keep_the_newest(run: Run) -> None:
    folders = [run.checkpoint(step, saves(str(step)), keep=2) for step in (5, 10, 100)]
    assert [f.exists() for f in folders] == [False, True, True]
    assert run.latest() == (100, folders[2])
    assert (folders[2] / "model.safetensors").read_text() == "100"


def test_a_checkpoint_that_fails_leaves_the_one_before(run: Run) -> None:
    first = run.checkpoint(1, saves(), keep=2)

    def fails(folder: Path) -> None:
        (folder / "model.safetensors").write_text("half")
        raise KeyError("planted")

    before = tree(run.path)
    with pytest.raises(KeyError, match="planted"):
        run.checkpoint(2, fails, keep=2)
    assert tree(run.path) == before
    assert run.latest() == (1, first)


def test_a_pointer_to_nothing_is_refused(run: Run) -> None:
    run.checkpoint(1, saves(), keep=2)
    (run.path / "checkpoints" / "latest").write_text("step_000007\n")
    with pytest.raises(CheckpointError, match="names step_000007, which is missing"):
        run.latest()


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write_whole(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_whole(path, "new \ud800")
    assert path.read_text() == "old"
    assert tree(tmp_path) == {"a"}


# --- a full disk ----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_while_logging(run: Run) -> None:
    (run.path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(TrainingError, match=r"the disk is full: .*metrics\.jsonl .*No space left.*--resume"):
        run.append("metrics", {"step": 1})


FILLS_THE_DISK = """
import sys
from pathlib import Path
from potstill.errors import TrainingError
from potstill.run import load_run

def by_python(folder):
    (folder / "trainer.pt").write_bytes(b"x" * 100_000)

def by_torch(folder):
    import torch
    with (folder / "trainer.pt").open("wb") as file:
        torch.save({"w": torch.zeros(50_000)}, file)

def by_safetensors(folder):
    import torch
    from safetensors.torch import save_file
    save_file({"w": torch.zeros(50_000)}, folder / "model.safetensors")

run = load_run(sys.argv[1])
for save in (by_python, by_torch, by_safetensors):
    try:
        run.checkpoint(2, save, keep=2)
    except TrainingError as error:
        print(error)
"""


def test_a_full_disk_while_saving_a_checkpoint(run: Run) -> None:
    """A limit on the size of files stands for the disk: the system refuses the write in the same place."""
    run.checkpoint(1, saves(), keep=2)
    before = tree(run.path)

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (65_536, 65_536))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    done = subprocess.run(
        [sys.executable, "-c", FILLS_THE_DISK, str(run.path)], capture_output=True, text=True, preexec_fn=limited
    )
    assert done.stdout.count("the disk is full") == 3, done.stdout + done.stderr
    assert tree(run.path) == before
    assert run.latest() is not None
