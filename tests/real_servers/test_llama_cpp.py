"""llama.cpp's server (in xllamacpp) with the lab's teacher: text as in this process, however few slots it has."""

import re
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from tests.real_servers.serve import Running, as_gguf, free_port, needs, running, widened
from tests.real_servers.whole import AUDIT, anchors, behind, run, same

from potstill.errors import ConfigError
from potstill.ledger import summary

pytestmark = pytest.mark.servers


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    at, port = tmp_path_factory.mktemp("llama"), free_port()
    file = as_gguf(widened(at / "teacher"), at / "teacher.gguf")
    command: list[str | Path] = [needs("xllamacpp"), Path(__file__).with_name("llama_cpp.py"), file, str(port)]
    with running(command, port, at / "log") as made:
        yield made


def test_audits_are_those_of_the_local_model(server: Running, tmp_path: Path) -> None:
    how = (AUDIT.replace("continuations=2", "continuations=1"), "steps=6")
    far = run(tmp_path, "far", *how, behind(server, temperature=0.0))
    near = run(tmp_path, "near", *how, "teacher={path='lab/teacher', temperature=0.0}")
    same(far, near)
    assert anchors(far) == anchors(near)


def predicted(server: Running) -> int:
    """Tokens it has written, by its own count."""
    return round(
        float(re.findall(r"(?m)^llamacpp:tokens_predicted_total (\S+)", httpx2.get(f"{server.url}/metrics").text)[0])
    )


def test_more_samples_than_slots(server: Running, tmp_path: Path) -> None:
    """It refuses n beyond its four slots, and counts the tokens of one choice only."""
    ledger, before = tmp_path / "paid.sqlite", predicted(server)
    far = run(tmp_path, "far", AUDIT.replace("continuations=2", "continuations=6"), behind(server, ledger=str(ledger)))
    texts = [texts for rollout in anchors(far) for _, _, texts in rollout]
    assert {len(found) for found in texts} == {6}
    [row] = summary(ledger)
    assert (row["answers"], row["failed"]) == (6 * len(texts), 0)
    assert 0.5 * row["answers"] * 3 < row["written"] <= predicted(server) - before


def test_scores_are_refused_before_the_first_step(server: Running, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="sampled_kl"):
        run(tmp_path, "far", "method.name=sampled_kl", behind(server))
