"""The layers that `accelerate` puts in a `Llama` on CUDA: joined projections with fused kernels between them."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from llama_ray.generation.adapters.active import ActiveAdapters, StepAdapters
from llama_ray.generation.backends.cuda.cache import PagedAttend
from llama_ray.generation.backends.cuda.elementwise import rms_norm, swiglu
from llama_ray.generation.backends.cuda.one_row import RowProduct
from llama_ray.generation.backends.quantize import Quantization
from llama_ray.model.attention.causal import Attend, causal_attention
from llama_ray.model.layers import Attention, Block, RMSNorm, SwiGLU, rotate
from llama_ray.model.llama import Llama


class FusedNorm(nn.Module):
    """RMSNorm in one pass."""

    def __init__(self, norm: RMSNorm) -> None:
        super().__init__()
        self.weight, self.eps = norm.weight, norm.eps

    @property
    def parameters_of_row(self) -> tuple[Tensor, float]:
        """Weight and epsilon, for a product that includes the norm."""
        return self.weight, self.eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., size] -> [..., size]."""
        return rms_norm(x, self.weight, self.eps)


class FusedAttention(nn.Module):
    """One product for queries, keys and values; rotation and the write to the cache in one pass."""

    def __init__(
        self, attention: Attention, quantization: Quantization | None, batch_invariant: bool
    ) -> None:
        super().__init__()
        self.layer, self.head_dim = attention.layer, attention.head_dim
        parts = attention.q_proj, attention.k_proj, attention.v_proj
        self._widths = [part.weight.shape[0] for part in parts]
        self.qkv_proj = RowProduct(_joined(*parts), quantization, batch_invariant)
        self.o_proj = RowProduct(attention.o_proj.weight, quantization, batch_invariant)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], attend: Attend | None = None) -> Tensor:
        """[batch, seq, hidden] -> [batch, seq, hidden]; on a paged cache the batch size is 1."""
        return self.o_proj(self.attended(x, rope, attend))  # type: ignore[no-any-return]

    def attended(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        attend: Attend | None,
        adapters: StepAdapters | None = None,
    ) -> Tensor:
        """Return the input of the output projection, [batch, seq, heads * head_dim]."""
        qkv = self.qkv_proj(x)
        if adapters is not None:
            qkv = adapters.add(self.layer, "qkv_proj", x, qkv)
        if isinstance(attend, PagedAttend):
            return attend.projected(self.layer, qkv[0], rope).flatten(1)[None]
        q, k, v = (
            part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in qkv.split(self._widths, -1)
        )
        q, k = rotate(q, *rope), rotate(k, *rope)
        out = causal_attention(q, k, v) if attend is None else attend(self.layer, q, k, v)
        return out.transpose(1, 2).flatten(2)


