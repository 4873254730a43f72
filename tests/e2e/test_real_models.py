"""Real weights and vocabularies: SmolLM2-135M-Instruct learns, from itself and from Gemma 3 270M."""

import asyncio
import math
from pathlib import Path

import pytest
import torch

from potstill import chat, loop, models, recipes
from potstill.decode import Decoding
from potstill.run import Run
from potstill.samplers.hf import HFSampler
from potstill.teachers.hf import HFTeacher
from potstill.types import Ask, Prompt, Turn, Wants

ROOT = Path(__file__).parents[2]
STUDENT, TEACHER = "models/smollm2-135m-instruct", "models/gemma3-270m"
SMALL = ("steps=1", "rollouts.prompts=2", "rollouts.max_tokens=24", "eval.questions=2", "eval.greedy=false")
QUESTION = Prompt(id="sum", messages=({"role": "user", "content": "What is 3 + 4?\nAnswer:\n"},), answer="7")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not all((ROOT / path).is_dir() for path in (STUDENT, TEACHER)),
        reason="the models are not here; `make models` fetches them",
    ),
]


@pytest.fixture(autouse=True)
def _at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def student() -> models.Loaded:
    return models.load(str(ROOT / STUDENT))


def trained(recipe: str, folder: Path, *overrides: str) -> Run:
    cfg, text = recipes.read(recipe, [*SMALL, *overrides])
    return loop.train(cfg, folder, text=text)


def logits(model: torch.nn.Module, ids: tuple[int, ...]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].float()


def test_student_uses_its_own_chat_template_and_ends_with_its_own_token(student: models.Loaded):
    tokens = student.tokens
    shown = tokens.tokenizer.decode(chat.prompt_ids(tokens.tokenizer, QUESTION))
    assert shown.endswith("<|im_start|>user\nWhat is 3 + 4?\nAnswer:\n<|im_end|>\n<|im_start|>assistant\n")
    assert tokens.names(tokens.eos) == ["<|im_end|>"]
    greedy = HFSampler(student, decoding=Decoding(temperature=0.0))
    [[answer]] = asyncio.run(greedy.sample([QUESTION], 1, Turn(seed=0, step=1, max_tokens=24)))
    assert "7" in answer.text()
    assert answer.finish == "stop"


def test_foreign_teacher_reads_one_bos_the_plain_question_and_the_students_words(student: models.Loaded):
    loaded = models.load(TEACHER, dtype="bfloat16")
    tokenizer = loaded.tokens.tokenizer
    [[answer]] = asyncio.run(HFSampler(student).sample([QUESTION], 1, Turn(seed=0, step=1, max_tokens=12)))
    teacher = HFTeacher(loaded, student.tokens, decoding=Decoding())
    assert teacher.offers is Wants.TEXT

    start = 4
    read = tokenizer.encode(QUESTION.messages[0]["content"] + answer.text(0, start))
    ask = Ask(rollout=answer, view=QUESTION, wants=Wants.TEXT, start=start, length=8, n=2)
    [said] = asyncio.run(teacher.feedback([ask]))
    assert read.count(tokenizer.bos_token_id) == 1
    assert said.usage.read == ask.n * len(read)
    assert len(said.texts) == ask.n
    assert all(len(student.tokens.tokenizer.encode(t, add_special_tokens=False)) <= 8 for t in said.texts)


def test_bfloat16_rounds_the_weights_but_not_the_rotary_frequencies(student: models.Loaded):
    rounded = models.load(STUDENT, dtype="bfloat16").model
    for (name, a), b in zip(student.model.named_buffers(), rounded.buffers(), strict=True):
        assert torch.equal(a, b), name
    assert rounded.get_output_embeddings().weight is rounded.get_input_embeddings().weight


def test_omniopd_with_a_foreign_teacher_and_its_adapter(student: models.Loaded, tmp_path: Path):
    run = trained("smollm2", tmp_path)
    [row] = run.metrics
    assert 0 < row["agreement"] < 1
    assert abs(row["reference_kl"]) < 1e-6  # the anchor is the student itself before the first step
    assert row["grad_norm"] > 0

    latest = run.latest()
    assert latest is not None
    ids = chat.prompt_ids(student.tokens.tokenizer, QUESTION)
    merged, adapted = (models.load(str(path)) for path in (latest[1], latest[1] / "adapter"))
    before, after = logits(student.model, ids), logits(merged.model, ids)
    assert merged.tokens.eos == student.tokens.eos
    assert 1e-4 < (after - before).abs().max() < 5
    torch.testing.assert_close(logits(adapted.model, ids), after, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_opd_with_itself_as_teacher_has_nothing_to_learn(dtype: str, tmp_path: Path):
    teacher = f"teacher={{path='{STUDENT}', dtype='{dtype}'}}"
    method = "method={name='opd', beta=1.0}"
    run = trained("smollm2", tmp_path, teacher, method, f"student.dtype={dtype}")
    assert abs(run.metrics[0]["loss"]) < (1e-5 if dtype == "float32" else 1e-2)


def test_sft_on_the_text_of_a_foreign_teacher(tmp_path: Path):
    run = trained("smollm2-sft", tmp_path)
    [row] = run.metrics
    assert 0 < row["loss"] < math.log(49_152)
    assert row["tokens"] <= 2 * 24  # the student's tokens, however many the teacher needed
