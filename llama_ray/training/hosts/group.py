"""Small exchanges between workers over the network of their hosts, beside the group that trains."""

from __future__ import annotations

from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


class HostGroup:
    """A gloo process group of all workers, for values in host memory; without a process group, one worker alone.

    A separate group, because its collectives may run in another thread than those of training, and because NCCL takes
    tensors on a GPU only. Every worker must construct it and call its methods in the same order.
    """

    def __init__(self, timeout_s: int) -> None:
        """Raise RuntimeError from a collective that waits longer than `timeout_s` for a worker."""
        self._group: dist.ProcessGroup | None = None
        if dist.is_initialized():
            self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))

    def barrier(self) -> None:
        """Wait until all workers have called it."""
        if self._group is not None:
            dist.barrier(self._group)

    def gather(self, value: T) -> list[T]:
        """Return the values of all workers, by rank."""
        if self._group is None:
            return [value]
        values: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(values, value, self._group)
        return values

    def broadcast(self, value: T) -> T:
        """Return the value of rank 0."""
        if self._group is None:
            return value
        values: list[Any] = [value]
        dist.broadcast_object_list(values, 0, self._group)
        received: T = values[0]
        return received

    def any(self, flag: bool) -> bool:
        """Return whether `flag` is true on any worker."""
        value = torch.tensor(int(flag))
        if (work := self.start_max(value)) is not None:
            work.wait()
        return bool(value.item())

    def start_max(self, values: Tensor) -> dist.Work | None:
        """Start to replace `values` by the maximum over the workers. Wait for the work that is returned, if any."""
        if self._group is None:
            return None
        work: dist.Work = dist.all_reduce(values, dist.ReduceOp.MAX, group=self._group, async_op=True)
        return work
