"""Writing answers: our sampler against transformers' `generate`, batch by batch, the same tokens on both sides."""

import asyncio
from collections.abc import Sequence
from typing import Any

from benchmarks import transcript
from benchmarks.case import ROOT, Case, Goal, Params
from benchmarks.models import EVERY, SMOLLM2
from benchmarks.step import ARITHMETIC, LAB
from benchmarks.transcript import Line
from benchmarks.worker import Clock, one_thread, result

EQUAL = {"mean_logp": 1e-4}


def cases(smoke: bool) -> list[Case]:
    """The lab's student in small and large batches, and a real model."""
    out = [
        Case(
            name=f"rollouts-lab-{batch}",
            subject="rollouts",
            title=f"rollouts, lab student, batch {batch}, mixed lengths",
            params={
                "model": f"{LAB}/student",
                "task": ARITHMETIC,
                "batch": batch,
                "batches": batches,
                "max_tokens": 48,
            },
            goals=(Goal(measure="cpu_ms_per_token", peer="generate", at_least=at_least),),
            equal=EQUAL,
        )
        for batch, batches, at_least in (((4, 2, 3.0),) if smoke else ((8, 30, 3.0), (64, 10, 2.0)))
    ]
    if smoke:
        return out
    params = {"model": str(ROOT / SMOLLM2), "batch": 16, "batches": 1, "max_tokens": 96, "every": EVERY}
    return [
        *out,
        Case(
            name="rollouts-smollm2",
            subject="rollouts",
            title="rollouts, SmolLM2-135M, batch 16, mixed lengths",
            params={**params, "task": {"kind": "jsonl", "path": "{out}/prompts.jsonl"}},
            goals=(Goal(measure="cpu_ms_per_token", peer="generate", at_least=1.3),),
            equal=EQUAL,
            needs=SMOLLM2,
        ),
    ]


def ends(params: Params, own: Sequence[int], vocab: int) -> tuple[int, ...]:
    """What ends an answer: the model's own end tokens, or with them every so-many-th token, so that lengths mix."""
    every = params.get("every")
    return (*own, *(i for i in range(every, vocab, every) if i not in own)) if every else tuple(own)


def ours(params: Params) -> dict[str, Any]:
    """Our sampler; log-probs and entropies come with the answers."""
    one_thread()
    from dataclasses import replace

    from potstill import models
    from potstill.recipes import parse
    from potstill.samplers.hf import HFSampler
    from potstill.types import Turn

    recipe = {"name": "x", "steps": 1, "student": {"path": params["model"]}, "method": {"name": "grpo"}}
    task: Any = parse({**recipe, "task": params["task"]}).task
    loaded = models.load(params["model"])
    tokens = replace(loaded.tokens, eos=ends(params, loaded.tokens.eos, loaded.tokens.vocab))
    sampler = HFSampler(replace(loaded, tokens=tokens))
    clock, steps, logps = Clock(), list[list[Line]](), list[float]()
    for step in range(params["batches"] + 1):
        prompts = task.draw(0, step, 2 if step == 0 else params["batch"])
        limit = 4 if step == 0 else params["max_tokens"]
        turn = Turn(seed=0, step=step, max_tokens=limit)
        with Clock() if step == 0 else clock:  # the first one warms up
            groups = asyncio.run(sampler.sample(prompts, 1, turn))
        rows = [r for group in groups for r in group]
        steps.append([_line(r) for r in rows])
        logps += [p for r in rows for p in r.old_logp or () if step]
    transcript.write(params["transcript"], steps)
    return _result(clock, steps, sum(logps) / len(logps))


def _line(r: Any) -> Line:
    return Line(messages=[], prompt_ids=list(r.prompt_ids), ids=list(r.response_ids), verdict=0.0)


def _result(clock: Clock, steps: transcript.Steps, mean_logp: float, **value: Any) -> dict[str, Any]:
    count = transcript.tokens(steps[1:])
    lengths = [len(line.ids) for step in steps[1:] for line in step]
    return result(
        clock,
        cpu_ms_per_token=1000 * clock.cpu_s / count,
        mean_logp=mean_logp,
        tokens=count,
        shortest=min(lengths),
        longest=max(lengths),
        **value,
    )


def generate(params: Params) -> dict[str, Any]:
    """`generate`, padded on the left, until the longest answer has ended."""
    one_thread()
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    from benchmarks.follow import Follow

    model = AutoModelForCausalLM.from_pretrained(params["model"], dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(params["model"])
    listed = model.generation_config.eos_token_id
    own = [*dict.fromkeys([tokenizer.eos_token_id, *(listed if isinstance(listed, list) else [listed])])]
    eos = list(ends(params, own, len(tokenizer)))
    pad = tokenizer.pad_token_id
    clock, steps, logp = Clock(), transcript.read(params["transcript"]), 0.0
    for step, lines in enumerate(steps):
        limit = 4 if step == 0 else params["max_tokens"]
        how = GenerationConfig(
            max_new_tokens=limit,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            eos_token_id=eos,
            pad_token_id=pad,
        )
        follow, taking = Follow([line.ids for line in lines], pad, keep=True), Clock() if step == 0 else clock
        with taking:
            width = max(len(line.prompt_ids) for line in lines)
            ids = torch.tensor([[*[pad] * (width - len(x.prompt_ids)), *x.prompt_ids] for x in lines])
            mask = torch.tensor([[0] * (width - len(x.prompt_ids)) + [1] * len(x.prompt_ids) for x in lines])
            written = model.generate(
                input_ids=ids, attention_mask=mask, generation_config=how, logits_processor=[follow]
            )
        assert written.shape[1] - width == follow.width, "generate stopped where our sampler did not"
        taking.cpu_s -= follow.clock.cpu_s
        taking.wall_s -= follow.clock.wall_s
        logp += float(follow.summed()) if step else 0.0
    return _result(clock, steps, logp / transcript.tokens(steps[1:]), following_cpu_s=follow.clock.cpu_s)


SIDES = {"ours": ours, "generate": generate}
