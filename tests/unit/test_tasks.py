"""Where prompts come from: repeatable, never twice, and never held out and trained on."""

import json
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from potstill.errors import DataError
from potstill.tasks import TASKS
from potstill.tasks.base import Task
from potstill.tasks.hub import Hub
from potstill.tasks.jsonl import Jsonl
from potstill.tasks.reasoning_gym import CHUNK, EVALUATED, HASH_ORDERED, SEEDS, ReasoningGym, Scorer
from potstill.types import Prompt
from potstill.verifiers import Exact, Math

ROWS: list[dict[str, Any]] = [{"prompt": f"{i}+{i}=", "answer": 2 * i, "level": i % 3} for i in range(300)]


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def task(tmp_path: Path) -> Jsonl:
    return Jsonl(path=write(tmp_path / "sums.jsonl", ROWS))


def texts(prompts: list[Prompt]) -> list[str]:
    return [prompt.messages[0]["content"] for prompt in prompts]


def everything(task: Jsonl | Hub) -> dict[str, list[Prompt]]:
    return {str(part): prompts for part, prompts in task._parts.items()}  # pyright: ignore[reportPrivateUsage]


def test_every_name_leads_to_a_task_of_that_kind() -> None:
    for name, target in TASKS.items():
        module, attribute = target.split(":")
        cls = getattr(import_module(module), attribute)
        assert issubclass(cls, Task)
        assert cls.model_fields["kind"].default == name


def test_reading_a_recipe_does_not_import_torch() -> None:
    modules = ", ".join(target.split(":")[0] for target in TASKS.values())
    code = (
        f"import sys, {modules}, potstill.metrics; potstill.tasks.jsonl.Jsonl(path='x', verify='math'); "
        "potstill.tasks.reasoning_gym.ReasoningGym(); print(sorted({'torch', 'datasets'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "[]\n"


# Rows of a file


def test_a_row_becomes_a_prompt(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "Add."}, {"role": "user", "content": "2+2="}]
    rows = [{"prompt": messages, "answer": "4", "completion": "It is 4", "id": 17, "level": 1}]
    [prompt] = Jsonl(path=write(tmp_path / "a.jsonl", rows), holdout=0).draw(0, 0, 1)
    assert prompt == Prompt(id="17", messages=tuple(messages), answer="4", completion="It is 4", meta={"level": 1})


def test_a_string_is_one_user_message_and_a_number_an_answer(task: Jsonl) -> None:
    prompt = next(prompt for prompt in everything(task)["train"] if prompt.id == "sums.jsonl:8")
    assert prompt.messages == ({"role": "user", "content": "7+7="},)
    assert (prompt.answer, prompt.meta) == ("14", {"level": 1})


def test_line_separators_inside_strings_are_kept(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"prompt": "one\u2028two", "answer": "x"}])
    assert texts(Jsonl(path=path, holdout=0).draw(0, 0, 1)) == ["one\u2028two"]


def test_draws_are_shuffled_epochs_and_a_function_of_seed_and_step(task: Jsonl) -> None:
    train = everything(task)["train"]
    per_epoch = len(train) // 20
    epochs = [
        [prompt.id for step in range(e * per_epoch, (e + 1) * per_epoch) for prompt in task.draw(7, step, 20)]
        for e in (0, 1)
    ]
    for epoch in epochs:
        assert len(set(epoch)) == len(epoch) == per_epoch * 20
    assert epochs[0] != epochs[1]
    assert epochs[0] != sorted(epochs[0])
    again = Jsonl(path=task.path)
    assert again.draw(7, 5, 20) == task.draw(7, 5, 20) != again.draw(8, 5, 20)


