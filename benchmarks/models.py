"""Random-weight models that both sides load: `python -m benchmarks.models OUT NAME...`.

Random weights measure speed, memory and equality, never quality.
"""

import json
import sys
from pathlib import Path
from typing import Any

EVERY = 40
"""With random weights all tokens are about equally likely: if every 40th ends an answer, lengths are geometric, mean 40."""
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SHAPES = {"student": (128, 4), "teacher": (256, 6)}  # width, layers
SMOLLM2 = "models/smollm2-135m-instruct"


def build(folder: Path, name: str) -> None:
    """`student-32000`, `teacher-32000`, ... (-dense: one end token); `smollm2-teacher`: SmolLM2 with noise in its weights."""
    import torch

    if (folder / "config.json").is_file():
        return
    if name == "smollm2-teacher":
        _noised(Path(SMOLLM2), folder)
        return
    from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

    role, size, *dense = name.split("-")
    width, layers = SHAPES[role]
    vocab = int(size)
    torch.manual_seed(len(role))
    config = Qwen2Config(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=width * 4,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = Qwen2ForCausalLM(config)
    ends = [2] if dense else [2, *range(EVERY, vocab, EVERY)]
    model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=0, do_sample=True)
    model.save_pretrained(folder)
    tokenizer(vocab).save_pretrained(folder)


def tokenizer(vocab: int) -> Any:
    """Bytes, three special tokens, and as many more tokens that no text is cut into."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<|im_start|>", "<|im_end|>"]
    known = special + sorted(pre_tokenizers.ByteLevel.alphabet())
    known += [f"t{i}" for i in range(len(known), vocab)]
    plain = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(known)}, merges=[]))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    plain.add_special_tokens(special)
    return PreTrainedTokenizerFast(
        tokenizer_object=plain,
        pad_token="<pad>",
        eos_token="<|im_end|>",
        padding_side="left",
        chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def _noised(source: Path, folder: Path) -> None:
    """A teacher that differs from the student: a tenth of each matrix's own spread is added to it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.add_(0.1 * p.std() * torch.randn_like(p))
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)


def prompts(path: Path, count: int) -> None:
    """Questions of different lengths, as JSON Lines."""
    rows = [
        {"prompt": f"Question {i}: what is {i * 37 % 1009}{' and so on' * (i % 4)}?", "answer": str(i)}
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    """Build what is missing."""
    out = Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    prompts(out / "prompts.jsonl", 400)
    for name in sys.argv[2:]:
        build(out / name, name)


if __name__ == "__main__":
    main()
