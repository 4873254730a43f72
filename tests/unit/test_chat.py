"""Token ids to text: no character is ever cut in two."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests import tiny

from potstill import chat
from potstill.errors import DataError
from potstill.types import Prompt

TOKENIZERS = {"byte-level": tiny.byte_level(), "byte fallback": tiny.byte_fallback()}
EVERY = pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS.keys())
MIXED = "naïve 🙂🙃 你好 — done ☕️ 👩‍💻 é"
alphabet = st.sampled_from([*"abc the", "é", "ß", "—", "你", "好", "🙂", "👩", "\u200d", "💻", "\n"])
texts = st.one_of(
    st.text(alphabet, max_size=40),
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁\ufffd"), max_size=20),
)


def ids_of(tokenizer: Any, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def test_the_examples_are_split_over_tokens() -> None:
    for tokenizer in TOKENIZERS.values():
        assert any(len(ids_of(tokenizer, character)) >= 3 for character in "好👩")
    assert len(ids_of(tiny.byte_fallback(), "🙂🙃你" * 4)) == 44  # one run of bytes


@EVERY
@pytest.mark.parametrize("text", [MIXED, "🙂", "🙂🙃你" * 4, "你🙂" * 6 + " the", "", "plain", " a  b "])
def test_pieces_join_to_the_text_and_hold_whole_characters(tokenizer: Any, text: str) -> None:
    pieces = chat.pieces(tokenizer, ids_of(tokenizer, text))
    assert "".join(pieces) == text
    assert not any(chat.REPLACEMENT in piece for piece in pieces)


@EVERY
@given(texts)
def test_pieces_of_any_text(tokenizer: Any, text: str) -> None:
    ids = ids_of(tokenizer, text)
    pieces = chat.pieces(tokenizer, ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == tokenizer.decode(ids) == text
    assert not any(chat.REPLACEMENT in piece for piece in pieces)


@given(st.lists(st.integers(4, 299), max_size=30))
def test_pieces_of_any_tokens_join_to_their_text(ids: list[int]) -> None:
    """A student at temperature 1 also writes bytes that are no characters."""
    tokenizer = tiny.byte_level()
    assert "".join(chat.pieces(tokenizer, ids)) == tokenizer.decode(ids)


@EVERY
def test_a_character_belongs_to_its_last_token(tokenizer: Any) -> None:
    woman = ids_of(tokenizer, "👩")
    pieces = chat.pieces(tokenizer, [*ids_of(tokenizer, "a"), *woman, *ids_of(tokenizer, "b")])
    assert pieces == ("a", *[""] * (len(woman) - 1), "👩", "b")


@EVERY
def test_special_tokens_are_empty(tokenizer: Any) -> None:
    end, a, smile = tokenizer.eos_token_id, ids_of(tokenizer, "a"), ids_of(tokenizer, "🙂")
    pieces = chat.pieces(tokenizer, [end, *a, end, *smile, end, end])
    assert pieces == ("", "a", "", *[""] * (len(smile) - 1), "🙂", "", "")


@EVERY
@given(texts, st.integers(0, 30))
def test_cut_is_the_longest_beginning_of_whole_characters_within_so_many_tokens(
    tokenizer: Any, text: str, length: int
) -> None:
    ids = ids_of(tokenizer, text)
    got = chat.cut(tokenizer, text, length)
    assert text.startswith(got)
    if len(ids) <= length:
        assert got == text
    else:
        beginnings = [tokenizer.decode(ids[:n]) for n in range(length + 1)]
        whole = [b for b in beginnings if chat.REPLACEMENT not in b]
        assert got == max(whole, key=len)


def test_cut_by_hand() -> None:
    tokenizer = tiny.byte_level()
    n = len(ids_of(tokenizer, "🙃"))
    assert n > 1
    lead = len(ids_of(tokenizer, "你"))
    assert [chat.cut(tokenizer, "你🙃", lead + k) for k in (0, 1, n - 1, n)] == ["你", "你", "你", "你🙃"]


def test_prompt_ids_with_a_template() -> None:
    tokenizer = tiny.byte_level()
    ids = chat.prompt_ids(tokenizer, tiny.prompt("the cat"))
    assert tokenizer.decode(ids) == "<|user|>the cat<|bot|>"
    assert ids[0] == tokenizer.convert_tokens_to_ids("<|user|>")
    two = Prompt(id="2", messages=({"role": "user", "content": "a"}, {"role": "user", "content": "b"}))
    assert tokenizer.decode(chat.prompt_ids(tokenizer, two)) == "<|user|>a<|user|>b<|bot|>"


def test_prompt_ids_without_a_template() -> None:
    tokenizer = tiny.byte_level(template=None)
    assert tokenizer.decode(chat.prompt_ids(tokenizer, tiny.prompt("the cat"))) == "the cat"
    two = Prompt(id="2", messages=({"role": "user", "content": "a"}, {"role": "user", "content": "b"}))
    with pytest.raises(DataError, match=r"'2' has 2 messages, but the tokenizer .* has no chat template"):
        chat.prompt_ids(tokenizer, two)
