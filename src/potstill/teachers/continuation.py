"""Is this text a continuation? Chat models told to go on often do something else first, or instead.

What is only wrapped is unwrapped (*repaired*); what is no continuation at all is *rejected*; the rest is *accepted* as it
came. All of it before the text is compared with anything. The rules look at form, never at whether the text is right.
"""

import re
from dataclasses import dataclass

from rapidfuzz import fuzz

from potstill.ledger import Answer, Question

END = "<END>"
"""What a model that is told to go on writes if nothing is left to say."""

THOUGHT = re.compile(r"\s*<(think|thinking|thought|reasoning)>.*?</\1>\s*", re.DOTALL | re.IGNORECASE)
OPEN_THOUGHT = re.compile(r"\s*<(think|thinking|thought|reasoning)>", re.IGNORECASE)
REFUSAL = re.compile(
    r"\s*(i['\u2019]?m (sorry|unable to|not able to)|i am (sorry|unable to|not able to)|sorry, (but )?i|"
    r"i (can['\u2019]?t|cannot|won['\u2019]?t|will not) (help|assist|continue|comply|do that|provide|fulfil)|"
    r"as an ai\b|i apologi[sz]e)",
    re.IGNORECASE,
)
PREAMBLE = re.compile(
    r"\s*((sure|certainly|of course|okay|ok|absolutely|got it|understood)\b[^\n]{0,80}?([.!][ \t]*\n+|:[ \t]*(\n+|$))|"
    r"(here(['\u2019]s| is| are)\b[^\n]{0,40}?\b(continu\w*|rest|remainder|completion)|continu(ing|ation|ed)|picking up)"
    r"\b[^\n]{0,80}?:[ \t]*(\n+|$))",
    re.IGNORECASE,
)
FENCE = re.compile(r"\s*```[\w+-]*[ \t]*\n(.*?)(?:\n?```\s*|$)\Z", re.DOTALL)
TAG = re.compile(r"\s*<(continuation|answer|output|response)>\n?(.*?)(?:</\1>\s*|$)\Z", re.DOTALL | re.IGNORECASE)
PAIRS = {'"': '"', "“": "”", "«": "»", "`": "`"}
ECHO_CHARS, ECHO_WORDS = 16, 3
"""A repeated end of the prefix is an echo if it is at least so long: "1, 1, 1," may well be followed by "1, 1"."""
RESTART_CHARS, RESTART_RATIO = 24, 90.0
"""A text that begins as the prefix began, so long and so alike (per cent), is a restart."""


@dataclass(frozen=True, slots=True)
class Judged:
    """A text to use, or None, and why."""

    text: str | None
    verdict: str
    """accepted, repaired: WHAT, or rejected: WHY."""


def judge(answer: Answer, question: Question) -> Judged:
    """What can be used of an answer, given what was asked."""
    if answer.finish == "refusal":
        return Judged(None, "rejected: refusal")
    mode = question.parameters["continues"]
    if mode == "completion":  # not a conversation: there are no manners to go wrong
        return Judged(answer.text or "", "accepted")
    assert answer.text is not None
    asked = question.messages[-1]["content"] if question.messages else ""
    return clean(answer.text, question.prefix, told=mode == "instruction", ended=answer.finish == "stop", asked=asked)


def clean(text: str, prefix: str, *, told: bool, ended: bool, asked: str = "") -> Judged:
    """The continuation inside a chat model's answer.

    Args:
        text: What the model wrote.
        prefix: What it was to continue; empty at the beginning of an answer.
        told: By instruction; else the prefix was put in its mouth, and only thoughts and refusals can go wrong.
        ended: The model stopped by itself.
        asked: The user's last message, which some models repeat.
    """
    repairs: list[str] = []
    if thought := THOUGHT.match(text):
        text = text[thought.end() :]
        repairs.append("thinking")
    elif OPEN_THOUGHT.match(text):
        return Judged(None, "rejected: thinking")
    if REFUSAL.match(text) and not REFUSAL.match(prefix):
        return Judged(None, "rejected: refusal")
    if not told or not prefix.strip():
        text = text.removeprefix(prefix[len(prefix.rstrip()) :])  # a prefill ends without its white space
        return _judged(text, repairs, empty_is_fine=ended)
    finished = ended and text.rstrip().endswith(END)
    if finished:
        text = text.rstrip().removesuffix(END)
    text = _unwrapped(text, prefix, repairs)
    if asked.strip() and text.lstrip().startswith(asked.strip()) and len(asked.strip()) >= ECHO_CHARS:
        return Judged(None, "rejected: echo")
    after = _after_echo(text, prefix)
    if after is not None:
        if not after.strip() and not finished:
            return Judged(None, "rejected: echo")
        text = after
        repairs.append("echo")
    elif _restarts(text, prefix):
        return Judged(None, "rejected: restart")
    return _judged(text, repairs, empty_is_fine=finished)


def _judged(text: str, repairs: list[str], *, empty_is_fine: bool) -> Judged:
    if not text.strip() and not empty_is_fine:
        return Judged(None, "rejected: empty")
    return Judged(text, "repaired: " + ", ".join(repairs) if repairs else "accepted")


def _unwrapped(text: str, prefix: str, repairs: list[str]) -> str:
    """Without a sentence before it, and without what was put around it."""
    if (preamble := PREAMBLE.match(text)) and not PREAMBLE.match(prefix):
        text = text[preamble.end() :]
        repairs.append("preamble")
    if tag := TAG.match(text):
        text = tag[2]
        repairs.append("tags")
    inside_code = prefix.count("```") % 2 == 1
    # A fence opens at the start of a line. After a whole line it may be what the teacher really writes next.
    if not inside_code and not prefix.endswith("\n") and not text.startswith("\n") and (fence := FENCE.match(text)):
        text = fence[1]
        repairs.append("fence")
    bare = text.strip()
    mate = PAIRS.get(bare[:1])
    if mate and len(bare) > 2 and bare.endswith(mate) and bare.count(bare[0]) == 1 + (mate == bare[0]):
        text = bare[1:-1]
        repairs.append("quotes")
    bold = re.fullmatch(r"\s*(\*\*|__)(?!\s)([^*_]+)\1\s*", text)
    if bold and bold[1] not in prefix[-2:]:
        text = bold[2]
        repairs.append("markdown")
    dots = re.match(r"\s*(…|\.\.\.)\s?(?=\S)", text)
    if dots and prefix.rstrip()[-1:].isalnum():
        text = text[dots.end() :]
        repairs.append("dots")
    return text


def _after_echo(text: str, prefix: str) -> str | None:
    """What comes after a repetition of the prefix, or of its end; None if there is none. White space may differ."""
    words, spans = [], []
    for found in re.finditer(r"\S+", text):
        words.append(found[0])
        spans.append(found.end())
    before = prefix.split()
    for count in range(min(len(words), len(before)), 0, -1):
        if words[:count] != before[-count:]:
            continue
        long = count >= ECHO_WORDS and len(" ".join(words[:count])) >= ECHO_CHARS
        if long or count == len(before) >= ECHO_WORDS:
            return text[spans[count - 1] :]
        return None
    if len(prefix.strip()) >= ECHO_CHARS and text.lstrip().startswith(prefix.strip()):  # it ends inside a word
        return text.lstrip()[len(prefix.strip()) :]
    return None


def _restarts(text: str, prefix: str) -> bool:
    mine, theirs = text.strip(), prefix.strip()
    length = min(len(mine), len(theirs), 200)
    return length >= RESTART_CHARS and fuzz.ratio(mine[:length], theirs[:length]) >= RESTART_RATIO
