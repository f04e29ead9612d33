"""What takes the place of a model's layers on a CPU. Llama stays as it is."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor, nn

from llama_ray.generation.cpu import ops
from llama_ray.generation.cpu.cache import CpuAttend
from llama_ray.generation.cpu.linear import Format, PackedLinear, check_format
from llama_ray.generation.cpu.memory import Arena
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
    arena = Arena()
    for i, block in enumerate(model.layers):
        assert isinstance(block, Block)
        model.layers[i] = PackedBlock(block, weights, arena)
    model.register_module("norm", PackedRMSNorm(model.norm))
    # A tied head gets a copy of its own; the embedding stays a table to look tokens up in.
    model.register_module(
        "lm_head", PackedHead(model.lm_head, "int8" if weights == "int4" else weights, arena)
    )
    return model


class _Block(ctypes.Structure):
    """`struct Block` of block.cpp."""

    _fields_ = (
        ("qkv", ctypes.c_void_p),
        ("o", ctypes.c_void_p),
        ("gate_up", ctypes.c_void_p),
        ("down", ctypes.c_void_p),
        ("input_norm", ctypes.c_void_p),
        ("post_attention_norm", ctypes.c_void_p),
        ("hidden", ctypes.c_int64),
        ("heads", ctypes.c_int64),
        ("kv_heads", ctypes.c_int64),
        ("head_dim", ctypes.c_int64),
        ("intermediate", ctypes.c_int64),
        ("eps", ctypes.c_float),
        ("is_bf16", ctypes.c_int32),
    )


class PackedBlock(nn.Module):
    """A block in one call of C++ where the cache is a CpuCache, else by its parts, with the same result."""

    def __init__(self, block: Block, format: Format, arena: Arena) -> None:
        super().__init__()
        self.self_attn = PackedAttention(block.self_attn, format, arena)
        self.mlp = PackedSwiGLU(block.mlp, format, arena)
        self.input_layernorm = PackedRMSNorm(block.input_layernorm)
        self.post_attention_layernorm = PackedRMSNorm(block.post_attention_layernorm)
        attention, mlp = self.self_attn, self.mlp
        products = (attention.qkv_proj, attention.o_proj, mlp.gate_up_proj, mlp.down_proj)
        norms = (self.input_layernorm.weight, self.post_attention_layernorm.weight)
        self._argument = _Block(
            *(p.address for p in products),
            *(w.data_ptr() for w in norms),
            attention.qkv_proj.in_features,
            *attention.heads[:2],
            attention.head_dim,
            mlp.down_proj.in_features,
            self.input_layernorm.eps,
            norms[0].dtype == torch.bfloat16,
        )
        self._address = ctypes.addressof(self._argument)
        self._whole = not any(p.pad for p in products)
        self._run = ops.kernels().block

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        """[batch, seq, hidden] -> [batch, seq, hidden]."""
        # Whoever adds up the parts of several ranks does so after these two.
        hooked = self.self_attn.o_proj._forward_hooks or self.mlp.down_proj._forward_hooks
        if not self._whole or hooked or not isinstance(attend, CpuAttend):
            x = x + self.self_attn(self.input_layernorm(x), rope, attend)
            return x + self.mlp(self.post_attention_layernorm(x))  # type: ignore[no-any-return]
        cos, sin = rope
        rows, head_dim = x.numel() // x.shape[-1], self.self_attn.head_dim
        positions = cos.numel() * 2 // head_dim
        if x.dtype != attend.dtype or rows != attend.tokens or rows % positions:
            raise ValueError(
                f"{rows} rows of {x.dtype} at {positions} positions meet a step of {attend.tokens} tokens in "
                f"{attend.dtype}"
            )
        x, cos, sin = x.contiguous(), cos.contiguous(), sin.contiguous()
        out = torch.empty_like(x)
        self._run(
            *(self._address, attend.cache, attend.step, *attend.layers[self.self_attn.layer]),
            *(x.data_ptr(), out.data_ptr(), rows, cos.data_ptr(), sin.data_ptr(), positions),
            *(attend.scale, attend.threads),
        )
        return out


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

    def __init__(self, attention: Attention, format: Format, arena: Arena) -> None:
        super().__init__()
        self.layer, self.head_dim = attention.layer, attention.head_dim
        weights = [p.weight for p in (attention.q_proj, attention.k_proj, attention.v_proj)]
        self.heads = [len(w) // self.head_dim for w in weights]
        self.qkv_proj = PackedLinear(torch.cat(weights), format, arena=arena)
        self.o_proj = PackedLinear(attention.o_proj.weight, format, arena=arena)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        """[batch, seq, hidden] -> [batch, seq, hidden]."""
        qkv = self.qkv_proj(x)
        ops.rope_(qkv, self.heads[0] + self.heads[1], self.head_dim, *rope)
        # Views of one tensor, [batch, heads, seq, head_dim]: the kernel reads them where they are.
        q, k, v = qkv.unflatten(-1, (-1, self.head_dim)).transpose(1, 2).split(self.heads, 1)
        return self.o_proj(attend(self.layer, q, k, v).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class PackedSwiGLU(nn.Module):
    """SwiGLU in two products: gate, up and what joins them are one."""

    def __init__(self, mlp: SwiGLU, format: Format, arena: Arena) -> None:
        super().__init__()
        self.gate_up_proj = PackedLinear(
            torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]), format, gated=True, arena=arena
        )
        self.down_proj = PackedLinear(mlp.down_proj.weight, format, arena=arena)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, seq, hidden] -> [batch, seq, hidden]."""
        return self.down_proj(self.gate_up_proj(x))  # type: ignore[no-any-return]


class PackedHead(PackedLinear):
    """The head without its loss: logits in fp32, as they were summed."""

    def __init__(self, head: Head, format: Format, arena: Arena) -> None:
        super().__init__(head.weight, format, out_dtype=torch.float32, arena=arena)

    def forward(self, hidden: Tensor, targets: Tensor | None = None, *loss: object) -> Tensor:
        """[..., hidden_size] -> logits [..., vocab_size]. Raises ValueError for targets."""
        if targets is not None:
            raise ValueError("an accelerated model computes no loss; load it again to train it")
        return super().forward(hidden)
