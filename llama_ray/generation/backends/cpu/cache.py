"""Keys and values of all sequences, in blocks, in the layout of the attention kernel."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from llama_ray.generation.backends.batch import StepBatch
from llama_ray.generation.backends.cpu import abi
from llama_ray.generation.backends.cpu.ops import kernels
from llama_ray.generation.backends.huge_pages import Arena
from llama_ray.model.config import LlamaConfig
from llama_ray.utils.integers import ceil_div

_WIDEST_VECTOR = 16
"""Floats in the widest vector of any processor: panels have a multiple of this many columns."""


class CpuCache:
    """A `KVCache` in float32 or bfloat16; attention.cpp describes the layout of a block.

    Memory is taken when a block is first written. Raises ValueError for another dtype, or a block size that is not a
    multiple of 16 positions.
    """

    def __init__(self, config: LlamaConfig, num_blocks: int, dtype: torch.dtype, block_size: int) -> None:
        if dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"dtype is {dtype}; the CPU cache holds float32 or bfloat16")
        if block_size < 1 or block_size % _WIDEST_VECTOR:
            raise ValueError(
                f"block_size is {block_size}; it must be a multiple of {_WIDEST_VECTOR} for the CPU cache"
            )
        self.block_size, self.config, self.dtype = block_size, config, dtype
        # A block's keys and values of all layers are contiguous. Zeros fill the columns that pad head_dim: they enter
        # products, whose results are not used.
        keys, values = (
            config.num_kv_heads * dim * block_size for dim in (config.head_dim, _value_dim(config))
        )
        self.blocks = Arena().zeros((num_blocks, config.num_layers, keys + values), dtype)
        stride = self.blocks[0].nbytes
        self.argument = abi.Cache(
            config.num_kv_heads, config.head_dim, block_size, stride, dtype == torch.bfloat16
        )
        first = self.blocks.data_ptr()
        starts = range(first, first + stride, stride // config.num_layers)
        # Addresses of each layer's keys and values in block 0.
        pointers = ctypes.c_void_p * config.num_layers
        self.keys = pointers(*starts)
        self.values = pointers(*(start + keys * dtype.itemsize for start in starts))

    @staticmethod
    def block_bytes(config: LlamaConfig, block_size: int, dtype: torch.dtype) -> int:
        """Return the bytes of one block, over all layers."""
        each = (config.head_dim + _value_dim(config)) * block_size * dtype.itemsize
        return config.num_layers * config.num_kv_heads * each

    def attend(self, batch: StepBatch) -> CpuAttend:
        """See `KVCache`."""
        return CpuAttend(self, batch)

    def copy_block(self, source: int, target: int) -> None:
        """See `KVCache`."""
        self.blocks[target] = self.blocks[source]


class CpuAttend:
    """`Attend` for one step over a `CpuCache`; its attributes are the arguments of kernels that include attention."""

    def __init__(self, cache: CpuCache, batch: StepBatch) -> None:
        tensors = (
            *(t.contiguous() for t in (batch.query_start, batch.context_len, batch.block_table)),
            batch.slots.contiguous(),
        )
        if any(t.dtype != torch.int32 for t in tensors[:3]) or tensors[3].dtype != torch.int64:
            raise ValueError("a step has int32 query_start, context_len and block_table, and int64 slots")
        step = abi.Step(*(t.data_ptr() for t in tensors), len(batch.context_len), batch.block_table.shape[1])
        # C++ has only the addresses; this keeps the memory alive.
        self._kept = tensors, step, cache
        self.cache, self.step = ctypes.addressof(cache.argument), ctypes.addressof(step)
        self.keys, self.values = cache.keys, cache.values
        self.dtype, self.tokens = cache.dtype, len(batch.slots)
        self.scale, self.threads = cache.config.head_dim**-0.5, torch.get_num_threads()
        self._run = kernels().paged_attention

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """See `Attend`."""
        for t in (query, key, value):
            strides = t.stride()
            if (
                t.dtype != self.dtype
                or t.shape[2] != self.tokens
                or strides[3] != 1
                or strides[1] != t.shape[3]
            ):
                raise ValueError(
                    f"attention over {self.tokens} tokens of {self.dtype}, heads side by side, was given "
                    f"{t.dtype} {tuple(t.shape)} with strides {strides}"
                )
        heads = query.shape[1]
        out = torch.empty((1, self.tokens, heads, query.shape[3]), dtype=self.dtype)
        self._run(
            *(self.cache, self.step, self.keys[layer], self.values[layer], heads),
            *(query.data_ptr(), query.stride(2), key.data_ptr(), key.stride(2)),
            *(value.data_ptr(), value.stride(2), out.data_ptr(), self.scale, self.threads),
        )
        return out.transpose(1, 2)


def _value_dim(config: LlamaConfig) -> int:
    return ceil_div(config.head_dim, _WIDEST_VECTOR) * _WIDEST_VECTOR
