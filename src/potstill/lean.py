"""The forward pass of the Llama family with nothing but its arithmetic, for decoding.

    x       = E[token]
    per layer:
      q, k, v = W_q n, W_k n, W_v n          n = rms(x)    (Qwen2: plus biases)
      q, k    = R(p) q, R(p) k               R(p): rotation by position p    (Qwen3: of rms(q), rms(k))
      x      += W_o softmax(q k' / sqrt(D)) v
      x      += W_down (silu(W_gate n) * W_up n)            n = rms(x)
    logits  = W_head rms(x)

    rms(x)  = w * x / sqrt(mean(x^2) + eps)

A module tree spends more time on a small model than the arithmetic takes. Here a layer is some fifteen operations; the
attention, and with it the cache, is the caller's (`potstill.kv`).

Two ways to hold the weights: `Plain` uses the model's own parameters where they are, `Folded` is for models so small that
calls cost more than copies: once per `Lean` it joins matrices that read the same input and multiplies the weights of the
norms into them. Both are made anew for each use, so the newest weights count.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Complex64, Float, Int
from torch import Tensor, nn

FAMILY = ("llama", "mistral", "qwen2", "qwen3")
"""Model types of transformers whose forward pass is the one above."""
SMALL = 1 << 22
"""Parameters outside the embedding up to which a model is folded: 16 MiB of copies."""
Attend = Callable[[int, Float[Tensor, "N H D"], Float[Tensor, "N K2 D"]], Float[Tensor, "N HD"] | None]
"""Layer, its queries, its keys and values -> what each token takes from the others; None: nobody needs the rest."""


def known(model: Any) -> bool:
    """Whether a model is built of nothing but the parts above: no adapter, no quantisation, no hook, no part replaced."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind not in FAMILY or model.config.hidden_act not in ("silu", "swish"):
        return False
    home = f"transformers.models.{kind}.modeling_{kind}"
    plain = (nn.Linear, nn.Embedding, nn.ModuleList, nn.SiLU)
    for part in model.modules():
        ours = type(part) in plain or type(part).__module__ in (home, "transformers.activations")
        if not ours or "forward" in part.__dict__ or part._forward_hooks or part._forward_pre_hooks:
            return False
    if not type(model).__name__.endswith("ForCausalLM") or model.model.rotary_emb.rope_type in ("dynamic", "longrope"):
        return False  # the latter turn by other angles once a sequence is long
    if model.lm_head.bias is not None:
        return False
    one = {(p.dtype, p.device) for p in model.parameters()}
    return len(one) == 1 and model.dtype.is_floating_point and model.device.type != "meta"


