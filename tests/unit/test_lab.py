"""The lab: its arithmetic by hand, its splits, its tokenizers, and what the bundled models can do."""

import json
import random
from functools import cache

import pytest

from potstill.errors import ConfigError, DataError
from potstill.lab import MODELS, NAMES, corpus, model_path
from potstill.lab.build import build
from potstill.lab.evaluate import wilson, write
from potstill.lab.tokenizers import CHARACTERS, character_tokenizer, foreign_tokenizer
from potstill.lab.train import IGNORED, encode
from potstill.tasks.arithmetic import Arithmetic, Step, pairs, product, work, written
from potstill.types import Prompt, Rollout

TASK = Arithmetic()


@cache
def bundled(name):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(model_path(name)), AutoTokenizer.from_pretrained(model_path(name))


@pytest.mark.parametrize(
    ("multiplicand", "multiplier", "answer"),
    [
        (473, 6, "3*6+0=18;7*6+1=43;4*6+4=28;#2838"),
        (12, 3, "2*3+0=6;1*3+0=3;#36"),
        (100, 9, "0*9+0=0;0*9+0=0;1*9+0=9;#900"),
        (25, 4, "5*4+0=20;2*4+2=10;#100"),
        (9999, 9, "9*9+0=81;9*9+8=89;9*9+8=89;9*9+8=89;#89991"),
    ],
)
def test_workings_by_hand(multiplicand, multiplier, answer):
    assert written(work(multiplicand, multiplier)) == answer


def test_every_working_gives_the_product():
    for digits in (2, 3):
        for a, b in pairs("train", digits) + pairs("validation", digits) + pairs("test", digits):
            assert product(work(a, b)) == str(a * b)


def test_the_rest_follows_from_a_slip():
    assert work(473, 6, lambda value: 99 if value == 18 else value) == [
        Step(3, 6, 0, 99), Step(7, 6, 9, 51), Step(4, 6, 5, 29),
    ]  # fmt: skip
    assert product([Step(3, 6, 0, 99), Step(7, 6, 9, 51), Step(4, 6, 5, 29)]) == "2919"


def test_splits_share_no_prompt_and_hold_all_of_them():
    for digits in (2, 3, 4):
        parts = [set(pairs(split, digits)) for split in ("train", "validation", "test")]
        assert len(set.union(*parts)) == sum(map(len, parts)) == 9 * 10 ** (digits - 1) * 8
        assert len(parts[0]) / len(set.union(*parts)) == pytest.approx(0.6, abs=0.03)


def test_drawing_depends_on_seed_and_step_alone():
    prompts = TASK.draw(1, 2, 300)
    assert prompts == TASK.draw(1, 2, 300)
    assert TASK.draw(1, 3, 300) != prompts != TASK.draw(2, 2, 300)
    assert len({p.id for p in prompts}) == 300
    assert all(80 < sum(p.meta["digits"] == d for p in prompts) < 120 for d in (2, 3, 4))
    held_out = {p.id for split in ("validation", "test") for p in TASK.questions(split, 432)}
    assert held_out.isdisjoint(p.id for step in range(20) for p in TASK.draw(0, step, 300))


def test_fewer_questions_are_a_prefix_of_more():
    assert TASK.questions("test", 10) == TASK.questions("test", 432)[:10]
    assert [p.meta["digits"] for p in TASK.questions("validation", 6)] == [2, 3, 4, 2, 3, 4]


def test_too_many_questions_are_refused():
    with pytest.raises(DataError, match="of 2 digits were asked for, but there are"):
        TASK.questions("validation", 1000)
    with pytest.raises(DataError, match="train prompts of 2 digits"):
        Arithmetic(digits=(2,)).draw(0, 0, 1000)
    with pytest.raises(ValueError, match="2, 3, 4 or 5 digits"):
        Arithmetic(digits=(3, 3))


@pytest.mark.parametrize(
    ("answer", "score"),
    [("3*6+0=18;7*6+1=43;4*6+4=28;#2838", 1), ("#2838", 1), ("#28380", 0), ("2838", 0), ("#2838;", 0), ("#1#2838", 1)],
)
def test_what_stands_behind_the_last_sign_counts(answer, score):
    prompt = Prompt(id="p", messages=({"role": "user", "content": "473*6="},), answer="2838")
    ids = tuple(range(len(answer)))
    assert (
        TASK.verifier()(
            Rollout(prompt=prompt, sample=0, prompt_ids=(0,), response_ids=ids, pieces=tuple(answer), finish="stop")
        )
        == score
    )


@pytest.mark.parametrize("make", [character_tokenizer, foreign_tokenizer])
def test_tokenizers_give_every_text_back(make):
    tokenizer, rng = make(), random.Random(0)
    for _ in range(200):
        for text in (corpus.plain(rng, slips=0.2), corpus.foreign(rng)):
            whole = text.question + text.answer
            assert tokenizer.decode(tokenizer.encode(whole, add_special_tokens=False)) == whole
            assert tokenizer.pad_token_id not in tokenizer.encode(whole)
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "473*6="}], tokenize=True, add_generation_prompt=True, return_dict=False
    )
    assert tokenizer.convert_ids_to_tokens(chat) == (
        ["4", "7", "3", *(["*6"] if make is foreign_tokenizer else ["*", "6"]), "="]
    )


