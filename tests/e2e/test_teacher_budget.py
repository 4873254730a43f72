"""The teacher's budget ends: the run takes the step it can still take, evaluates, saves, and says so."""

from pathlib import Path
from typing import Any

import pytest
from tests.e2e.small import parsed
from tests.servers import Completions, serving

from potstill import loop
from potstill.models import load

METHODS = {
    "omniopd": "method={name='omniopd', chunks=3, continuations=2, chunk_length=3, similarity='exact'}",
    "sampled_kl": "method={name='sampled_kl'}",
}


def config(url: str, most: int, method: str, **more: str) -> Any:
    table = f"teacher={{kind='http', base_url='{url}/v1', tokenizer='lab/teacher', max_teacher_tokens={most}}}"
    return parsed("steps=5", table, METHODS[method], *[f"{k}={v}" for k, v in more.items()])


@pytest.mark.parametrize(("method", "most"), [("omniopd", 1200), ("sampled_kl", 400)])
def test_the_run_ends_with_the_step_that_its_budget_allows(method: str, most: int, tmp_path: Path):
    with serving(Completions(load("lab/teacher"))) as server:
        run = loop.train(config(server.url, most, method), tmp_path)
        steps = run.metrics[-1]["step"]
        assert 1 <= steps < 5
        assert run.finished is not None
        assert run.finished["step"] == steps
        assert "max_teacher_tokens" in run.finished["why"]
        assert [row["step"] for row in run.evals if row["name"] == "sampled"][-1] == steps
        latest = run.latest()
        assert latest is not None
        assert latest[0] == steps
        asked = len(server.answered)
        again = loop.train(config(server.url, most, method), tmp_path, resume=True)
        assert again.metrics == run.metrics
        assert len(server.answered) <= asked + 1  # the probe; nothing that was paid for is asked again


def test_a_budget_that_allows_nothing_leaves_the_student_as_it_was(tmp_path: Path):
    with serving(Completions(load("lab/teacher"))) as server:
        run = loop.train(config(server.url, 5, "sampled_kl"), tmp_path)
        assert run.metrics == []
        assert run.finished is not None
        assert run.finished["step"] == 0
        latest = run.latest()
        assert latest is not None
        assert latest[0] == 0
