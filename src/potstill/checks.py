"""Everything about a recipe that can go wrong before a weight is loaded: tokenizers, data, and whether the parts fit."""

import os
from pathlib import Path

import torch

from potstill import models
from potstill.config import Config, Teacher
from potstill.errors import ConfigError
from potstill.methods.base import Method
from potstill.models import Tokens
from potstill.samplers.data import answer_ids
from potstill.samplers.hf import prompt_within
from potstill.tasks.base import Task
from potstill.teachers import load as remote
from potstill.teachers.settings import HTTP, Chat, Potstill, Remote, Replay
from potstill.types import Prompt, Wants

BASES = ("self", "random", "inputs")
NEEDS = {
    Wants.TEXT: "text",
    Wants.SAMPLED: "the log-probability of each token",
    Wants.TOPK: "the likeliest tokens at each position",
    Wants.FULL: "its whole distribution at each position",
}


def device(name: str) -> str:
    """`auto` is a GPU if there is one. On a CPU, one thread: for small models two are slower. Raises ConfigError."""
    chosen = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    if chosen.partition(":")[0] not in ("cpu", "cuda"):
        raise ConfigError(f"device = {name!r} is none that potstill knows. Use 'auto', 'cpu', 'cuda' or 'cuda:1'")
    if chosen.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"device = {name!r}, but torch {torch.__version__} sees no GPU. Use device = 'auto' or 'cpu'")
    if chosen == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    return chosen


def check(config: Config) -> tuple[Tokens, list[Prompt]]:
    """Everything that can go wrong before a weight is loaded. Returns the student's tokens and the questions."""
    method, task = method_of(config), task_of(config)
    _check_teacher(config, method)
    _check_reference(config, method)
    _check_rollouts(config, method)
    _check_selection(config, method)
    _check_budget(config, method)
    _check_geometry(config)
    if config.steps and config.learner.warmup >= config.steps:
        raise ConfigError(
            f"learner.warmup = {config.learner.warmup} is not shorter than steps = {config.steps}, so the learning rate "
            "would never arrive. Lower warmup or raise steps"
        )
    if config.learner.lr >= 1:
        raise ConfigError(
            f"learner.lr = {config.learner.lr} moves every weight by more than 1 a step. Try 1e-3 or less"
        )
    if config.student.dtype == "bfloat16" and not config.student.lora:
        raise ConfigError(
            "student.dtype = 'bfloat16' without LoRA would train weights of 8 bits' precision, which round most small "
            "steps away. Use learner.precision = 'bfloat16' (arithmetic only), or add [student.lora]"
        )
    device(config.student.device)
    student = models.load_tokens(config.student.path, config.student.eos)
    readers = [student]
    if config.teacher is not None:
        readers += _check_tokens(config, method, student)
    if config.reference is not None:
        device(config.reference.device)
        models.check_shared(student, models.load_tokens(config.reference.path, config.reference.eos))
    questions = task.questions(config.eval.split, config.eval.questions) if config.eval.questions else []
    asked = [*task.draw(config.seed, 1, config.rollouts.prompts), *task.known()]
    for prompt in [*questions, *asked]:
        for tokens in readers:
            prompt_within(tokens, prompt, config.rollouts.max_tokens)
    if "verdict" in method.needs:
        _check_answers(method, asked)
    if method.author == "data":
        for prompt in task.known():
            answer_ids(student, prompt, config.rollouts.max_tokens)
    return student, questions


def _writes(config: Config, method: Method) -> bool:
    """Whether the teacher writes whole answers."""
    return method.author == "teacher" or method.examples is not None or config.rollouts.off_policy


def _check_tokens(config: Config, method: Method, student: Tokens) -> list[Tokens]:
    """The teacher's tokenizer, where it has one that we know of, checked against the student's."""
    if isinstance(config.teacher, Teacher | Potstill):
        device(config.teacher.device)
    if isinstance(config.teacher, Teacher):
        teacher = models.load_tokens(config.teacher.path, config.teacher.eos)
    elif isinstance(config.teacher, HTTP | Potstill):
        teacher = models.load_tokens(config.teacher.tokenizer, config.teacher.eos)
    else:
        return []
    differ = models.same_tokenizer(student, teacher)
    if config.teacher.align and differ is None:
        raise ConfigError(
            f"teacher.align carries the scores of another tokenizer over to the student's, but {teacher.name} has the "
            "student's own, so it would have no effect. Remove it"
        )
    if method.wants > Wants.TEXT and not config.teacher.align:
        models.check_shared(student, teacher)
    if (_writes(config, method) or method.imitates) and differ is None:
        models.check_eos(student, teacher)
    return [teacher]


