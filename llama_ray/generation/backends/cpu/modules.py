"""The layers that replace those of a `Llama` on a CPU."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor, nn

from llama_ray.generation.adapters.active import ActiveAdapters
from llama_ray.generation.backends.backend import PostProduct, append_post_product
from llama_ray.generation.backends.cpu import abi, ops
from llama_ray.generation.backends.cpu.adapters import CpuAdapters, padding
from llama_ray.generation.backends.cpu.cache import CpuAttend
from llama_ray.generation.backends.cpu.linear import Format, PackedLinear, check_format
from llama_ray.generation.backends.huge_pages import Arena
from llama_ray.model.attention.causal import Attend, causal_attention
from llama_ray.model.layers import Attention, Block, RMSNorm, SwiGLU
from llama_ray.model.llama import Llama
from llama_ray.model.loss import Head
from llama_ray.utils.memory import trim_heap


def accelerate(model: Llama, format: Format | None = None, adapters: ActiveAdapters | None = None) -> Llama:
    """Replace the layers of `model` by packed ones, in place, with weights in `format` (None: the model's dtype).

    One layer is replaced at a time and its old weights are freed, so there is never a second copy of the model. Results
    are rounded where the plain layers round them, except that logits are fp32 and that int8 and int4 are less precise
    (see `PackedLinear`). With int4 the head is int8, because int4 costs it the most quality. The products add the
    adapters that are active in `adapters`. Afterwards the model cannot be trained. Raises ValueError for a dtype that
    the kernels do not support, and RuntimeError if the kernels could not be compiled.
    """
    dtype = model.embed_tokens.weight.dtype
    weights: Format = format or ("bfloat16" if dtype == torch.bfloat16 else "float32")
    check_format(weights, dtype)
    ops.kernels()
    arena, blocks, adapters = Arena(), list[PackedBlock](), adapters or ActiveAdapters()
    for i, block in enumerate(model.layers):
        assert isinstance(block, Block)
        blocks.append(PackedBlock(block, weights, arena, adapters))
        model.layers[i] = nn.Identity()
        # Or the old weights would stay in memory until all of them are packed.
        trim_heap()
    model.layers = nn.ModuleList([PackedBlocks(blocks, adapters)])
    model.register_module("norm", PackedRMSNorm(model.norm))
    # A tied head gets its own packed copy; the embedding remains a lookup table.
    model.register_module(
        "lm_head", PackedHead(model.lm_head, "int8" if weights == "int4" else weights, arena)
    )
    trim_heap()
    return model


class PackedBlocks(nn.Module):
    """All blocks: in one call of C++ on a `CpuCache`, else one after the other, with the same result.

    The single call is not possible if a product, or what an adapter adds to it, pads its input, or with a post-product.
    """

    def __init__(self, blocks: list[PackedBlock], adapters: ActiveAdapters) -> None:
        super().__init__()
        self._adapters = adapters
        self.blocks = nn.ModuleList(blocks)
        self._arguments = [block.argument() for block in blocks]
        self._addresses = (ctypes.c_void_p * len(blocks))(*(ctypes.addressof(a) for a in self._arguments))
        self._in_one_call = not any(p.pad for b in blocks for p in b.products)
        # Quantised products pad nothing, but the adapters of bfloat16 beside them do.
        dtype = blocks[0].self_attn.qkv_proj.dtype
        self._adapts_in_one_call = not any(padding(p.in_features, dtype) for b in blocks for p in b.products)
        self._head_dim = blocks[0].self_attn.head_dim
        self._run = ops.kernels().blocks

    def set_post_product(self, post_product: PostProduct) -> None:
        """Apply `post_product` to each result of o_proj and down_proj, as the ranks of a divided model need."""
        for block in self.blocks:
            append_post_product(block.get_submodule("self_attn"), "o_proj", post_product)
            append_post_product(block.get_submodule("mlp"), "down_proj", post_product)
        self._in_one_call = False

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], attend: Attend | None = None) -> Tensor:
        """[batch, seq, hidden] -> [batch, seq, hidden]."""
        step = self._adapters.step
        in_one_call = self._in_one_call and (step is None or self._adapts_in_one_call)
        if not in_one_call or not isinstance(attend, CpuAttend):
            for block in self.blocks:
                x = block(x, rope, attend)
            return x
        cos, sin = rope
        rows = x.numel() // x.shape[-1]
        positions = cos.numel() * 2 // self._head_dim
        if x.dtype != attend.dtype or rows != attend.tokens or rows % positions:
            raise ValueError(
                f"the input has {rows} rows of {x.dtype} at {positions} positions; the step has "
                f"{attend.tokens} tokens of {attend.dtype}"
            )
        x, cos, sin = x.contiguous(), cos.contiguous(), sin.contiguous()
        assert step is None or isinstance(step, CpuAdapters)
        out = torch.empty_like(x)
        self._run(
            *(self._addresses, len(self._addresses), attend.cache, attend.step, attend.keys, attend.values),
            *(x.data_ptr(), out.data_ptr(), rows, cos.data_ptr(), sin.data_ptr(), positions),
            *(attend.scale, step and step.address, attend.threads),
        )
        return out


class PackedBlock(nn.Module):
    """A block of packed layers."""

    def __init__(self, block: Block, format: Format, arena: Arena, adapters: ActiveAdapters) -> None:
        super().__init__()
        self.self_attn = PackedAttention(block.self_attn, format, arena, adapters)
        self.mlp = PackedSwiGLU(block.mlp, format, arena, adapters, block.self_attn.layer)
        self.input_layernorm = PackedRMSNorm(block.input_layernorm)
        self.post_attention_layernorm = PackedRMSNorm(block.post_attention_layernorm)

    @property
    def products(self) -> tuple[PackedLinear, ...]:
        """The matrix products in the order in which they are computed."""
        return (
            self.self_attn.qkv_proj,
            self.self_attn.o_proj,
            self.mlp.gate_up_proj,
            self.mlp.down_proj,
        )

    def argument(self) -> abi.Block:
        """Return the block's layers for C++; the addresses are valid as long as the block exists."""
        attention, norms = self.self_attn, (self.input_layernorm, self.post_attention_layernorm)
        return abi.Block(
            *(p.address for p in self.products),
            *(norm.weight.data_ptr() for norm in norms),
            attention.qkv_proj.in_features,
            *attention.heads[:2],
            attention.head_dim,
            self.mlp.down_proj.in_features,
            norms[0].eps,
            norms[0].weight.dtype == torch.bfloat16,
        )

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], attend: Attend | None = None) -> Tensor:
        """[batch, seq, hidden] -> [batch, seq, hidden]."""
        x = x + self.self_attn(self.input_layernorm(x), rope, attend)
        return x + self.mlp(self.post_attention_layernorm(x))  # type: ignore[no-any-return]


