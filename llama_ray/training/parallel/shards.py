"""From a sharded tensor to the whole one, and from the whole to a worker's shard."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor

from llama_ray.utils.torch_private import is_strided_shard


def whole_tensor(value: Tensor) -> Tensor:
    """Return `value`, gathered if it is sharded. Every worker that holds a shard must call it."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def own_shard(whole: Tensor, like: DTensor) -> Tensor:
    """Return the view of `whole` at this worker's shard of `like`, which has the same shape.

    torch computes a shard's offset from tensor values; the fake tensors of planning have none, so it is computed here.
    Under FSDP with tensor parallelism the last mesh dimension divides a tensor dimension first (`_StridedShard`).
    """
    mesh = like.device_mesh
    coordinate = mesh.get_coordinate()
    assert coordinate is not None
    divisions: list[tuple[int, Any]] = [(i, p) for i, p in enumerate(like.placements) if hasattr(p, "dim")]
    divisions.sort(key=lambda division: is_strided_shard(division[1]))
    for mesh_dim, placement in divisions:
        chunks = whole.chunk(mesh.size(mesh_dim), placement.dim)
        index = coordinate[mesh_dim]
        # With fewer rows than workers, the last workers hold empty shards.
        whole = chunks[index] if index < len(chunks) else whole.narrow(placement.dim, 0, 0)
    assert whole.shape == like.to_local().shape
    return whole
