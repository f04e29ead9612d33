"""Keys and values of all sequences, in blocks, in the layout of the attention kernel."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from llama_ray.generation.batch import StepBatch
from llama_ray.generation.cpu.memory import Arena
from llama_ray.generation.cpu.ops import kernels
from llama_ray.model.config import LlamaConfig
from llama_ray.utils.integers import ceil_div


class _Cache(ctypes.Structure):
    """`struct Cache` of attention.cpp."""

    _fields_ = (
        ("kv_heads", ctypes.c_int64),
        ("head_dim", ctypes.c_int64),
        ("block_size", ctypes.c_int64),
        ("block_stride", ctypes.c_int64),
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
    """A `KVCache` in float32 or bfloat16; attention.cpp describes the layout of a block.

    Memory is taken when a block is first written. Raises ValueError for another dtype, or a block size that is not a
    multiple of 16 positions, the width of the widest vectors.
    """

    def __init__(self, config: LlamaConfig, num_blocks: int, dtype: torch.dtype, block_size: int) -> None:
        if dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"dtype is {dtype}; the CPU cache holds float32 or bfloat16")
        if block_size < 1 or block_size % 16:
            raise ValueError(f"block_size is {block_size}; it must be a multiple of 16 for the CPU cache")
        self.block_size = block_size
        self._config, self._dtype = config, dtype
        # A block's keys and values of all layers lie together. Zeros, for the columns that pad head_dim: they enter
        # products, whose results nobody reads.
        keys, values = (
            config.num_kv_heads * dim * block_size for dim in (config.head_dim, _value_dim(config))
        )
        self._blocks = Arena().zeros((num_blocks, config.num_layers, keys + values), dtype)
        stride = self._blocks[0].nbytes
        self._argument = _Cache(
            config.num_kv_heads, config.head_dim, block_size, stride, dtype == torch.bfloat16
        )
        first = self._blocks.data_ptr()
        starts = range(first, first + stride, stride // config.num_layers)
        # Where each layer's keys and values are in block 0, as C++ takes them.
        pointers = ctypes.c_void_p * config.num_layers
        self._keys = pointers(*starts)
        self._values = pointers(*(start + keys * dtype.itemsize for start in starts))

    @staticmethod
    def block_bytes(config: LlamaConfig, block_size: int, dtype: torch.dtype) -> int:
        """Bytes of one block, over all layers."""
        each = (config.head_dim + _value_dim(config)) * block_size * dtype.itemsize
        return config.num_layers * config.num_kv_heads * each

    def attend(self, batch: StepBatch) -> CpuAttend:
        """Attention for one step: writes its keys and values to their slots, then looks at all before them."""
        return CpuAttend(self._config, self._dtype, self._argument, (self._keys, self._values), batch)

    def copy_block(self, source: int, target: int) -> None:
        """Make block `target` equal to `source` in all layers."""
        self._blocks[target] = self._blocks[source]


class CpuAttend:
    """`Attend` for one step over a CpuCache; its parts are there for a kernel that does more than attend."""

    def __init__(
        self,
        config: LlamaConfig,
        dtype: torch.dtype,
        cache: _Cache,
        layers: tuple[ctypes.Array[ctypes.c_void_p], ctypes.Array[ctypes.c_void_p]],
        batch: StepBatch,
    ) -> None:
        tensors = (
            *(t.contiguous() for t in (batch.query_start, batch.context_len, batch.block_table)),
            batch.slots.contiguous(),
        )
        if any(t.dtype != torch.int32 for t in tensors[:3]) or tensors[3].dtype != torch.int64:
            raise ValueError("a step has int32 query_start, context_len and block_table, and int64 slots")
        step = _Step(*(t.data_ptr() for t in tensors), len(batch.context_len), batch.block_table.shape[1])
        self._kept = tensors, step, cache  # C++ sees addresses only
        self.cache, self.step = ctypes.addressof(cache), ctypes.addressof(step)
        self.keys, self.values = layers
        self.dtype = dtype
        self.tokens, self.scale, self.threads = (
            len(batch.slots),
            config.head_dim**-0.5,
            torch.get_num_threads(),
        )
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
    return ceil_div(config.head_dim, 16) * 16
