"""What ends an answer, and what drops out, is the same wherever a model goes."""

import asyncio
from pathlib import Path

import pytest
from tests.e2e.small import command, parsed

from potstill import loop
from potstill.config import Learner, LoRA
from potstill.learners.local import LocalLearner
from potstill.models import load, load_tokens
from potstill.samplers.data import DataSampler
from potstill.types import Prompt, Turn

PROMPT = Prompt(id="p", messages=({"role": "user", "content": "12*3="},), answer="36")


def test_the_first_end_token_named_is_the_one_that_is_taught() -> None:
    """Sorting ids would teach <|endoftext|> in place of <|im_end|>."""
    tokens = load_tokens("lab/teacher", ("=", "<eos>"))
    assert tokens.names(tokens.eos) == ["=", "<eos>"]
    [[rollout]] = asyncio.run(DataSampler(tokens).sample([PROMPT], 1, Turn(seed=0, step=1, max_tokens=8)))
    assert rollout.response_ids[-1] == tokens.eos[0]


def test_a_checkpoint_ends_where_its_run_did(tmp_path: Path) -> None:
    learner = LocalLearner(
        load("lab/student", eos=(";", "<eos>")), Learner(), steps=1, seed=0, reference=False, lora=None
    )
    learner.save(tmp_path)
    assert set(load_tokens(str(tmp_path)).eos) == set(learner.tokens.eos)


def test_with_lora_only_the_adapter_ever_drops() -> None:
    lora = LoRA(rank=2, dropout=0.5)
    learner = LocalLearner(load("lab/student"), Learner(), steps=1, seed=0, reference=True, lora=lora)
    learner._adapter_dropout(True)
    on = {name for name, module in learner.model.named_modules() if module.training}
    assert on
    assert all("lora_dropout" in name for name in on)
    learner._adapter_dropout(False)
    assert not any(module.training for module in learner.model.modules())


def test_eval_of_a_run_asks_as_the_run_did(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loop.train(parsed("steps=1", "rollouts.max_tokens=5"), tmp_path)
    run = next(tmp_path.iterdir())
    ended = command(capsys)("eval", str(run), "--questions", "4", "--samples", "1", "--json")
    assert ended.code == 0
    assert '"value": 5.0' in ended.out  # every answer is cut off at five tokens


def test_weights_of_eight_bits_precision_are_not_trained(capsys: pytest.CaptureFixture[str]) -> None:
    ended = command(capsys)("check", "demo-opd", "student.dtype=bfloat16")
    assert ended.code == 2
    assert "learner.precision" in ended.err
