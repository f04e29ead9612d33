"""Keys and values of all sequences, in blocks, in the layout of the attention kernel."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from llama_ray.generation.batch import StepBatch
from llama_ray.generation.cpu.ops import kernels
from llama_ray.model.config import LlamaConfig
from llama_ray.model.layers import Attend

BLOCK_SIZE = 32
"""Positions in a block."""


class _Cache(ctypes.Structure):
    """`struct Cache` of attention.cpp."""

    _fields_ = (
        ("kv_heads", ctypes.c_int64),
        ("head_dim", ctypes.c_int64),
        ("block_size", ctypes.c_int64),
        ("is_bf16", ctypes.c_int32),
    )


class _Step(ctypes.Structure):
    """`struct Step` of attention.cpp."""

    _fields_ = (
        ("query_start", ctypes.c_void_p),
        ("context_len", ctypes.c_void_p),
        ("block_table", ctypes.c_void_p),
        ("slots", ctypes.c_void_p),
        ("sequences", ctypes.c_int64),
        ("table_width", ctypes.c_int64),
    )


class CpuCache:
    """`num_blocks` blocks of 32 positions in float32 or bfloat16; attention.cpp describes what lies in one.

    Memory is taken when a block is first written. Raises ValueError for another dtype.
    """

    def __init__(self, config: LlamaConfig, num_blocks: int, dtype: torch.dtype) -> None:
        if dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"the CPU cache holds float32 or bfloat16, not {dtype}")
        self.block_size, self.num_blocks = BLOCK_SIZE, num_blocks
        self._config, self._dtype = config, dtype
        heads = (config.num_layers, num_blocks, config.num_kv_heads)
        # Zeros, for the columns that pad head_dim: they enter products, whose results nobody reads.
        self._keys = torch.zeros(*heads, config.head_dim * BLOCK_SIZE, dtype=dtype)
        self._values = torch.zeros(*heads, _value_dim(config) * BLOCK_SIZE, dtype=dtype)
        self._argument = _Cache(config.num_kv_heads, config.head_dim, BLOCK_SIZE, dtype == torch.bfloat16)
        self._layers = [(k.data_ptr(), v.data_ptr()) for k, v in zip(self._keys, self._values, strict=True)]
        self._run = kernels().paged_attention

    @staticmethod
    def block_bytes(config: LlamaConfig, block_size: int, dtype: torch.dtype) -> int:
        """Bytes of one block, over all layers."""
        each = (config.head_dim + _value_dim(config)) * block_size * dtype.itemsize
        return config.num_layers * config.num_kv_heads * each

    def attend(self, batch: StepBatch) -> Attend:
        """Attention for one step: writes its keys and values to their slots, then looks at all before them."""
        config, dtype, layers, run = self._config, self._dtype, self._layers, self._run
        indices = [t.contiguous() for t in (batch.query_start, batch.context_len, batch.block_table)]
        slots = batch.slots.contiguous()
        if any(t.dtype != torch.int32 for t in indices) or slots.dtype != torch.int64:
            raise ValueError("a step has int32 query_start, context_len and block_table, and int64 slots")
        sequences, table_width = batch.block_table.shape
        step = _Step(*(t.data_ptr() for t in (*indices, slots)), sequences, table_width)
        cache_at, step_at = ctypes.addressof(self._argument), ctypes.addressof(step)
        tokens, scale, threads = len(slots), config.head_dim**-0.5, torch.get_num_threads()

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            _ = step, indices, slots  # kept alive: C++ sees addresses only
            heads = query.shape[1]
            for t in (query, key, value):
                strides = t.stride()
                if t.dtype != dtype or t.shape[2] != tokens or strides[3] != 1 or strides[1] != t.shape[3]:
                    raise ValueError(
                        f"attention over {tokens} tokens of {dtype}, heads side by side, was given "
                        f"{t.dtype} {tuple(t.shape)} with strides {strides}"
                    )
            out = torch.empty((1, tokens, heads, query.shape[3]), dtype=dtype)
            run(
                *(cache_at, step_at, *layers[layer], heads),
                *(query.data_ptr(), query.stride(2), key.data_ptr(), key.stride(2)),
                *(value.data_ptr(), value.stride(2), out.data_ptr(), scale, threads),
            )
            return out.transpose(1, 2)

        return attend

    def copy_block(self, source: int, target: int) -> None:
        """Make block `target` equal to `source` in all layers."""
        self._keys[:, target] = self._keys[:, source]
        self._values[:, target] = self._values[:, source]


def _value_dim(config: LlamaConfig) -> int:
    return -(-config.head_dim // 16) * 16
