"""The shared decoder against transformers' own forward pass and `generate`, one sequence at a time."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tests import tiny
from tests.tiny import plain_logp

from potstill.decode import Decoding, Row, Written, cut, reader, write
from potstill.kv import Cache, fitting
from potstill.seeds import derive

V = 40
FAMILIES = ["llama", "qwen2", "gemma3"]  # the last one is always read by its own forward pass
GREEDY = Decoding(temperature=0.0)


def numbers(seed: int, count: int) -> tuple[int, ...]:
    return tuple(torch.randint(0, V, (count,), generator=torch.Generator().manual_seed(seed)).tolist())


LONG = numbers(0, 30)
# Two trunks. Rows that leave the first one early and late, one that goes its own way before its end, one of a single token.
TRUNKS = [LONG, numbers(1, 11)]
ROWS = [
    *(Row(trunk=0, prefix=LONG[:n], limit=12, seed=derive("row", n, i)) for n in (5, 17, 30) for i in range(2)),
    Row(trunk=0, prefix=(*LONG[:20], 7, 8, 9, 10), limit=9, seed=3),
    Row(trunk=1, prefix=TRUNKS[1], limit=15, seed=4),
    Row(trunk=1, prefix=TRUNKS[1][:1], limit=4, seed=5),
    Row(trunk=1, prefix=(39, 38, 37), limit=14, seed=6),
]


AUDIT = [Row(trunk=0, prefix=LONG[:n], limit=5, seed=derive("audit", n, i)) for n in (3, 14, 15, 30) for i in range(4)]
AUDIT += [Row(trunk=1, prefix=TRUNKS[1][:n], limit=3 + n, seed=derive("audit", n)) for n in (1, 4, 9)]
"""Continuations shorter than their trunk: it is held once, apart from them."""


def alone(model: Any, row: Row, how: Decoding = Decoding(), eos: Sequence[int] = ()) -> Written:  # noqa: B008
    """The naive path: a trunk and a batch of its own, by the model's own forward pass."""
    own = Row(trunk=0, prefix=row.prefix, limit=row.limit, seed=row.seed)
    return write(model, [row.prefix], [own], vocab=V, eos=eos, how=how, fast=False)[0]


