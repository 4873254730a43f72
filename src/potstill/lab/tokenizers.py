"""The lab's two tokenizers: single characters, and the foreign model's pieces that cut across them."""

from itertools import product
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, EOS = "<pad>", "<eos>"
DIGITS = "0123456789"
CHARACTERS = [*DIGITS, *"*+=;#x:()<>"]
PIECES = ("*0", "x0", "+0=", "+0:", "0;", "0)", "<0>")
"""Shapes of the foreign model's longer tokens; 0 stands for any digit."""
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def character_tokenizer() -> "PreTrainedTokenizerFast":
    """One token a character: all that any model of the lab writes can be read by the student."""
    return _tokenizer([], ".")


def foreign_tokenizer() -> "PreTrainedTokenizerFast":
    """`+0=`, `*6` or `8;` are one token each, so few boundaries are where the student has them."""
    pieces = [shape.replace("0", digit) for shape, digit in product(PIECES, DIGITS)]
    return _tokenizer(pieces, r"[*x]\d|\+\d[=:]|\d[;)]|<\d>|.")


def _tokenizer(pieces: list[str], pattern: str) -> "PreTrainedTokenizerFast":
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = [PAD, EOS, *CHARACTERS, *pieces]
    backend = Tokenizer(models.WordLevel({token: i for i, token in enumerate(vocabulary)}, unk_token=PAD))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=EOS,
        padding_side="left",
        model_max_length=128,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )
