"""What an engine will need of its device's memory, found out without loading its model."""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from llama_ray.data.tokenizing.files import TOKENIZER_FILES
from llama_ray.generation.backends.backend import BLOCK_SIZE
from llama_ray.generation.backends.cpu.cache import CpuCache
from llama_ray.generation.backends.kv_cache import CPU_CACHE_SHARE, GPU_MEMORY_SHARE
from llama_ray.generation.backends.quantize import GROUP_SIZE, Quantization
from llama_ray.generation.options import EngineOptions
from llama_ray.model.config import LlamaConfig
from llama_ray.model.llama import Llama
from llama_ray.pretrained import open_pretrained, resolve
from llama_ray.storage.gguf import read_gguf
from llama_ray.utils.integers import ceil_div

_PADDING = 64
"""Outputs and inputs of a packed product are padded to a multiple of this."""
_MARGIN, _OVERHEAD_BYTES = 1.05, 64 * 2**20
"""For what is not counted here, such as pages that the allocator keeps."""
_TOKENIZER_FACTOR = 16
"""Bytes of a tokenizer in memory for each byte of its file."""
_WORKER_BYTES = 400 * 2**20
"""Python and torch in the process of one more rank."""

Shape = tuple[int, ...]


@dataclass(frozen=True)
class _Footprint:
    """Bytes of one model on one device: at the worst moment while it is loaded, of its weights, of a block of cache."""

    peak: int
    weights: int
    block: int


def required_bytes(
    directory: str | Path, dtype: torch.dtype | None, device: torch.device | str, options: EngineOptions
) -> int:
    """Return the free memory that `Engine.from_pretrained` needs at least, in bytes, on `device`.

    That is the worst moment while weights are read and packed, or weights, cache and a step's tensors, whichever is
    more. The cache is `kv_cache_memory_bytes`, or as much as the default takes to hold one sequence. With
    `tensor_parallel` it is what one GPU needs, or on a CPU all ranks together. Reads what stands before
    the weights. Raises CheckpointError as `open_pretrained` does.
    """
    device, quantization = torch.device(device), options.quantization
    ranks = options.tensor_parallel if device.type == "cuda" else 1
    path = resolve(directory)
    config, own = _footprint(path, dtype, device, quantization, ranks)
    draft = _Footprint(0, 0, 0)
    if options.draft_model is not None:
        _, draft = _footprint(resolve(options.draft_model), dtype, device, quantization, 1)
    cache = _cache_bytes(own.block + draft.block, config, device, options)
    step = _step_bytes(config, options, device)
    processes = _WORKER_BYTES * (options.tensor_parallel - 1) if device.type == "cpu" else 0
    needed = max(draft.peak, draft.weights + max(own.peak, own.weights + cache + step))
    return int(_MARGIN * needed) + _OVERHEAD_BYTES + processes + _tokenizer_bytes(path)


def _footprint(
    path: Path,
    dtype: torch.dtype | None,
    device: torch.device,
    quantization: Quantization | None,
    ranks: int,
) -> tuple[LlamaConfig, _Footprint]:
    """Return the shape of the model at `path`, and what it needs."""
    with ExitStack() as stack:
        stored = open_pretrained(path, stack, check_weights=False)
        config, dtype = stored.config, dtype or stored.dtype
        largest = max(math.prod(tensor.shape) for tensor in stored.tensors.values()) * 4
    size = dtype.itemsize
    model = Llama(config, device="meta")
    block = _joined(model.layers[0].named_parameters(), ranks)
    norms = sum(math.prod(shape) for shape in block if len(shape) == 1)
    products = [shape for shape in block if len(shape) == 2]
    head = (config.vocab_size // ranks, config.hidden_size)
    embedding = config.vocab_size * config.hidden_size * size

    plain_blocks = config.num_layers * (norms + sum(map(math.prod, products))) * size
    packed_block = norms * size + sum(_packed_bytes(shape, size, quantization) for shape in products)
    packed_blocks = config.num_layers * packed_block
    # With int4 the head is int8.
    packed_head = _packed_bytes(head, size, quantization and "int8")
    old_head = 0 if config.tie_embeddings else math.prod(head) * size

    plain, packed = embedding + plain_blocks + old_head, embedding + packed_blocks + packed_head
    largest_product = max(map(math.prod, products))
    packing_block = plain + packed_block + largest_product * _packing_bytes(size, quantization, joined=True)
    packing_head = packed + old_head + math.prod(head) * _packing_bytes(size, quantization, joined=False)
    return config, _Footprint(
        peak=max(plain + largest, packing_block, packing_head),
        weights=packed,
        block=CpuCache.block_bytes(config, BLOCK_SIZE, dtype) // ranks,
    )


def _joined(parameters: Iterable[tuple[str, torch.Tensor]], ranks: int) -> list[Shape]:
    """Return the shapes of a block's weights as backends join them: one product for q, k and v, one for gate and up."""
    shapes = {name.rpartition(".weight")[0].rpartition(".")[2]: tuple(p.shape) for name, p in parameters}
    groups = [("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")]
    joined: list[Shape] = []
    for group in groups:
        parts = [shapes.pop(name) for name in group]
        joined.append((sum(part[0] for part in parts) // ranks, parts[0][1]))
    return joined + [shape if len(shape) == 1 else (shape[0], shape[1] // ranks) for shape in shapes.values()]


def _packed_bytes(shape: Shape, size: int, quantization: Quantization | None) -> int:
    """Return the bytes of a product's weight [out, in] for a kernel."""
    out, inputs = (ceil_div(n, _PADDING) * _PADDING for n in shape)
    if quantization is None:
        return out * inputs * size
    if quantization == "int8":
        return out * inputs + 4 * out
    return out * inputs // 2 + 2 * out * inputs // GROUP_SIZE


def _packing_bytes(size: int, quantization: Quantization | None, *, joined: bool) -> int:
    """Return the bytes of temporary tensors for each value of a weight that is packed, as measured on a CPU.

    `joined` weights are copies of several. Rounding has two copies in float32, beside one of the weight itself.
    """
    if quantization is None:
        return size * (4 if joined else 1)
    return size * (2 if joined else 1) + (8 if size == 4 else 12)


def _cache_bytes(block: int, config: LlamaConfig, device: torch.device, options: EngineOptions) -> int:
    if options.kv_cache_memory_bytes is not None:
        return options.kv_cache_memory_bytes
    blocks = 1 + ceil_div(options.max_seq_len or config.max_seq_len, BLOCK_SIZE)
    if device.type != "cuda":
        return int(blocks * block / CPU_CACHE_SHARE)
    total = torch.cuda.get_device_properties(device).total_memory
    return blocks * block + int((1 - GPU_MEMORY_SHARE) * total)


def _step_bytes(config: LlamaConfig, options: EngineOptions, device: torch.device) -> int:
    """Return the bytes of a step's tensors: activations in float32, and several copies of the logits."""
    width = 4 * config.hidden_size + 2 * config.intermediate_size + 2 * config.num_heads * config.head_dim
    tokens = options.batch_tokens(device)
    return 4 * (tokens * width + 4 * options.max_num_seqs * config.vocab_size)


def _tokenizer_bytes(path: Path) -> int:
    """Return the bytes of the tokenizer in memory, by the size of its file, or of what has it in a GGUF file."""
    if path.is_file():
        size = min(tensor.offset for tensor in read_gguf(path).tensors.values())
    else:
        files = (path / name for name in TOKENIZER_FILES)
        size = next((file.stat().st_size for file in files if file.is_file()), 0)
    return size * _TOKENIZER_FACTOR
