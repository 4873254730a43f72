"""How alike two texts are: hand-computed values, and what holds for every pair."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from potstill.errors import ConfigError
from potstill.similarity import get

NAMES = ["edit", "exact", "token_f1", "rouge1"]
texts = st.text(alphabet="abAB 1.é🙂", max_size=12)


@pytest.mark.parametrize(
    ("name", "a", "b", "value"),
    [
        ("edit", "kitten", "sitting", 1 - 3 / 7),  # two substitutions and an insertion
        ("edit", "abcd", "abXd", 0.75),
        ("edit", "abc", "abcdef", 0.5),
        ("edit", "🙂a", "🙃a", 0.5),  # characters, not bytes
        ("edit", "a ", "a", 0.5),
        ("exact", "42", "42", 1),
        ("exact", "42", "42 ", 0),
        ("token_f1", "the cat sat", "the cat ran away", 2 * 2 / 7),
        ("token_f1", "a a b", "a a", 2 * 2 / 5),
        ("token_f1", "a a b", "a b b", 2 * 2 / 6),  # bags: one a and one b in common
        ("token_f1", "The", "the", 0),
        ("token_f1", "b a", "a  b", 1),
        ("rouge1", "the cat sat", "The cat, ran away!", 2 * 2 / 7),
        ("rouge1", "a a b", "a a", 2 * 2 / 5),
        ("rouge1", "a a b", "a b b", 2 * 2 / 6),
        ("rouge1", "+", "-", 0),  # no word on either side, and not the same text
        ("rouge1", "+", "+", 1),
    ],
)
def test_by_hand(name: str, a: str, b: str, value: float) -> None:
    assert get(name)(a, b) == pytest.approx(value)


@pytest.mark.parametrize("name", NAMES)
@given(texts, texts)
def test_between_0_and_1_symmetric_and_1_for_equals(name: str, a: str, b: str) -> None:
    phi = get(name)
    assert 0 <= phi(a, b) <= 1
    assert phi(a, b) == pytest.approx(phi(b, a))
    assert phi(a, a) == 1


@pytest.mark.parametrize("name", NAMES)
def test_empty_texts(name: str) -> None:
    phi = get(name)
    assert phi("", "") == 1
    assert phi("", "word") == phi("word", "") == 0


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'rouge1'"):
        get("rouge")