class PackedRMSNorm(nn.Module):
    """RMSNorm in one pass."""

    def __init__(self, norm: RMSNorm) -> None:
        super().__init__()
        self.eps, self.weight = norm.eps, norm.weight

    def forward(self, x: Tensor) -> Tensor:
        """[..., size] -> [..., size]."""
        return ops.rms_norm(x, self.weight, self.eps)


class PackedAttention(nn.Module):
    """Attention with one product for queries, keys and values."""

    def __init__(self, attention: Attention, format: Format, arena: Arena, adapters: ActiveAdapters) -> None:
        super().__init__()
        self.layer, self.head_dim, self._adapters = attention.layer, attention.head_dim, adapters
        weights = [p.weight for p in (attention.q_proj, attention.k_proj, attention.v_proj)]
        self.heads = [len(w) // self.head_dim for w in weights]
        self.qkv_proj = PackedLinear(torch.cat(weights), format, arena=arena)
        self.o_proj = PackedLinear(attention.o_proj.weight, format, arena=arena)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], attend: Attend | None = None) -> Tensor:
        """[batch, seq, hidden] -> [batch, seq, hidden]."""
        step = self._adapters.step
        qkv = self.qkv_proj(x)
        if step is not None:
            qkv = step.add(self.layer, "qkv_proj", x, qkv)
        ops.rope_(qkv, self.heads[0] + self.heads[1], self.head_dim, *rope)
        # Views of one tensor, [batch, heads, seq, head_dim]: the kernel reads them without a copy.
        q, k, v = qkv.unflatten(-1, (-1, self.head_dim)).transpose(1, 2).split(self.heads, 1)
        out = causal_attention(q, k, v) if attend is None else attend(self.layer, q, k, v)
        out = out.transpose(1, 2).flatten(2)
        y: Tensor = self.o_proj(out)
        return y if step is None else step.add(self.layer, "o_proj", out, y)


class PackedSwiGLU(nn.Module):
    """SwiGLU in two products; the first computes silu(gate) * up."""

    def __init__(
        self, mlp: SwiGLU, format: Format, arena: Arena, adapters: ActiveAdapters, layer: int
    ) -> None:
        super().__init__()
        self._adapters, self._layer = adapters, layer
        self.gate_up_proj = PackedLinear(
            torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]), format, gated=True, arena=arena
        )
        self.down_proj = PackedLinear(mlp.down_proj.weight, format, arena=arena)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, seq, hidden] -> [batch, seq, hidden]."""
        step = self._adapters.step
        if step is None:
            return self.down_proj(self.gate_up_proj(x))  # type: ignore[no-any-return]
        hidden = ops.silu_product(step.add(self._layer, "gate_up_proj", x, self.gate_up_proj.apart(x)))
        return step.add(self._layer, "down_proj", hidden, self.down_proj(hidden))


class PackedHead(PackedLinear):
    """The head without its loss; logits are the unrounded fp32 sums."""

    def __init__(self, head: Head, format: Format, arena: Arena) -> None:
        super().__init__(head.weight, format, out_dtype=torch.float32, arena=arena)

    def forward(self, hidden: Tensor, targets: Tensor | None = None, *loss: object) -> Tensor:
        """[..., hidden_size] -> logits [..., vocab_size]. Raises ValueError for targets."""
        if targets is not None:
            raise ValueError("a packed model computes no loss; load it again to train it")
        return super().forward(hidden)