def test_foreign_tokens_cut_across_characters():
    tokenizer = foreign_tokenizer()
    assert tokenizer.tokenize("3*6+0=18;#18") == ["3", "*6", "+0=", "1", "8;", "#", "1", "8"]
    assert len(character_tokenizer()) == len(CHARACTERS) + 2


def test_what_is_given_is_not_learned():
    tokenizer = foreign_tokenizer()
    tokens, labels = encode(tokenizer, corpus.Text("47*6=", "7*6+0=99;4*6+9=33;#339", given=8), cut=8)
    learned = [i for i, label in enumerate(labels) if label != IGNORED]
    assert tokenizer.decode([tokens[i] for i in learned]) == ";4*6+9=33;#339<eos>"
    assert learned == list(range(learned[0], len(tokens)))


def test_mistakes_are_followed_up():
    rng = random.Random(3)
    texts = [corpus.mistaken(rng, 473, 6, rate=0.5) for _ in range(300)]
    assert len({t.answer for t in texts}) > 250
    for text in texts:
        *steps, answer = text.answer.split(";")
        assert len(steps) == 3
        position = 0
        for step, before in zip(steps, [None, *steps], strict=False):
            right = eval(step.split("=")[0])
            if position + len(step) > text.given:  # not read from somebody else: it must follow
                assert int(step.split("=")[1]) == right
                assert before is None or position + 5 <= text.given or f"+{int(before.split('=')[1]) // 10}=" in step
            position += len(step) + 1
        assert answer.startswith("#")


def test_three_notations_one_answer():
    steps = work(473, 6)
    assert [notation(steps) for notation in corpus.NOTATIONS] == [
        "3*6+0=18;7*6+1=43;4*6+4=28;#2838",
        "(3x6+0:18)(7x6+1:43)(4x6+4:28)#2838",
        "<0>3x6:18<1>7x6:43<4>4x6:28#2838",
    ]


def test_wilson_interval_by_hand():
    # p = 1/2, n = 4, z^2 = 3.8416: (0.5 + 0.4802 +- 1.96 sqrt(0.0625 + 0.060025)) / 1.9604
    assert wilson(2, 4) == pytest.approx((0.5, 0.15004, 0.84996), abs=1e-4)
    assert wilson(10, 10).high == pytest.approx(1)


# What the bundled models can do, on 240 validation questions: 95 % of the bands of the lab's page, with room for chance.
BANDS = {"teacher": ((0.88, 1), (0.9, 1)), "student": ((0.04, 0.18), (0.25, 0.45)), "foreign": ((0.82, 1), (0.9, 1))}


@pytest.mark.parametrize("name", NAMES)
def test_bundled_models_are_as_good_as_stated(name):
    model, tokenizer = bundled(name)
    prompts = TASK.questions("validation", 240)
    for sample, (low, high) in zip((True, False), BANDS[name], strict=True):
        answers = write(model, tokenizer, [p.messages[0]["content"] for p in prompts], sample=sample)
        right = sum(TASK.verifier().extract(a) == p.answer for a, p in zip(answers, prompts, strict=True)) / len(
            prompts
        )
        assert low <= right <= high
        ended = [TASK.verifier().extract(a) is not None for a in answers]
        assert sum(ended) >= 0.97 * len(ended)  # `#digits` to the end of the text: no model runs on


def test_the_foreign_model_continues_any_prefix():
    model, tokenizer = bundled("foreign")
    rng = random.Random(0)
    prompts = TASK.questions("validation", 240)
    cuts = [rng.randrange(1, len(p.completion) - 1) for p in prompts]
    begun = [p.messages[0]["content"] + p.completion[:cut] for p, cut in zip(prompts, cuts, strict=True)]
    rest = write(model, tokenizer, begun, sample=True, limit=6)
    pieces = [p.completion[cut : cut + 4] for p, cut in zip(prompts, cuts, strict=True)]
    assert sum(text.startswith(piece) for text, piece in zip(rest, pieces, strict=True)) / len(prompts) >= 0.9


def test_the_bundle_is_small_and_says_how_it_was_made():
    assert sum(path.stat().st_size for path in MODELS.rglob("*") if path.is_file()) < 12e6
    report = json.loads((MODELS / "lab.json").read_text())
    assert report["seed"] == 0
    assert set(report["models"]) == set(NAMES)
    for name in NAMES:
        model, tokenizer = bundled(name)
        assert model.num_parameters() == report["models"][name]["parameters"]
        assert model.generation_config.eos_token_id == tokenizer.eos_token_id != tokenizer.pad_token_id
        assert model.config.pad_token_id == model.generation_config.pad_token_id == tokenizer.pad_token_id


def test_unknown_models_and_full_directories_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="did you mean 'student'"):
        model_path("studnet")
    with pytest.raises(ConfigError, match="overwrites nothing"):
        build(tmp_path)
