"""Every number that a run writes is defined in LOGGED, and everything defined there is written."""

import re
from pathlib import Path

import pytest
from tests.e2e.small import OVERRIDES, parsed
from tests.servers import Completions, serving

from potstill import loop
from potstill.logged import LOGGED
from potstill.models import load
from potstill.registry import METHODS
from potstill.run import Run

LABELS = {"name", "split", "questions", "samples", "temperature", "top_p", "seed", "scores", "passes"}
"""Of an evaluation: what was asked, and the scores of each question. Not measurements."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    root = tmp_path_factory.mktemp("logged")
    made = {name: loop.train(parsed("steps=1", *overrides), Path(root / name)) for name, overrides in OVERRIDES.items()}
    with serving(Completions(load("lab/teacher"))) as server:
        remote = f"teacher={{kind='http', base_url='{server.url}/v1', tokenizer='lab/teacher'}}"
        made["behind a server"] = loop.train(parsed("steps=1", remote, OVERRIDES["dagger"][0]), root / "server")
    return made


def written(run: Run) -> set[str]:
    keys = {key for row in [*run.metrics, *run.evals] for key in row}
    return {re.sub(r"@\d+$", "@k", key) for key in keys}


def test_every_method_is_here():
    assert OVERRIDES.keys() == METHODS.keys()


@pytest.mark.parametrize("name", METHODS)
def test_what_is_written_is_defined(name: str, runs: dict[str, Run]):
    assert written(runs[name]) - LABELS <= LOGGED.keys()


def test_what_is_defined_is_written(runs: dict[str, Run]):
    assert LOGGED.keys() <= set().union(*map(written, runs.values()))


def test_every_definition_is_a_sentence():
    for name, (unit, text) in LOGGED.items():
        assert text.endswith("."), name
        assert unit == unit.strip()