def _check_teacher(config: Config, method: Method) -> None:
    name, teacher = method.name, config.teacher
    if teacher is None:
        if not method.teacherless:
            what = NEEDS[method.wants] if method.wants > Wants.NOTHING else "its answers"
            raise ConfigError(
                f"{name} learns from a teacher ({what}), but the recipe names none. Add [teacher] with path = ..."
            )
        return
    if method.teacherless:
        raise ConfigError(f"{name} as set here asks no teacher, so [teacher] would have no effect. Remove the table")
    if isinstance(teacher, Remote | Replay):
        remote.check(teacher, name, method.wants)
    if isinstance(teacher, Replay):
        return
    if not isinstance(teacher, Chat) and teacher.text_only and method.wants > Wants.TEXT:
        raise ConfigError(
            f"{name} needs {NEEDS[method.wants]} of the teacher, but teacher.text_only leaves only text. "
            "Use method omniopd, or remove text_only"
        )
    if not isinstance(teacher, Chat) and teacher.align and (teacher.text_only or method.wants <= Wants.TEXT):
        why = "teacher.text_only leaves only text" if teacher.text_only else f"{name} as set here asks for none"
        raise ConfigError(
            f"teacher.align carries the teacher's scores over to the student's tokens, but {why}, so it would have no "
            "effect. Remove one of the two, or use a method that asks for scores, such as opd"
        )
    writes = method.examples is not None or config.rollouts.off_policy
    if method.wants > Wants.TEXT and not writes and (teacher.temperature != 1 or teacher.top_p != 1):
        raise ConfigError(
            f"{name} reads the teacher's scores, which are always at temperature 1, so teacher.temperature and top_p would "
            "have no effect. Remove them (opd: method.teacher_temperature flattens the scores)"
        )
    shuffled = isinstance(teacher, Teacher) and teacher.shuffled
    if shuffled and method.wants is not Wants.TEXT:
        raise ConfigError(
            f"teacher.shuffled gives every prompt the continuations of another, but {name} asks for none. Remove it, or "
            "use a method that learns from continuations, such as omniopd"
        )
    if shuffled and method.asks_again:
        raise ConfigError(
            f"teacher.shuffled gives every prompt the continuations of another, but {name} as set here asks again about few "
            "prompts, sometimes one, which would get its own. Set method.narrow = 0"
        )
    if shuffled and config.rollouts.prompts == 1:
        raise ConfigError(
            "teacher.shuffled needs another prompt to take continuations from, but rollouts.prompts = 1. Set it to 2 or more"
        )
    if teacher.temperature == 0 and "variety" in method.needs:
        raise ConfigError(
            f"{name} asks for several answers to the same question, but teacher.temperature = 0 makes them all the same "
            "text: one answer counted many times, at many times the price. Set teacher.temperature = 1, or ask once"
        )


def _check_reference(config: Config, method: Method) -> None:
    if method.refers_to == "base" and config.reference is None:
        raise ConfigError(
            f'{method.name} with reference = "base" starts from the teacher before its RL, but the recipe does not name that '
            'model. Add [reference] with path = ..., or set method.reference = "start" (the initial student)'
        )
    if method.refers_to != "base" and config.reference is not None:
        raise ConfigError(
            f"{method.name} as set here asks no other model for a reference, so [reference] would have no effect. Remove "
            'the table, or use a method with reference = "base"'
        )


def _check_answers(method: Method, prompts: list[Prompt]) -> None:
    without = [p.id for p in prompts if p.answer is None]
    if without:
        raise ConfigError(
            f"{method.name} as set here needs a verdict on every answer, but {len(without)} of {len(prompts)} prompts have "
            f"no answer to compare with (the first: {without[0]!r}). Add the column, or use a method without a verifier, such "
            "as sampled_kl"
        )


def _check_budget(config: Config, method: Method) -> None:
    if config.budget.teacher_tokens and not (method.corrects or method.author == "teacher"):
        asks = "asks no teacher" if method.teacherless else "does not ask the teacher about every answer"
        raise ConfigError(
            f"budget.teacher_tokens may never end a run of {method.name}, which as set here {asks}. "
            "Give steps or budget.rollout_tokens"
        )


def _check_selection(config: Config, method: Method) -> None:
    if config.select and method.imitates:
        raise ConfigError(
            f"[select] keeps some of the tokens that the student wrote, but {method.name} as set here learns from what the "
            "teacher writes in their place. Remove [select], or use omniopd without dagger"
        )
    if config.select is None or config.select.by == "random":
        return
    if method.author != "student":
        raise ConfigError(
            f"select.by = {config.select.by!r} looks at the student's own tokens, but {method.name} learns from the "
            f"{method.author}'s. Remove [select], or use by = 'random'"
        )
    if config.select.by != "entropy" and (method.wants < Wants.SAMPLED or not method.corrects):
        raise ConfigError(
            f"select.by = {config.select.by!r} compares the teacher's scores with the student's, but {method.name} asks for "
            "none. Use by = 'entropy', or a method that asks for scores"
        )