def test_parts_never_overlap_and_have_their_shares(tmp_path: Path) -> None:
    rows = [{**row, "prompt": f"{row['prompt']}{copy}"} for row in ROWS for copy in (0, 1, 2, 3)]
    parts = everything(Jsonl(path=write(tmp_path / "a.jsonl", rows + rows), holdout=0.2))
    sets = {part: set(texts(prompts)) for part, prompts in parts.items()}
    assert sum(map(len, sets.values())) == len(set[str]().union(*sets.values())) == 1200
    for split in ("validation", "test"):
        assert abs(len(sets[split]) / 1200 - 0.2) < 0.05  # the standard error is 0.012
        assert len(parts[split]) == 2 * len(sets[split])  # duplicates stay together


def test_new_rows_move_no_old_one(task: Jsonl, tmp_path: Path) -> None:
    extra = [{"prompt": f"{i}-1=", "answer": i - 1} for i in range(100)]
    grown = everything(Jsonl(path=write(tmp_path / "b.jsonl", extra + ROWS)))
    for part, prompts in everything(task).items():
        assert set(texts(prompts)) <= set(texts(grown[part]))


def test_fewer_questions_are_a_prefix_of_more_and_too_many_an_error(task: Jsonl) -> None:
    there = len(everything(task)["test"])
    assert task.questions("test", 5) == task.questions("test", there)[:5]
    with pytest.raises(DataError, match=rf"{there + 1} test prompts were asked for, but the data set has {there}"):
        task.questions("test", there + 1)
    with pytest.raises(DataError, match="1000 training prompts"):
        task.draw(0, 0, 1000)


def test_files_of_their_own_are_used_whole(tmp_path: Path) -> None:
    train, validation, test = (write(tmp_path / f"{n}.jsonl", ROWS[n * 100 : (n + 1) * 100]) for n in range(3))
    task = Jsonl(path=train, validation_path=validation, test_path=test)
    assert [len(prompts) for prompts in everything(task).values()] == [100, 100, 100]
    with pytest.raises(ValidationError, match=r"holdout = 0\.2 has no effect"):
        Jsonl(path=train, validation_path=validation, test_path=test, holdout=0.2)
    with pytest.raises(DataError, match=r"test prompt 0.jsonl:\d+ is also train prompt 0.jsonl:\d+"):
        Jsonl(path=train, test_path=train).draw(0, 0, 1)


def test_verifiers_by_name_and_by_table() -> None:
    assert Jsonl.model_validate({"path": "x"}).verifier() == Exact()
    assert Jsonl.model_validate({"path": "x", "verify": "math"}).verifier() == Math()
    table = {"kind": "exact", "pattern": "#(.*)"}
    task = Jsonl.model_validate({"path": "x", "verify": table})
    assert task.verifier() == Exact(pattern="#(.*)")
    assert Jsonl.model_validate(task.model_dump(mode="json")) == task
    with pytest.raises(ValidationError, match="'exact', 'math'"):
        Jsonl.model_validate({"path": "x", "verify": "maths"})


BAD_FILES: list[tuple[str, dict[str, str], str]] = [
    ("", {}, "is empty"),
    ('{"prompt": "a"}\n{"prompt": \n', {}, r"data.jsonl:2: not JSON"),
    ("[1]\n", {}, r"data.jsonl:1: .* is not an object"),
    ('{"promt": "a"}\n', {}, r"data.jsonl:1: no column 'prompt' \(did you mean 'promt'\? the columns are promt\)"),
    ('{"prompt": "a", "answers": "b"}\n', {"answer": "answer"}, r"no column 'answer' \(did you mean 'answers'\?"),
    ('{"prompt": 3}\n', {}, "'prompt' holds 3; a prompt is a string"),
    ('{"prompt": " "}\n', {}, "a string with text in it"),
    ('{"prompt": []}\n', {}, "or a list of messages"),
    ('{"prompt": [{"role": "user"}]}\n', {}, "or a list of messages"),
    ('{"prompt": [{"role": "assistant", "content": "2"}]}\n', {}, "the student would see the answer"),
    ('{"prompt": "a", "answer": [1]}\n', {}, r"'answer' holds \[1\]; it must hold a string or a number"),
    (
        '{"prompt": "a", "id": 1}\n{"prompt": "b", "id": "1"}\n',
        {},
        "data.jsonl:2: the id '1' is also that of data.jsonl:1",
    ),
]


