"""The private names of torch that this project uses: a function or an alias for each, and nowhere else.

torch may change these names in any release, so `pyproject.toml` bounds its version from above.
`tests/utils/test_torch_private.py` uses each name and says which feature breaks without it; raise the bound once it
passes. What takes long to import is imported in the function that needs it, because training imports this module.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
import torch.utils._python_dispatch
import torch.utils._pytree
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

TorchDispatchMode = torch.utils._python_dispatch.TorchDispatchMode
"""Base class that sees every operation; without it, planning can trace neither memory nor traffic."""

tree_leaves = torch.utils._pytree.tree_leaves
"""The leaves of nested arguments; without it, planning misses tensors in lists and dictionaries."""


def fake_tensors() -> AbstractContextManager[Any]:
    """Make tensors that have shapes but no memory; without it, planning cannot trace a step.

    Real tensors, such as the tokens of a batch, may be inputs.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=True)


def active_fake_mode() -> object | None:
    """Return the mode of `fake_tensors` that is in force; without it, planning counts DTensor's shape inference."""
    from torch._guards import active_fake_mode as active

    return active()


@contextmanager
def fake_process_group(world_size: int) -> Iterator[None]:
    """Be rank 0 of `world_size` workers that do not exist; without it, planning cannot shard a model."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


class CollectiveCall(NamedTuple):
    """A collective operation that was called: its name in torch, its ranks, and the bytes of the whole tensor."""

    name: str
    ranks: tuple[int, ...]
    size: int


def collective_call(func: Any, args: Any, kwargs: Any, result: Any) -> CollectiveCall | None:
    """Describe the operation `func` if it is a collective; without it, planning cannot count traffic.

    Returns None for all other operations and for those that only wait. torch's table of collectives takes seconds
    to import.
    """
    from torch.distributed._tools.fake_collectives import CollectiveOp, collective_ops, sync_ops

    if func not in collective_ops or func in sync_ops:
        return None
    ranks = dist.get_process_group_ranks(CollectiveOp.get_process_group(func, args))
    return CollectiveCall(
        func.name(), tuple(ranks), CollectiveOp.get_comm_tensor_size(func, result, args, kwargs)
    )


def local_tensor(tensor: DTensor) -> Tensor:
    """Return this rank's shard itself; without it, planning counts the memory of a sharded tensor wrongly.

    `to_local` makes a view, which is an operation that the trace would see.
    """
    return tensor._local_tensor


def shard_offsets(tensor: DTensor) -> tuple[int, ...]:
    """Return where this rank's shard starts in each dimension of the whole tensor.

    Without it, workers that hold shards of the model cannot write checkpoints.
    """
    [chunk] = tensor.__create_chunk_list__()  # type: ignore[no-untyped-call]
    return tuple(chunk.offsets)


def is_strided_shard(placement: Any) -> bool:
    """Whether the mesh dimensions after this one divide the tensor first, as under FSDP with tensor parallelism.

    Without it, initial weights and Muon's updates go to the wrong rows there.
    """
    from torch.distributed.tensor.placement_types import _StridedShard

    return isinstance(placement, _StridedShard)


def reduce_scatter_op() -> Any:
    """Return the operation that tensor parallelism ends a product with.

    Without it, selective activation checkpointing repeats communication in the backward pass.
    """
    return torch.ops._c10d_functional.reduce_scatter_tensor.default


def mark_dynamic(tensor: Tensor, dimension: int) -> None:
    """Let torch.compile expect other sizes of `dimension`; without it, document masks compile twice on a GPU."""
    torch._dynamo.maybe_mark_dynamic(tensor, dimension)


def softmax_backward(grad: Tensor, probabilities: Tensor) -> Tensor:
    """Return p (grad - sum(p grad)), the gradient by what `probabilities` is the softmax of, over the last dimension.

    Without it, attention within documents takes three passes instead of one in the backward pass.
    """
    return torch._softmax_backward_data(grad, probabilities, -1, probabilities.dtype)


def scaled_mm(
    left: Tensor, right: Tensor, left_scale: Tensor, right_scale: Tensor, dtype: torch.dtype, fast: bool
) -> Tensor:
    """Multiply float8 matrices: (left * left_scale) @ (right * right_scale); without it, there is no precision fp8.

    `left` is row-major, `right` column-major; `fast` adds up some sums in fewer bits.
    """
    return torch._scaled_mm(left, right, left_scale, right_scale, out_dtype=dtype, use_fast_accum=fast)


def gloo_group(store: Any, rank: int, size: int, timeout: timedelta) -> Any:
    """Make a process group on the loopback device, apart from torch's default group.

    Without it, tensor-parallel generation cannot run on a CPU.
    """
    options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
    options._timeout = timeout
    return dist.ProcessGroupGloo(store, rank, size, options)


def nccl_group(store: Any, rank: int, size: int, timeout: timedelta) -> Any:
    """Make a process group between GPUs, apart from torch's default group.

    Without it, tensor-parallel generation cannot run on GPUs.
    """
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout
    return dist.ProcessGroupNCCL(store, rank, size, options)


def all_gather_base(group: Any, output: Tensor, part: Tensor) -> Any:
    """Start to gather `part` of every rank in `output`, in a group of `gloo_group` or `nccl_group`.

    Without it, tensor-parallel generation cannot sum in one order. torch's public functions take only groups that were
    made by `new_group`, which needs the default group.
    """
    return group._allgather_base(output, part)
