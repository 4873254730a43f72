"""Prompts to token ids and token ids to text, through the tokenizer alone: its chat template, its decoder."""

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

from jinja2.exceptions import TemplateError

from potstill.errors import DataError
from potstill.types import Prompt

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
LEAD = "1"
"""Stands for whatever a continuation follows."""
LONGEST = 8
"""Tokens that one character may be split over before we give up waiting for its end."""


def prompt_ids(tokenizer: Any, prompt: Prompt) -> tuple[int, ...]:
    """The prompt as a model is to see it, up to where its answer begins.

    With a chat template: the template, with its generation prompt. Without one: the text of a single message as it is.
    Raises DataError for a conversation that a tokenizer without template cannot lay out.
    """
    if tokenizer.chat_template is not None:
        try:
            ids = tokenizer.apply_chat_template(
                list(prompt.messages), tokenize=True, add_generation_prompt=True, return_dict=False
            )
        except TemplateError as error:
            raise DataError(
                f"the chat template of {tokenizer.name_or_path!r} cannot lay out prompt {prompt.id!r} "
                f"({', '.join(m['role'] for m in prompt.messages)}): {error}. Change the prompt's messages"
            ) from None
        return tuple(ids)
    if len(prompt.messages) != 1:
        raise DataError(
            f"prompt {prompt.id!r} has {len(prompt.messages)} messages, but the tokenizer {tokenizer.name_or_path!r} has no "
            "chat template to lay them out. Use an instruct model, or give the prompt as one string"
        )
    return tuple(tokenizer.encode(prompt.messages[0]["content"]))


def alike(a: Any, b: Any) -> bool:
    """Whether two tokenizers lay out prompts in the same way: by equal templates, with the same around a plain text."""
    probe = Prompt(id="probe", messages=({"role": "user", "content": LEAD},))
    try:
        return a.chat_template == b.chat_template and prompt_ids(a, probe) == prompt_ids(b, probe)
    except DataError:  # a template that does not take it
        return False


def pieces(tokenizer: Any, ids: Sequence[int]) -> tuple[str, ...]:
    """[T] the text that each token adds. Joined, they are the text of all; no piece holds part of a character.

    Special tokens add nothing. A character split over several tokens belongs to the last of them.
    """
    known = _TEXTS.setdefault(tokenizer, {})
    for token in ids:
        if token not in known:
            known[token] = tokenizer.decode([token], **PLAIN)
    alone = tuple(known[token] for token in ids)
    whole = tokenizer.decode(list(ids), **PLAIN)
    if "".join(alone) == whole and REPLACEMENT not in whole:
        return alone  # every token is a text of its own; the common case, and ten times faster
    return _grown(tokenizer, ids)


PLAIN = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
_TEXTS: WeakKeyDictionary[Any, dict[int, str]] = WeakKeyDictionary()
"""Per tokenizer, the text of a token that stands alone."""


def _grown(tokenizer: Any, ids: Sequence[int]) -> tuple[str, ...]:
    """What the text grows by with each token, read together with the text before it.

    The window begins where a character does: a decoder of single bytes gives up a whole run that begins inside one.
    """
    special = set(tokenizer.all_special_ids)
    out: list[str] = []
    start, done, before = 0, 0, ""  # tokens up to `done` are settled; `before` is the text of the last of them
    for t, token in enumerate(ids):
        if token in special:
            out.append("")
            continue
        after = tokenizer.decode(list(ids[start : t + 1]), **PLAIN)
        if after.endswith(REPLACEMENT) and t - done < LONGEST and t + 1 < len(ids):
            out.append("")  # the rest of the character is still to come
            continue
        out.append(after[len(before) :])
        start, done = done, t + 1
        before = tokenizer.decode(list(ids[start:done]), **PLAIN)
    return tuple(out)


def ids_behind(tokenizer: Any, text: str) -> tuple[int, ...]:
    """The tokens of a text that goes on from other text.

    Some tokenizers put a mark of a space before whatever they begin with; such a text is read behind another one.
    """
    ids = tokenizer.encode(text, add_special_tokens=False)
    lead = tokenizer.encode(LEAD, add_special_tokens=False)
    if text and tokenizer.decode([*lead, *ids], **PLAIN) != LEAD + text:
        behind = tokenizer.encode(LEAD + text, add_special_tokens=False)
        if behind[: len(lead)] == lead:
            ids = behind[len(lead) :]
    return tuple(ids)


def cut(tokenizer: Any, text: str, length: int) -> str:
    """The first `length` tokens' worth of a text, in this tokenizer's tokens; never part of a character."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    return text if len(ids) <= length else "".join(pieces(tokenizer, ids[: length + 1])[:length])