def _check_geometry(config: Config) -> None:
    projection = config.projection
    for table, wanted in (("projection", projection is not None), ("geometry", config.geometry.every > 0)):
        if wanted and config.student.lora:
            raise ConfigError(
                f"[{table}] is about whole weight matrices, but [student.lora] trains an adapter beside them, whose updates "
                "have at most its rank anyway. Remove one of the two (`potstill geometry` reads adapters)"
            )
    if projection and projection.basis == "self" and projection.at == 0:
        raise ConfigError(
            'projection.from = "self" takes the subspace of the update so far, but at projection.at = 0 there is none. '
            "Set at = 0.2, say, or take the basis from elsewhere"
        )
    if projection and projection.basis not in BASES and not Path(projection.basis).is_file():
        raise ConfigError(
            f"projection.from = {projection.basis!r} is neither {', '.join(BASES)} nor a file. Give one of these, or the "
            "geometry/step_N.npz of a run that recorded its updates ([geometry])"
        )


def _check_rollouts(config: Config, method: Method) -> None:
    group, room = config.rollouts.group, config.rollouts.max_tokens
    greedy = (method.author == "teacher" or config.rollouts.off_policy) and getattr(
        config.teacher, "temperature", 1
    ) == 0
    if group > 1 and (greedy or method.author == "data"):
        who = "the data set has one answer" if not greedy else "teacher.temperature = 0 writes one answer"
        raise ConfigError(
            f"rollouts.group = {group}, but {who} to a prompt, so each would be learnt {group} times over. "
            "Set rollouts.group = 1"
        )
    if "group" in method.needs and group < 2:
        raise ConfigError(
            f"{method.name} as set here compares the answers to a prompt with each other, but rollouts.group = {group}, so "
            "none would be better than another. Set rollouts.group = 8 (and fewer rollouts.prompts), or use a method that "
            "takes right and wrong as they are (opdvr; sgopd with sign = 'outcome')"
        )
    if config.rollouts.resample and (group < 2 or "verdict" not in method.needs):
        raise ConfigError(
            f"rollouts.resample = {config.rollouts.resample} replaces prompts whose answers all score alike, which needs "
            f"several answers to a prompt (rollouts.group = {group}) and a method that uses verdicts ({method.name}). Remove it"
        )
    if config.rollouts.horizon and (config.rollouts.horizon.start >= room or method.author == "data"):
        raise ConfigError(
            f"rollouts.horizon.start = {config.rollouts.horizon.start} shortens nothing: answers have at most {room} tokens "
            f"(rollouts.max_tokens) and are written by the {method.author}. Lower it, or remove the horizon"
        )
    if config.rollouts.horizon and (not method.corrects or method.examples):
        why = "learns from verdicts, which an answer that is cut off does not have"
        if method.examples:
            why = "has answers of the teacher verified (phased), and none that is cut off can be right"
        raise ConfigError(
            f"rollouts.horizon cuts answers off, but {method.name} as set here {why}. Remove one of the two"
        )
    if config.rollouts.off_policy and (method.author != "student" or method.examples or method.wants <= Wants.TEXT):
        raise ConfigError(
            f"rollouts.off_policy lets the teacher write in the student's place, but {method.name} as set here "
            "does not learn from the student's answers alone by the teacher's scores. Remove it, or use opd or sampled_kl"
        )
    if "entropy" in method.needs and method.author != "student":
        raise ConfigError(
            f"{method.name} needs the entropies of what it learns from, but its rollouts are written by the "
            f"{method.author}, and only the student's have them. Let the student write"
        )
    _check_ahead(config, method)
    method.check(room, group=group, updates=config.learner.updates + config.rollouts.ahead)


def _check_ahead(config: Config, method: Method) -> None:
    if not config.rollouts.ahead:
        return
    if method.author != "student" or method.examples or config.rollouts.off_policy:
        raise ConfigError(
            f"rollouts.ahead lets a copy of the student write the next step's answers, but {method.name} as set here does not "
            "learn from the student's answers alone. Remove it"
        )
    if not method.stands_age:
        raise ConfigError(
            f"rollouts.ahead gives {method.name} answers that are one update old, and it takes them as the student's own. "
            "Set method.max_ratio, 2 for example, which weighs them by how likely the student still finds them"
        )


def method_of(config: Config) -> Method:
    """The recipe's method. Raises ConfigError if a file of the user's defines another kind of class."""
    if not isinstance(config.method, Method):
        raise ConfigError(
            f"method {type(config.method).__name__} is no potstill.methods.base.Method. Derive it from Method"
        )
    return config.method


def task_of(config: Config) -> Task:
    """The recipe's task."""
    assert isinstance(config.task, Task)
    return config.task