def same(a: Sequence[Written], b: Sequence[Written]) -> None:
    assert [w.ids for w in a] == [w.ids for w in b]
    assert [w.finish for w in a] == [w.finish for w in b]
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(torch.tensor(x.logp), torch.tensor(y.logp), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(torch.tensor(x.entropy), torch.tensor(y.entropy), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_text_is_that_of_generate(family: str) -> None:
    model = tiny.model(family, V)
    got = write(model, TRUNKS, ROWS, vocab=V, eos=(), how=GREEDY)
    for row, w in zip(ROWS, got, strict=True):
        ids = torch.tensor([row.prefix])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=row.limit, pad_token_id=0
        )
        assert w.ids == tuple(out[0, len(row.prefix) :].tolist())


@pytest.mark.parametrize("family", FAMILIES)
def test_logp_and_entropy_are_those_of_a_plain_forward_pass(family: str) -> None:
    model = tiny.model(family, V)
    for row, w in zip(ROWS, write(model, TRUNKS, ROWS, vocab=V, eos=()), strict=True):
        logp = plain_logp(model, row.prefix, w.ids, V)
        torch.testing.assert_close(
            torch.tensor(w.logp), logp.gather(-1, torch.tensor(w.ids)[:, None])[:, 0], atol=1e-5, rtol=1e-5
        )
        torch.testing.assert_close(torch.tensor(w.entropy), -(logp.exp() * logp).sum(-1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("fast", [True, False])
def test_the_shared_path_is_the_naive_one(family: str, fast: bool) -> None:
    model = tiny.model(family, V)
    assert (fitting(model, V) is None) == (family == "gemma3")
    same(write(model, TRUNKS, AUDIT, vocab=V, eos=(2,), fast=fast), [alone(model, row, eos=(2,)) for row in AUDIT])
    shared = write(model, TRUNKS, ROWS, vocab=V, eos=(2, 3), fast=fast)
    same(shared, [alone(model, row, eos=(2, 3)) for row in ROWS])
    # what was shared: all but the last token of a prefix, or as much as it has in common with its trunk
    assert [w.shared for w in shared] == [4, 4, 16, 16, 29, 29, 20, 10, 0, 0]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("cells", [1, 100, 200])
@pytest.mark.parametrize("rows", [ROWS, AUDIT], ids=["rows", "audit"])
def test_tiling_and_order_change_nothing(family: str, cells: int, rows: list[Row]) -> None:
    model = tiny.model(family, V)
    whole = write(model, TRUNKS, rows, vocab=V, eos=(2,))
    same(write(model, TRUNKS, rows, vocab=V, eos=(2,), how=Decoding(cells=cells)), whole)
    same(write(model, TRUNKS, rows[::-1], vocab=V, eos=(2,))[::-1], whole)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_the_fast_path_is_the_slow_one(family: str) -> None:
    """Many rows, which end one by one, under every way to draw."""
    model = tiny.model(family, V)
    rows = [Row(trunk=i % 2, prefix=TRUNKS[i % 2][: 2 + i % 7], limit=30, seed=derive("many", i)) for i in range(60)]
    for how in (Decoding(), GREEDY, Decoding(temperature=0.7, top_p=0.9)):
        fast, slow = (write(model, TRUNKS, rows, vocab=V, eos=(2, 5), how=how, fast=fast) for fast in (True, False))
        assert len({len(w.ids) for w in fast}) > 5 or how is GREEDY
        same(fast, slow)


@pytest.mark.parametrize("apart", [True, False])
@pytest.mark.parametrize("cells", [80, 120, 160])
def test_a_cache_holds_no_more_cells_than_allowed(cells: int, apart: bool) -> None:
    model, rows = tiny.model("llama", V), AUDIT if apart else ROWS
    lean, shared = fitting(model, V), [min(len(r.prefix) - 1, 29 if r.trunk == 0 else 10) for r in rows]
    tiles = cut(rows, range(len(rows)), shared, cells, 1000, apart=apart, alike=False)
    assert len(tiles) > 1
    assert sorted(i for tile in tiles for i in tile) == list(range(len(rows)))
    for tile in tiles:
        some, begun = [rows[i] for i in tile], [shared[i] for i in tile]
        held = reader(model, lean, TRUNKS, some, begun, V, apart)
        assert isinstance(held, Cache)
        assert held.cells <= cells


def test_a_tile_holds_no_more_cells_than_allowed() -> None:
    """By the model's own forward pass, as a hook watches it."""
    model = tiny.model("llama", V)
    seen: list[int] = []
    handle = model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["attention_mask"].numel()), with_kwargs=True
    )
    write(model, TRUNKS, ROWS, vocab=V, eos=(), how=Decoding(cells=100))
    handle.remove()
    assert max(seen) in range(50, 101)


def test_equal_seeds_give_equal_text_and_other_seeds_other_text() -> None:
    model = tiny.model("llama", V)
    rows = [Row(trunk=0, prefix=LONG, limit=20, seed=s) for s in (1, 1, 2)]
    a, b, c = (w.ids for w in write(model, [LONG], rows, vocab=V, eos=()))
    assert a == b != c


def chi_square(drawn: torch.Tensor, probability: torch.Tensor) -> float:
    count = torch.bincount(drawn, minlength=len(probability)).double()
    assert (count[probability == 0] == 0).all()
    expected = probability.double() * len(drawn)
    open_ = expected > 0
    return ((count - expected)[open_] ** 2 / expected[open_]).sum().item()


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (2.0, 1.0), (1.0, 0.7), (2.0, 0.8)])
def test_tokens_are_drawn_from_the_models_distribution(temperature: float, top_p: float) -> None:
    vocab, prefix, n = 6, (1, 2, 3), 4000
    model = tiny.model("llama", vocab, seed=2)
    how = Decoding(temperature=temperature, top_p=top_p)
    rows = [Row(trunk=0, prefix=prefix, limit=2, seed=derive("draw", i)) for i in range(n)]
    ids = torch.tensor([w.ids for w in write(model, [prefix], rows, vocab=vocab, eos=(), how=how)])

    def expected(given: tuple[int, ...]) -> torch.Tensor:
        p = (plain_logp(model, given, (0,), vocab)[0] / temperature).softmax(-1)
        keep: set[int] = set()  # the smallest set of likeliest tokens that reaches top_p
        for v in p.argsort(descending=True).tolist():
            if sum(p[k].item() for k in keep) < top_p:
                keep.add(v)
        p = torch.tensor([p[v].item() if v in keep else 0.0 for v in range(vocab)])
        return p / p.sum()

    first = expected(prefix)
    both = torch.stack([first[v] * expected((*prefix, v)) for v in range(vocab)]).flatten()
    assert chi_square(ids[:, 0], first) < 20.5  # 0.1 % point at five degrees of freedom
    assert chi_square(ids[:, 0] * vocab + ids[:, 1], both) < 66.6  # the same at 35


def test_a_row_ends_with_its_first_end_token_and_the_others_go_on() -> None:
    model = tiny.model("llama", V)
    rows = [Row(trunk=0, prefix=LONG[:6], limit=25, seed=s) for s in range(40)]
    free, ended = (write(model, [LONG[:6]], rows, vocab=V, eos=eos) for eos in ((), (2, 5)))
    for f, e in zip(free, ended, strict=True):
        ends = [t for t, token in enumerate(f.ids) if token in (2, 5)]
        assert e.ids == (f.ids[: ends[0] + 1] if ends else f.ids)
        assert e.finish == ("stop" if ends else "length")
        assert f.finish == "length"
        assert len(e.ids) == len(e.logp) == len(e.entropy)
    assert {e.finish for e in ended} == {"stop", "length"}


def test_padding_rows_of_the_output_layer_are_never_written() -> None:
    model = tiny.model("llama", V)
    same(write(tiny.padded(model, 24), TRUNKS, ROWS, vocab=V, eos=(2,)), write(model, TRUNKS, ROWS, vocab=V, eos=(2,)))


def test_the_model_is_left_in_the_mode_it_was_in() -> None:
    model = tiny.model("llama", V, attention_dropout=0.5).train()
    a, b = (write(model, TRUNKS, ROWS, vocab=V, eos=()) for _ in range(2))
    same(a, b)
    assert model.training
    assert write(model, [], [], vocab=V, eos=()) == []