@pytest.mark.parametrize(("content", "fields", "message"), BAD_FILES)
def test_a_bad_file_is_one_clear_message(tmp_path: Path, content: str, fields: dict[str, str], message: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        Jsonl.model_validate({"path": path, "holdout": 0, **fields}).draw(0, 0, 1)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere.jsonl cannot be read: .*No such file"):
        Jsonl(path=tmp_path / "nowhere.jsonl").draw(0, 0, 1)


def test_prompts_need_no_answers_but_held_out_questions_do(tmp_path: Path) -> None:
    rows = [{"prompt": row["prompt"], "answers": "1"} for row in ROWS]
    task = Jsonl(path=write(tmp_path / "a.jsonl", rows))
    assert task.draw(0, 0, 1)[0].answer is None
    with pytest.raises(DataError, match=r"no column 'answer' \(did you mean 'answers'\?"):
        task.questions("test", 1)


# Rows of a Hugging Face data set


def test_hub_reads_saved_data_sets_and_folders(tmp_path: Path, task: Jsonl) -> None:
    from datasets import Dataset, DatasetDict

    rows = Dataset.from_list(ROWS)
    rows.save_to_disk(str(tmp_path / "single"))
    DatasetDict({"train": rows.select(range(200)), "test": rows.select(range(200, 300))}).save_to_disk(
        str(tmp_path / "both")
    )
    single = Hub(path=str(tmp_path / "single"))
    for part, prompts in everything(task).items():  # the same split as from a file: the text decides
        assert set(texts(prompts)) == set(texts(everything(single)[part]))
    both = Hub(path=str(tmp_path / "both"), test_split="test")
    assert len(everything(both)["test"]) == 100
    assert both.questions("test", 1)[0].answer is not None
    with pytest.raises(DataError, match=r"no split 'tests' \(did you mean 'test'\? the splits are test, train\)"):
        Hub(path=str(tmp_path / "both"), test_split="tests").draw(0, 0, 1)
    with pytest.raises(DataError, match="name = 'main' has no effect"):
        Hub(path=str(tmp_path / "both"), name="main").draw(0, 0, 1)


def test_a_data_set_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere' cannot be loaded"):
        Hub(path=str(tmp_path / "nowhere")).draw(0, 0, 1)


# reasoning-gym

SUMS = ReasoningGym(name="chain_sum", options={"max_digits": 2})


def test_reasoning_gym_is_repeatable_and_new_in_every_step() -> None:
    assert SUMS.draw(1, 0, 8) == SUMS.draw(1, 0, 8)
    assert not set(texts(SUMS.draw(1, 0, 8))) & set(texts(SUMS.draw(1, 1, 8)))
    assert SUMS.questions("validation", 4) == SUMS.questions("validation", 9)[:4]


def test_reasoning_gym_never_trains_on_a_question() -> None:
    """One-digit sums are so few that all of them come up: 90 or fewer questions in all, none in two parts."""
    few = ReasoningGym(options={"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1})
    train = {text for step in range(20) for text in texts(few.draw(0, step, 20))}
    validation, test = (set(texts(few.questions(split, 20))) for split in ("validation", "test"))
    assert len(validation) == len(test) == 20
    assert train.isdisjoint(validation | test)
    assert validation.isdisjoint(test)
    with pytest.raises(DataError, match=r"200 different test questions of chain_sum .* tries gave"):
        few.questions("test", 200)


def test_reasoning_gym_seeds_do_not_overlap() -> None:
    ids = [int(prompt.id.split(":")[1]) for step in range(5) for prompt in SUMS.draw(3, step, 10)]
    assert max(ids) < SEEDS["validation"] <= int(SUMS.questions("validation", 1)[0].id.split(":")[1]) < SEEDS["test"]
    assert SEEDS["test"] + 1000 * CHUNK < 2**32  # numpy takes no larger seed


def test_its_own_answers_are_right() -> None:
    for name in ("chain_sum", "letter_counting", "countdown", "simple_integration", "graph_color"):
        task = ReasoningGym(name=name, extract="raw")
        scorer = task.verifier()
        for prompt in task.draw(0, 0, 3):
            if prompt.answer is not None:
                answer = scorer.extract(prompt.answer)
                assert answer is not None
                assert scorer.score(answer, prompt) == 1
            assert scorer.score("no idea", prompt) < 1


@pytest.mark.parametrize(
    ("extract", "text", "expected"),
    [
        ("tags", "<answer>1</answer> or <answer> 2 </answer>", "2"),
        ("tags", "2", None),
        ("tags", "<answer></answer>", None),
        ("last_line", "so\n 2 \n\n", "2"),
        ("last_line", " \n", None),
        ("last_number", "4 - 3 + 2 = 3.", "3"),
        ("last_number", "it is -3", "-3"),
        ("last_number", "it is \u2212 3 or 7-3", "3"),
        ("last_number", "it is \u22123", "-3"),
        ("last_number", "about 1,234,567.5 in all", "1234567.5"),
        ("last_number", "none", None),
        ("raw", " 2\n", "2"),
    ],
)
def test_answers_are_found(extract: Any, text: str, expected: str | None) -> None:
    assert Scorer(name="chain_sum", options={}, extract_from=extract).extract(text) == expected


@pytest.mark.parametrize("name", ["boxnet", "game_of_life", "prime_factorization"])
@pytest.mark.parametrize("answer", ["12", "{}", "a b c"])
def test_a_scorer_that_raises_gives_nothing(name: str, answer: str) -> None:
    task = ReasoningGym(name=name, extract="raw")
    assert task.verifier().score(answer, task.draw(0, 0, 1)[0]) <= 0.1


@pytest.mark.parametrize("name", EVALUATED)
def test_a_scorer_never_runs_what_a_model_wrote(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    task = ReasoningGym(name=name, extract="raw")
    [prompt] = task.draw(0, 0, 1)
    harm = tmp_path / "harm"
    for call in (f"open({str(harm)!r}, 'w')", f"(open)({str(harm)!r}, 'w')", f"[open][0]({str(harm)!r}, 'w')"):
        for answer in (call, f"1+{call}", f"[{call}]", call.replace("(", " (", 1)):
            assert task.verifier().score(answer, prompt) == 0
    assert not harm.exists()


def test_the_list_of_scorers_that_run_answers_is_complete() -> None:
    import reasoning_gym

    root = Path(reasoning_gym.__file__).parent
    runs = re.compile(r"\beval\(answer|(?:sympy|sp)\.parse_expr\(answer|[ (]parse_expr\(answer")
    found = {path.stem for path in root.rglob("*.py") if runs.search(path.read_text(encoding="utf-8"))}
    assert found == EVALUATED.keys()


BAD_GYMS: list[tuple[dict[str, Any], str]] = [
    ({"name": "chain_sums"}, "did you mean 'chain_sum'"),
    ({"options": {"max_digit": 2}}, "refuses chain_sum with options .*max_digit"),
    ({"options": {"min_digits": 5, "max_digits": 2}}, "refuses chain_sum"),
    ({"options": {"seed": 1}}, "hold seed"),
    ({"name": "letter_jumble"}, "is no number"),
    ({"extract": "tag"}, "'tags', 'last_line'"),
]


@pytest.mark.parametrize(("fields", "message"), BAD_GYMS)
def test_a_task_that_cannot_be_made_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ReasoningGym.model_validate(fields)


def test_tasks_that_differ_between_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    for name in HASH_ORDERED:
        with pytest.raises(ValidationError, match="PYTHONHASHSEED=0"):
            ReasoningGym(name=name, extract="raw")
