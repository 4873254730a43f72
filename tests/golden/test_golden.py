"""Numbers do not drift: the first steps of two runs are what they were (see regenerate.py)."""

import pytest
from tests.golden.regenerate import RECIPES, STEPS, rows, stored


@pytest.mark.parametrize("name", RECIPES)
def test_first_steps_are_as_stored(name: str):
    now, then = rows(name), stored(name)
    assert len(now) == len(then) == STEPS
    for a, b in zip(now, then, strict=True):
        assert a.keys() == b.keys()
        # Below 1e-6 there is only rounding: the KL to the reference at step 1, for example.
        assert a == pytest.approx(b, rel=1e-5, abs=1e-6), f"step {a['step']}"
