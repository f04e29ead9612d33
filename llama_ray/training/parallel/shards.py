"""A worker's own part of a tensor that is divided among several."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor

from llama_ray.utils.torch_private import is_strided_shard


def own_part(whole: Tensor, like: DTensor) -> Tensor:
    """The view of `whole` that this worker holds of `like`, which has the same shape.

    torch's own way to the place of a part goes through the values of a tensor, which a plan's fake ones have not.
    Under FSDP with tensor parallelism a dimension is divided by the last mesh dimension first (`_StridedShard`).
    """
    mesh = like.device_mesh
    place = mesh.get_coordinate()
    assert place is not None
    divisions: list[tuple[int, Any]] = [(i, p) for i, p in enumerate(like.placements) if hasattr(p, "dim")]
    divisions.sort(key=lambda division: is_strided_shard(division[1]))
    for i, placement in divisions:
        pieces = whole.chunk(mesh.size(i), placement.dim)
        mine = place[i]
        # Where there are fewer rows than workers, the last workers hold none.
        whole = pieces[mine] if mine < len(pieces) else whole.narrow(placement.dim, 0, 0)
    assert whole.shape == like.to_local().shape
    return whole
