"""Random numbers depend on what they are for, on every machine alike."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from potstill.seeds import derive, uniforms

GOLDEN = 5274249804689050892
DRAWN = [0.8083908557891846, 0.7684263586997986, 0.6218839883804321]
parts = st.one_of(st.integers(-5, 10**6), st.text(max_size=4))


def test_the_numbers_are_the_same_on_every_machine() -> None:
    assert derive(0, 1, "lab-17", 3) == GOLDEN
    np.testing.assert_array_equal(uniforms(GOLDEN, 3), np.array(DRAWN, np.float32))


@given(st.lists(parts, max_size=4), st.lists(parts, max_size=4))
def test_equal_keys_and_only_they_give_equal_seeds(a: list[int | str], b: list[int | str]) -> None:
    assert (derive(*a) == derive(*b)) == (a == b)
    assert 0 <= derive(*a) < 2**63


def test_parts_of_a_key_do_not_run_together() -> None:
    keys = [(1, 23), (12, 3), (123,), ("1", 23), (1, "23"), ("1, 23",), ()]
    assert len({derive(*k) for k in keys}) == len(keys)


@given(st.integers(0, 2**63 - 1), st.integers(0, 30), st.integers(0, 30))
def test_a_longer_draw_starts_with_the_shorter(seed: int, n: int, more: int) -> None:
    long = uniforms(seed, n + more)
    np.testing.assert_array_equal(long[:n], uniforms(seed, n))
    assert ((long >= 0) & (long < 1)).all()


def test_neighbouring_streams_have_nothing_in_common() -> None:
    """Chunk i and chunk i + 1 of a rollout: no number of one is a number of another, whatever the shift."""
    streams = [uniforms(derive(7, "teacher", start, i), 200) for start in range(4) for i in range(4)]
    flat = np.concatenate(streams)
    assert len(np.unique(flat)) > len(flat) - 3  # float32 draws may coincide once in a while
    correlation = np.corrcoef(streams) - np.eye(16)
    assert np.abs(correlation).max() < 0.28  # four standard deviations of 1 / sqrt(200)
    assert abs(flat.mean() - 0.5) < 0.02