class FusedSwiGLU(nn.Module):
    """One product for gate and up, one pass for silu(gate) * up."""

    def __init__(self, mlp: SwiGLU, quantization: Quantization | None, batch_invariant: bool) -> None:
        super().__init__()
        self.gate_up_proj = RowProduct(_joined(mlp.gate_proj, mlp.up_proj), quantization, batch_invariant)
        self.down_proj = RowProduct(mlp.down_proj.weight, quantization, batch_invariant)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, seq, hidden] -> [batch, seq, hidden]."""
        return self.down_proj(self.gated(x))  # type: ignore[no-any-return]

    def gated(self, x: Tensor) -> Tensor:
        """Return the input of the last projection, [batch, seq, intermediate]."""
        return swiglu(self.gate_up_proj(x))


class FusedBlock(nn.Module):
    """A layer whose products add to the residual stream themselves, and that is six launches for a single row."""

    def __init__(
        self,
        block: Block,
        quantization: Quantization | None,
        batch_invariant: bool,
        adapters: ActiveAdapters,
    ) -> None:
        super().__init__()
        self._adapters = adapters
        self.input_layernorm = FusedNorm(block.input_layernorm)
        self.self_attn = FusedAttention(block.self_attn, quantization, batch_invariant)
        self.post_attention_layernorm = FusedNorm(block.post_attention_layernorm)
        self.mlp = FusedSwiGLU(block.mlp, quantization, batch_invariant)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], attend: Attend | None = None) -> Tensor:
        """[batch, seq, hidden] -> [batch, seq, hidden]; x may be overwritten."""
        attention, mlp = self.self_attn, self.mlp
        if self._adapters.step is not None:
            return self._adapted(x, rope, attend, self._adapters.step)
        if not (isinstance(attention.o_proj, RowProduct) and isinstance(mlp.down_proj, RowProduct)):
            # Under tensor parallelism the ranks' parts are summed before they are added.
            x = x + attention(self.input_layernorm(x), rope, attend)
            return x + mlp(self.post_attention_layernorm(x))
        if attention.o_proj.takes_one_row(x) and isinstance(attend, PagedAttend):
            return self._one_row(x[0], rope, attend)[None]
        x = attention.o_proj.add_to(x, attention.attended(self.input_layernorm(x), rope, attend))
        return mlp.down_proj.add_to(x, mlp.gated(self.post_attention_layernorm(x)))

    def _adapted(
        self, x: Tensor, rope: tuple[Tensor, Tensor], attend: Attend | None, adapters: StepAdapters
    ) -> Tensor:
        """Compute a step in which some rows have adapters, without what is fused for those that have none."""
        attention, mlp = self.self_attn, self.mlp
        attended = attention.attended(self.input_layernorm(x), rope, attend, adapters)
        x = x + adapters.add(attention.layer, "o_proj", attended, attention.o_proj(attended))
        hidden = self.post_attention_layernorm(x)
        gate_up = adapters.add(attention.layer, "gate_up_proj", hidden, mlp.gate_up_proj(hidden))
        gated = swiglu(gate_up)
        return x + adapters.add(attention.layer, "down_proj", gated, mlp.down_proj(gated))

    def _one_row(self, x: Tensor, rope: tuple[Tensor, Tensor], attend: PagedAttend) -> Tensor:
        """[1, hidden] -> [1, hidden]."""
        attention, mlp = self.self_attn, self.mlp
        qkv = attention.qkv_proj.row(x, self.input_layernorm.parameters_of_row)
        x = attention.o_proj.row(attend.projected(attention.layer, qkv, rope).flatten(1), residual=x)
        hidden = mlp.gate_up_proj.row(x, self.post_attention_layernorm.parameters_of_row, gated=True)
        return mlp.down_proj.row(hidden, residual=x)


@torch.no_grad()
def accelerate(
    model: Llama,
    quantization: Quantization | None,
    batch_invariant: bool,
    adapters: ActiveAdapters | None = None,
) -> Llama:
    """Replace the layers of a model in place, one block at a time, so that only one block is in memory twice.

    `quantization` rounds the weights of all products; with int4 the head is int8, because int4 costs it the most
    quality. Embeddings and norms keep their dtype. With `batch_invariant` all products are computed in fixed tiles. The
    products add the adapters that are active in `adapters`. Raises ValueError for a shape that the format does not
    support.
    """
    model.requires_grad_(False)
    adapters = adapters or ActiveAdapters()
    for i, layer in enumerate(model.layers):
        model.layers[i] = FusedBlock(cast(Block, layer), quantization, batch_invariant, adapters)
    model.norm = FusedNorm(model.norm)  # type: ignore[assignment]
    head_quantization: Quantization | None = "int8" if quantization == "int4" else quantization
    model.lm_head = RowProduct(model.lm_head.weight, head_quantization, batch_invariant)  # type: ignore[assignment]
    if model.embed_tokens.weight.is_cuda:
        # The KV cache may take the memory of the old weights.
        torch.cuda.empty_cache()
    return model


def _joined(*parts: nn.Linear) -> Tensor:
    return torch.cat([part.weight for part in parts])
