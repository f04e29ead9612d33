"""What identifies the weights of a model, however its files divide them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor

import torch

from llama_ray.model.stored_model import StoredModel, UnreadTensor

_PIECE_BYTES = 64 * 1024**2
"""Bytes of a tensor that are in memory at once, in each thread."""
_MAX_THREADS = 8


def weights_hash(model: StoredModel) -> str:
    """Return a digest of all tensors of `model`: their names, dtypes, shapes and bytes.

    It takes one pass over the files. Sharded, the passes divide: see `tensor_digests` and `combined_digest`.
    """
    return combined_digest(tensor_digests(model, model.tensors))


def tensor_digests(model: StoredModel, names: Collection[str]) -> dict[str, str]:
    """Return the digest of each of the tensors `names`, computed in several threads."""
    threads = min(_MAX_THREADS, os.cpu_count() or 1)
    with ThreadPoolExecutor(threads, thread_name_prefix="weights-hash") as pool:
        digests = pool.map(_digest, (model.tensors[name] for name in names))
        return dict(zip(names, digests, strict=True))


def combined_digest(digests: Mapping[str, str]) -> str:
    """Return the digest of a model from those of its tensors, by name in any order."""
    lines = "".join(f"{name} {digest}\n" for name, digest in sorted(digests.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def _digest(tensor: UnreadTensor) -> str:
    shape, dtype = tensor.shape, tensor.dtype
    digest = hashlib.sha256(f"{dtype} {list(shape)}\n".encode())
    row_bytes = max(1, torch.Size(shape[1:]).numel() * dtype.itemsize)
    rows = max(1, _PIECE_BYTES // row_bytes)
    for start in range(0, shape[0], rows):
        region = (slice(start, min(start + rows, shape[0])), *(slice(0, size) for size in shape[1:]))
        digest.update(tensor.read(region).contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