class Lean:
    """A model, read at a moment. N tokens in any order, H heads, K of keys and values, D numbers a head."""

    def __init__(self, model: Any, vocab: int, small: int = SMALL):
        inner = model.model
        first = inner.layers[0].self_attn
        self.dim, self.root = first.head_dim, first.scaling**0.5
        self.heads, self.kv_heads = (p.weight.shape[0] // self.dim for p in (first.q_proj, first.k_proj))
        self.embedding, self.rotary = inner.embed_tokens.weight, inner.rotary_emb
        size = sum(p.numel() for p in [*inner.layers.parameters(), model.lm_head.weight])
        self.folded = size <= small and self.embedding.dtype == torch.float32
        self.layers = [(Folded if self.folded else Plain)(layer, self) for layer in inner.layers]
        self.norm, self.head = inner.norm, model.lm_head.weight[:vocab]
        if self.folded:
            self.out, self.bit = _fold(self.head, inner.norm).t(), _bit(inner.norm)

    def turns(self, positions: int) -> Complex64[Tensor, "P half"]:
        """R(p) / D^(1/4) for p < positions, a complex number for each pair of numbers in a head: q k' comes out scaled."""
        p = torch.arange(positions, device=self.embedding.device)[None]
        cos, sin = self.rotary(torch.zeros(1, device=p.device), p)
        return torch.complex(cos[0, :, : self.dim // 2], sin[0, :, : self.dim // 2]) * self.root

    def read(
        self, ids: Int[Tensor, " N"], turn: Complex64[Tensor, "N half"], attend: Attend
    ) -> Float[Tensor, "N hidden"] | None:
        """What is known after each token."""
        x, turn = self.embedding[ids], turn[:, None]
        for i, layer in enumerate(self.layers):
            taken = attend(i, *layer.before(x, turn))
            if taken is None:
                return None
            x = layer.after(x, taken)
        return x

    def logits(self, x: Float[Tensor, "N hidden"]) -> Float[Tensor, "N V"]:
        """Of the next token, in float32."""
        if self.folded:
            return torch.mm(_unit(x, self.bit), self.out)
        return _linear(_rms(x, self.norm), self.head).float()


class Plain:
    """A layer as it stands."""

    def __init__(self, layer: Any, of: Lean):
        self.layer, self.attention, self.mlp = layer, layer.self_attn, layer.mlp
        self.heads, self.kv_heads, self.dim = of.heads, of.kv_heads, of.dim

    def before(
        self, x: Float[Tensor, "N hidden"], turn: Complex64[Tensor, "N 1 half"]
    ) -> tuple[Float[Tensor, "N H D"], Float[Tensor, "N K2 D"]]:
        """Queries, and keys and values, of each token."""
        a, n = self.attention, _rms(x, self.layer.input_layernorm)
        q, k, v = (_linear(n, m.weight, m.bias).unflatten(-1, (-1, self.dim)) for m in (a.q_proj, a.k_proj, a.v_proj))
        if hasattr(a, "q_norm"):
            q, k = _rms(q, a.q_norm), _rms(k, a.k_norm)
        pairs = torch.complex(*torch.cat([q, k], 1).float().unflatten(-1, (2, -1)).unbind(-2)) * turn
        qk = torch.view_as_real(pairs).flatten(-2).to(x.dtype)
        return qk[:, : self.heads], torch.cat([qk[:, self.heads :], v], 1)

    def after(self, x: Float[Tensor, "N hidden"], taken: Float[Tensor, "N HD"]) -> Float[Tensor, "N hidden"]:
        """What the layer makes of each token."""
        out, gate, up, down = self.attention.o_proj, self.mlp.gate_proj, self.mlp.up_proj, self.mlp.down_proj
        x = _linear(taken, out.weight, out.bias).add_(x)
        n = _rms(x, self.layer.post_attention_layernorm)
        inner = F.silu(_linear(n, gate.weight, gate.bias)).mul_(_linear(n, up.weight, up.bias))
        return _linear(inner, down.weight, down.bias).add_(x)


class Folded(Plain):
    """A layer in copies: W_q, W_k, W_v joined, so W_gate, W_up; norms multiplied in; pairs of a rotation side by side."""

    def __init__(self, layer: Any, of: Lean):
        super().__init__(layer, of)
        a, m = self.attention, self.mlp
        before, after = layer.input_layernorm, layer.post_attention_layernorm
        pairs = torch.arange(self.dim, device=of.embedding.device).view(2, -1).t().flatten()

        def side(t: Tensor) -> Tensor:
            return t.unflatten(0, (-1, self.dim))[:, pairs].flatten(0, 1)

        self.qkv = _fold(torch.cat([side(a.q_proj.weight), side(a.k_proj.weight), a.v_proj.weight]), before).t()
        self.gate_up = _fold(torch.cat([m.gate_proj.weight, m.up_proj.weight]), after).t()
        self.bits = _bit(before), _bit(after)
        self.out, self.down = a.o_proj.weight.t(), m.down_proj.weight.t()
        self.qkv_bias = self.gate_up_bias = self.qk_norm = None
        if a.q_proj.bias is not None:
            self.qkv_bias = torch.cat([side(a.q_proj.bias), side(a.k_proj.bias), a.v_proj.bias])
        if m.gate_proj.bias is not None:
            self.gate_up_bias = torch.cat([m.gate_proj.bias, m.up_proj.bias])
        if hasattr(a, "q_norm"):
            w = [a.q_norm.weight[pairs]] * self.heads + [a.k_norm.weight[pairs]] * self.kv_heads
            self.qk_norm, self.qk_bit = torch.stack(w) * self.dim**0.5, _bit(a.q_norm)

    def before(
        self, x: Float[Tensor, "N hidden"], turn: Complex64[Tensor, "N 1 half"]
    ) -> tuple[Float[Tensor, "N H D"], Float[Tensor, "N K2 D"]]:
        """As `Plain.before`; each head's numbers stand in another order, the same for queries and keys."""
        qkv = _times(_unit(x, self.bits[0]), self.qkv, self.qkv_bias).view(x.shape[0], -1, self.dim)
        qk = qkv.narrow(1, 0, self.heads + self.kv_heads)
        if self.qk_norm is not None:
            qk.copy_(_unit(qk, self.qk_bit).mul_(self.qk_norm))
        torch.view_as_complex(qk.view(x.shape[0], -1, self.dim // 2, 2)).mul_(turn)
        return qkv.narrow(1, 0, self.heads), qkv.narrow(1, self.heads, 2 * self.kv_heads)

    def after(self, x: Float[Tensor, "N hidden"], taken: Float[Tensor, "N HD"]) -> Float[Tensor, "N hidden"]:
        """As `Plain.after`."""
        x = _plus(x, taken, self.out, self.attention.o_proj.bias)
        gate_up = _times(_unit(x, self.bits[1]), self.gate_up, self.gate_up_bias)
        gate, up = gate_up.view(x.shape[0], 2, -1).unbind(1)
        return _plus(x, F.silu(gate).mul_(up), self.down, self.mlp.down_proj.bias)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """W x + b. For a few rows in float32 oneDNN takes a tenth less time than the BLAS that torch would use."""
    if x.device.type == "cpu" and x.dtype == torch.float32 and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def _times(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    return torch.mm(x, w) if bias is None else torch.addmm(bias, x, w)


def _plus(x: Tensor, y: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    """x + y w + bias."""
    out = torch.addmm(x, y, w)
    return out if bias is None else out.add_(bias)


def _rms(x: Tensor, norm: Any) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), norm.weight, norm.variance_epsilon)


def _unit(x: Tensor, bit: Tensor) -> Tensor:
    """x / sqrt(sum(x^2) + n eps): rms(x) without what `_fold` puts into the next matrix."""
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).hypot_(bit)


def _bit(norm: Any) -> Float[Tensor, ""]:
    """sqrt(n eps)."""
    return norm.weight.new_tensor((len(norm.weight) * norm.variance_epsilon) ** 0.5)


def _fold(weight: Float[Tensor, "out n"], norm: Any) -> Float[Tensor, "out n"]:
    """W' with W' _unit(x) = W rms(x)."""
    return weight * (norm.weight * len(norm.weight) ** 0.5)
