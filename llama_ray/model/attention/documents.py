"""Attention that stays within the documents of a row."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from llama_ray.model.attention.document_blocks import document_attention
from llama_ray.utils.torch_private import mark_dynamic

_FLASH_CAPABILITY = (8, 0)
_FLASH_DTYPES = (torch.bfloat16, torch.float16)

Varlen = Callable[..., Tensor | tuple[Tensor, Tensor]]
"""torch's `varlen_attn`, see `causal_varlen`."""


@dataclass(frozen=True)
class DocumentAttention:
    """`Attend` for a batch of packed rows: each position sees itself and the earlier ones of its document.

    Holds what the kernel for the device and the dtype reads: `starts` on a CPU, `borders` on a GPU that has flash
    attention for the dtype, `mask` on others.
    """

    starts: Tensor | None = None
    """Int32 [batch, seq]: the index in its row at which the document of each position begins."""
    borders: Tensor | None = None
    """See `document_borders`."""
    varlen: Varlen | None = None
    """See `causal_varlen`; it is looked up outside of what is compiled."""
    mask: Tensor | None = None
    """See `document_mask`."""

    @classmethod
    def of(cls, starts: Tensor, device: torch.device, dtype: torch.dtype) -> Self:
        """Return the attention of a batch with `starts`, on the CPU, for queries of `dtype` on `device`."""
        if device.type == "cpu":
            return cls(starts=starts)
        if dtype not in _FLASH_DTYPES or torch.cuda.get_device_capability(device) < _FLASH_CAPABILITY:
            return cls(mask=document_mask(starts.to(device, non_blocking=True), dtype))
        # Counted on the CPU, because the number of documents would have to be awaited from a GPU.
        borders = document_borders(starts).to(device, non_blocking=True)
        # Else a compiled block would be compiled again for another number of documents.
        mark_dynamic(borders, 0)
        return cls(borders=borders, varlen=causal_varlen())

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """See `Attend`."""
        if self.starts is not None:
            out: Tensor = document_attention(query, key, value, self.starts)
            return out
        if self.borders is not None:
            assert self.varlen is not None
            return packed_attention(query, key, value, self.borders, self.varlen)
        assert self.mask is not None
        return masked_attention(query, key, value, self.mask)


def document_borders(starts: Tensor) -> Tensor:
    """Return where each document begins in all rows laid end to end, then their length: int32 [documents + 1].

    `starts` is int32 [batch, seq].
    """
    begins = starts == torch.arange(starts.shape[1], device=starts.device)
    return F.pad(begins.flatten().nonzero().squeeze(1), (0, 1), value=starts.numel()).int()


def document_mask(starts: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what is added to scores, [batch, 1, seq, seq]: 0, or minus infinity where a query sees no key."""
    positions = torch.arange(starts.shape[1], device=starts.device)
    hidden = (positions < starts.unsqueeze(2)) | (positions > positions.unsqueeze(1))
    mask = torch.zeros(hidden.shape, dtype=dtype, device=starts.device)
    return mask.masked_fill_(hidden, -math.inf).unsqueeze(1)


@cache
def causal_varlen() -> Varlen:
    """Return torch's attention for documents laid end to end, causal and for grouped heads.

    What says so differs between versions of torch; grouped heads need no word in those that have none for them.
    """
    # It takes a second to import and is needed on GPUs only.
    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters
    options: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    if "enable_gqa" in known:
        options["enable_gqa"] = True
    return partial(varlen_attn, **options)


def packed_attention(query: Tensor, key: Tensor, value: Tensor, borders: Tensor, varlen: Varlen) -> Tensor:
    """Attend by `causal_varlen`; shapes as in `Attend`, bf16 or fp16 on a GPU. `borders`: see `document_borders`."""
    batch, heads, seq, dim = query.shape
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    # The length of the longest document would be compiled in; that of a row is as right.
    out = varlen(q, k, v, borders, borders, seq, seq)
    assert isinstance(out, Tensor)
    return out.view(batch, seq, heads, dim).transpose(1, 2)


def masked_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """Attend under a mask of all pairs of positions: in fp32 on a GPU, and on one that lacks the flash kernel."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        # The kernel that takes a mask and stores no scores takes no grouped heads.
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
