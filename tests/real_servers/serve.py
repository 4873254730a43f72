"""Real servers on loopback, run from an environment of their own that `make test-servers` makes."""

import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import gguf
import httpx2
import pytest
import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parents[2]
ENVIRONMENT = ROOT / ".venv-servers"
TEACHER = ROOT / "src/potstill/lab/models/teacher"
WIDTH = 32
"""Of an attention head, the least that vLLM has a kernel for; the lab's are 24 wide."""
CONTEXT = 4096
READY = "/health"
PATIENCE = 300
"""Seconds that a server may take to start."""


class Running:
    """A server in a process group of its own."""

    def __init__(self, command: Sequence[str | Path], port: int, log: Path):
        self.command, self.log, self.port = [str(part) for part in command], log, port
        self.url = f"http://127.0.0.1:{port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Return once it answers. Fails the test with the end of its log if it never does."""
        quiet = {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self.command, env=os.environ | quiet, stdout=log, stderr=log, start_new_session=True
            )
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until and self._process.poll() is None:
            try:
                if httpx2.get(f"{self.url}{READY}", timeout=5).status_code == 200:
                    return
            except httpx2.HTTPError:
                time.sleep(0.5)
        self.kill()
        pytest.fail(f"{' '.join(self.command)} did not start:\n{self.log.read_text(errors='replace')[-3000:]}")

    def kill(self) -> None:
        """As the kernel does when memory runs out: no farewell."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def counter(self, name: str, **labels: str) -> int:
        """One of vLLM's counters, summed over all labels but these."""
        total = 0.0
        for line in httpx2.get(f"{self.url}/metrics").text.splitlines():
            if found := re.fullmatch(rf"vllm:{name}\{{(.*)\}} (\S+)", line):
                known = dict(re.findall(r'(\w+)="([^"]*)"', found[1]))
                if labels.items() <= known.items():
                    total += float(found[2])
        return round(total)


def needs(package: str) -> Path:
    """The Python that has a server's package; skips the test where nobody has made the environment."""
    if not list(ENVIRONMENT.glob(f"lib/python*/site-packages/{package}")):
        pytest.skip(f"{package} is not in {ENVIRONMENT.name}; `make test-servers` puts it there")
    return ENVIRONMENT / "bin/python"


@contextmanager
def running(command: Sequence[str | Path], port: int, log: Path) -> Iterator[Running]:
    server = Running(command, port, log)
    try:
        server.start()
        yield server
    finally:
        server.kill()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


# --- the lab's teacher, in forms that servers take --------------------------------------------------------------------


def widened(folder: Path) -> Path:
    """The lab's teacher with wider heads and a longer context, and otherwise the same function.

    Zeros fill the heads up. The frequencies of RoPE, theta^(-2i/width), stay with theta^(WIDTH/width) in theta's place,
    and the queries make up for the 1/sqrt(width) of attention.
    """
    shutil.copytree(TEACHER, folder)
    config = json.loads((folder / "config.json").read_text())
    heads, width = config["num_attention_heads"], config["head_dim"]
    weights = load_file(folder / "model.safetensors")

    def wide(w: torch.Tensor) -> torch.Tensor:
        halves = w.view(heads, 2, width // 2, -1)  # RoPE turns the first half of a head against the second
        return torch.nn.functional.pad(halves, (0, 0, 0, (WIDTH - width) // 2)).reshape(heads * WIDTH, -1)

    for name, w in weights.items():
        if re.search(r"[qkv]_proj", name):
            weights[name] = wide(w) * (math.sqrt(WIDTH / width) if "q_proj" in name else 1)
        if "o_proj" in name:
            weights[name] = wide(w.T).T.contiguous()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config["rope_parameters"]["rope_theta"] **= WIDTH / width
    config |= {"head_dim": WIDTH, "max_position_embeddings": CONTEXT}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def as_gguf(model: Path, file: Path) -> Path:
    """A Llama of the lab's vocabulary as one file for llama.cpp."""
    config = json.loads((model / "config.json").read_text())
    vocab = json.loads((model / "tokenizer.json").read_text())["model"]["vocab"]
    heads, width = config["num_attention_heads"], config["head_dim"]
    layers = config["num_hidden_layers"]
    out = gguf.GGUFWriter(file, "llama")
    out.add_context_length(config["max_position_embeddings"])
    out.add_embedding_length(config["hidden_size"])
    out.add_block_count(layers)
    out.add_feed_forward_length(config["intermediate_size"])
    out.add_head_count(heads)
    out.add_head_count_kv(config["num_key_value_heads"])
    out.add_key_length(width)
    out.add_value_length(width)
    out.add_rope_dimension_count(width)
    out.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    out.add_layer_norm_rms_eps(config["rms_norm_eps"])
    out.add_vocab_size(len(vocab))
    out.add_tokenizer_model("llama")
    out.add_token_list(list(vocab))
    out.add_token_scores([0.0] * len(vocab))
    out.add_token_types([gguf.TokenType.CONTROL] * 2 + [gguf.TokenType.NORMAL] * (len(vocab) - 2))
    out.add_eos_token_id(config["eos_token_id"])
    out.add_pad_token_id(config["pad_token_id"])
    out.add_add_bos_token(False)
    out.add_add_space_prefix(False)
    out.add_chat_template((model / "chat_template.jinja").read_text())
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, layers)
    for name, w in load_file(model / "model.safetensors").items():
        if re.search(r"[qk]_proj", name):  # llama.cpp turns neighbours against each other, not halves
            w = w.view(heads, 2, width // 2, -1).transpose(1, 2).reshape(w.shape)
        out.add_tensor(names.get_name(name, (".weight",)), w.contiguous().numpy())
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return file
