"""What takes the place of a model's layers on a CPU. Block and Llama stay as they are."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llama_ray.generation.cpu import ops
from llama_ray.generation.cpu.linear import Format, PackedLinear, check_format
from llama_ray.model.layers import Attend, Attention, Block, RMSNorm, SwiGLU
from llama_ray.model.llama import Llama
from llama_ray.model.loss import Head


def accelerate(model: Llama, format: Format | None = None) -> Llama:
    """Replace the layers of `model` by those of the kernels, in place, weights in `format` (None: its dtype).

    Layer by layer, and the weights that are replaced are let go: there is never a second copy of the model. What
    computes the same as before rounds at the same places, except that logits come in fp32, and that int8 and int4
    are less precise; see PackedLinear. The head is int8 where the format is int4: it is the layer that int4 harms most.
    Afterwards the model cannot be trained. Raises ValueError for a dtype that the kernels don't have, and
    RuntimeError where there are no kernels.
    """
    dtype = model.embed_tokens.weight.dtype
    weights: Format = format or ("bfloat16" if dtype == torch.bfloat16 else "float32")
    check_format(weights, dtype)
    ops.kernels()
    for block in model.layers:
        assert isinstance(block, Block)
        block.register_module("self_attn", PackedAttention(block.self_attn, weights))
        block.register_module("mlp", PackedSwiGLU(block.mlp, weights))
        for name in ("input_layernorm", "post_attention_layernorm"):
            block.register_module(name, PackedRMSNorm(getattr(block, name)))
    model.register_module("norm", PackedRMSNorm(model.norm))
    # A tied head gets a copy of its own; the embedding stays a table to look tokens up in.
    model.register_module("lm_head", PackedHead(model.lm_head, "int8" if weights == "int4" else weights))
    return model


class PackedRMSNorm(nn.Module):
    """RMSNorm in one pass."""

    def __init__(self, norm: RMSNorm) -> None:
        super().__init__()
        self.eps, self.weight = norm.eps, norm.weight

    def forward(self, x: Tensor) -> Tensor:
        """Any shape with `size` last -> the same shape."""
        return ops.rms_norm(x, self.weight, self.eps)


class PackedAttention(nn.Module):
    """Attention with one product for queries, keys and values."""

    def __init__(self, attention: Attention, format: Format) -> None:
        super().__init__()
        self.layer, self.head_dim = attention.layer, attention.head_dim
        weights = [p.weight for p in (attention.q_proj, attention.k_proj, attention.v_proj)]
        self._heads = [len(w) // self.head_dim for w in weights]
        self.qkv_proj = PackedLinear(torch.cat(weights), format)
        self.o_proj = PackedLinear(attention.o_proj.weight, format)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        """[batch, seq, hidden] -> [batch, seq, hidden]."""
        qkv = self.qkv_proj(x)
        ops.rope_(qkv, self._heads[0] + self._heads[1], self.head_dim, *rope)
        # Views of one tensor, [batch, heads, seq, head_dim]: the kernel reads them where they are.
        q, k, v = qkv.unflatten(-1, (-1, self.head_dim)).transpose(1, 2).split(self._heads, 1)
        return self.o_proj(attend(self.layer, q, k, v).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class PackedSwiGLU(nn.Module):
    """SwiGLU in two products: gate, up and what joins them are one."""

    def __init__(self, mlp: SwiGLU, format: Format) -> None:
        super().__init__()
        self.gate_up_proj = PackedLinear(
            torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]), format, gated=True
        )
        self.down_proj = PackedLinear(mlp.down_proj.weight, format)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, seq, hidden] -> [batch, seq, hidden]."""
        return self.down_proj(self.gate_up_proj(x))  # type: ignore[no-any-return]


class PackedHead(PackedLinear):
    """The head without its loss: logits in fp32, as they were summed."""

    def __init__(self, head: Head, format: Format) -> None:
        super().__init__(head.weight, format, out_dtype=torch.float32)

    def forward(self, hidden: Tensor, targets: Tensor | None = None, *loss: object) -> Tensor:
        """[..., hidden_size] -> logits [..., vocab_size]. Raises ValueError for targets."""
        if targets is not None:
            raise ValueError("an accelerated model computes no loss; load it again to train it")
        return super().forward(hidden)
