"""Make the bundled models again: the same seed gives the same bytes on the same machine.

CPU seconds of one thread on one core of an AMD EPYC, default seed: see `models/lab.json`.
"""

import json
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers

from potstill.errors import ConfigError
from potstill.lab import corpus
from potstill.lab.evaluate import accuracy
from potstill.lab.tokenizers import character_tokenizer, foreign_tokenizer
from potstill.lab.train import new_model, train
from potstill.run import whole_directory
from potstill.seeds import derive

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

Pair = tuple["LlamaForCausalLM", "PreTrainedTokenizerFast"]
SLIPS = 0.2
"""Of the values that the student sees last. What it knows stays likeliest, and it errs when it samples."""


def teacher(seed: int) -> Pair:
    """Right workings until it has learned them."""
    tokenizer = character_tokenizer()
    model = new_model(tokenizer, derive("lab", "teacher", seed))
    train(model, tokenizer, corpus.plain, steps=1200, lr=2.5e-3, seed=derive("teacher", seed))
    return model, tokenizer


def student(seed: int) -> Pair:
    """Right workings, stopped early, then a few with slips in them."""
    tokenizer = character_tokenizer()
    model = new_model(tokenizer, derive("lab", "student", seed))
    train(model, tokenizer, corpus.plain, steps=290, lr=2.5e-3, seed=derive("student", seed))
    slipping = partial(corpus.plain, slips=SLIPS)
    train(model, tokenizer, slipping, steps=60, lr=2e-3, seed=derive("student", "slips", seed))
    return model, tokenizer


def foreign(seed: int) -> Pair:
    """Three notations, cut anywhere, and other people's mistakes to go on from."""
    tokenizer = foreign_tokenizer()
    model = new_model(tokenizer, derive("lab", "foreign", seed))
    train(model, tokenizer, corpus.foreign, steps=2500, lr=2.5e-3, seed=derive("foreign", seed))
    return model, tokenizer


MAKERS: dict[str, Callable[[int], Pair]] = {"teacher": teacher, "student": student, "foreign": foreign}


@contextmanager
def one_thread() -> Iterator[None]:
    """The order of additions, and so the last bit of every weight, depends on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng():
            yield
    finally:
        torch.set_num_threads(threads)


def build(out: Path, seed: int = 0, log: Callable[[str], None] = print) -> dict[str, Any]:
    """Train the three models, evaluate them, and write `out`/{teacher,student,foreign} and `out`/lab.json.

    Args:
        out: A directory that does not exist yet; it appears whole, or not at all.
        seed: Of the first weights and of the texts. 0 gives the bundled models.
        log: Is told of each model as it is finished.

    Returns:
        What lab.json says: seed, versions, and of each model its parameters, CPU seconds, and accuracy on validation
        questions, sampled at T = 1 and greedy, with 95 % intervals.

    Raises:
        ConfigError: There is something at `out` already.
        TrainingError: The disk is full.
    """
    if out.exists():
        raise ConfigError(f"{out} exists already, and the lab overwrites nothing; give another directory, or remove it")
    out.parent.mkdir(parents=True, exist_ok=True)
    versions = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    report: dict[str, Any] = {"seed": seed, "versions": versions, "machine": platform.machine(), "models": {}}
    with whole_directory(out) as folder, one_thread():
        for name, make in MAKERS.items():
            began = time.process_time()
            model, tokenizer = make(seed)
            seconds = round(time.process_time() - began, 1)
            sampled, greedy = (accuracy(model, tokenizer, sample=sample) for sample in (True, False))
            report["models"][name] = {
                "parameters": model.num_parameters(),
                "train_cpu_s": seconds,
                "sampled": sampled._asdict(),
                "greedy": greedy._asdict(),
            }
            log(f"{name}: {seconds} CPU s; right {sampled} sampled, {greedy} greedy")
            model.save_pretrained(folder / name)
            tokenizer.save_pretrained(folder / name)
        (folder / "lab.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report
