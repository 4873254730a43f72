"""Chunk audits of one answer: N continuations of C tokens at each of M places, prefixes shared or read anew each time."""

from collections.abc import Sequence
from typing import Any

from benchmarks import transcript
from benchmarks.case import Case, Goal, Params
from benchmarks.transcript import Line
from benchmarks.worker import Clock, one_thread, result

PROMPT = 32
"""Tokens before the answer."""


def cases(smoke: bool) -> list[Case]:
    """A model whose time goes into its layers, and one whose time goes into its output head."""
    size = {"m": 2, "n": 2, "c": 4, "t": 24} if smoke else {"m": 10, "n": 10, "c": 50, "t": 512}
    return [
        Case(
            name=f"audits-{vocab}",
            subject="audits",
            title=f"audits, M = {size['m']}, N = {size['n']}, C = {size['c']}, T = {size['t']}, V = {vocab:,}",
            params={**size, "model": f"{{out}}/teacher-{vocab}-dense", "vocab": vocab},
            goals=(
                Goal(measure="cpu_s", peer="generate", at_least=8.0),
                Goal(measure="cpu_s", peer="per_place"),
                Goal(measure="rss_mb", peer="generate"),
            ),
            equal={"mean_logp": 1e-4},
            models=(f"teacher-{vocab}-dense",),
        )
        for vocab in ((300,) if smoke else (512, 32_000))
    ]


def prefixes(params: Params) -> tuple[list[int], list[int]]:
    """Prompt and answer, random but equal on all sides, and how much of it is read at each of the M places."""
    import torch

    draw = torch.Generator().manual_seed(0)
    text = torch.randint(3, params["vocab"], (PROMPT + params["t"],), generator=draw).tolist()
    last = params["t"] - params["c"]
    return text, [PROMPT + i * last // (params["m"] - 1) for i in range(params["m"])]


def ours(params: Params) -> dict[str, Any]:
    """Our decoder: the answer is read once, and all rows decode together."""
    one_thread()
    from potstill import models
    from potstill.decode import Row, write

    loaded = models.load(params["model"])
    text, lengths = prefixes(params)
    rows = [
        Row(trunk=0, prefix=tuple(text[:length]), limit=params["c"], seed=place * params["n"] + i)
        for place, length in enumerate(lengths)
        for i in range(params["n"])
    ]
    never = [params["vocab"]]  # no such token: all continuations have C tokens

    def go(chosen: Sequence[Row]) -> list[Any]:
        trunk = max((row.prefix for row in chosen), key=len)
        return write(loaded.model, [trunk], chosen, vocab=params["vocab"], eos=never)

    go([Row(trunk=0, prefix=tuple(text[:8]), limit=2, seed=0)])
    with Clock() as clock:
        written = go(rows)
    lines = [
        Line(messages=[], prompt_ids=list(r.prefix), ids=list(w.ids), verdict=0.0)
        for r, w in zip(rows, written, strict=True)
    ]
    transcript.write(params["transcript"], [lines])
    logps = [p for w in written for p in w.logp]
    return result(clock, mean_logp=sum(logps) / len(logps))


def generate(params: Params) -> dict[str, Any]:
    """All M x N whole prefixes in one batch, padded on the left to the longest."""
    [lines] = transcript.read(params["transcript"])
    return _generate(params, [lines])


def per_place(params: Params) -> dict[str, Any]:
    """A batch for each place, whose prefixes are equally long: no padding, but M decodes one after the other."""
    [lines] = transcript.read(params["transcript"])
    n = params["n"]
    return _generate(params, [lines[i : i + n] for i in range(0, len(lines), n)])


def _generate(params: Params, batches: Sequence[Sequence[Line]]) -> dict[str, Any]:
    one_thread()
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    from benchmarks.follow import Follow

    model = AutoModelForCausalLM.from_pretrained(params["model"], dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None

    def go(lines: Sequence[Line], limit: int) -> Follow:
        how = GenerationConfig(
            max_new_tokens=limit, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, pad_token_id=0, eos_token_id=None
        )
        follow, width = Follow([x.ids for x in lines], 0, keep=True), max(len(x.prompt_ids) for x in lines)
        ids = torch.tensor([[*[0] * (width - len(x.prompt_ids)), *x.prompt_ids] for x in lines])
        mask = torch.tensor([[0] * (width - len(x.prompt_ids)) + [1] * len(x.prompt_ids) for x in lines])
        written = model.generate(input_ids=ids, attention_mask=mask, generation_config=how, logits_processor=[follow])
        assert written.shape[1] == width + limit
        return follow

    go([Line(messages=[], prompt_ids=[3] * 8, ids=[3, 4], verdict=0.0)], 2)
    with Clock() as clock:
        follows = [go(lines, params["c"]) for lines in batches]
    clock.cpu_s -= sum(f.clock.cpu_s for f in follows)
    clock.wall_s -= sum(f.clock.wall_s for f in follows)
    tokens = transcript.tokens(batches)
    return result(clock, mean_logp=float(sum(f.summed() for f in follows)) / tokens)


SIDES = {"ours": ours, "generate": generate, "per_place": per_place}
