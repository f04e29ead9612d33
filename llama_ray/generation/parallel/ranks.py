"""The collective operations between the ranks of one model."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from llama_ray.generation.backends.runner import RunnerError
from llama_ray.utils import torch_private
from llama_ray.utils.errors import first_line

TIMEOUT_S = 300.0
"""How long a rank waits for the others to take part in a step; the first step may compile kernels."""


class Ranks:
    """The collectives of one rank: NCCL between GPUs, gloo on the loopback device between CPU processes.

    The process group is separate from torch's default group and from those of other engines in the process. The
    constructor waits for the other ranks, which meet in `directory`.
    """

    def __init__(self, directory: str | Path, rank: int, size: int, device: torch.device) -> None:
        self.rank, self.size = rank, size
        self.sums = self.gathers = 0
        """Numbers of collectives since they were last set to 0."""
        store = dist.FileStore(f"{directory}/store", size)  # type: ignore[attr-defined]
        make_group = torch_private.nccl_group if device.type == "cuda" else torch_private.gloo_group
        try:
            self._group = make_group(store, rank, size, timedelta(seconds=TIMEOUT_S))
        except RuntimeError as error:
            raise RunnerError(f"the ranks did not meet ({first_line(error)})") from error
        # NCCL connects with the first collective.
        self.sum(torch.zeros(1, device=device))

    def sum(self, part: Tensor) -> Tensor:
        """Return the sum of one tensor from each rank, the same to the bit on every rank.

        Parts are gathered and added in the order of the ranks, in fp32, and rounded once. A ring would move fewer
        bytes between more than two ranks (half as many between four), but would add in an order that depends on an
        element's place in the tensor, and so on the number of tokens in the step.
        """
        parts = part.new_empty((self.size, *part.shape))
        self._complete(torch_private.all_gather_base, self._group, _as_bytes(parts), _as_bytes(part))
        self.sums += 1
        total = parts[0].to(torch.promote_types(part.dtype, torch.float32))
        for other in parts[1:]:
            total += other
        return total.to(part.dtype)

    def gather(self, part: Tensor) -> Tensor:
        """Return [rows, ranks * n] on rank 0, given [rows, n] on each rank; the other ranks get `part` back."""
        if not len(part):
            return part.new_empty((0, part.shape[-1] * self.size))
        parts = [torch.empty_like(part) for _ in range(self.size)] if self.rank == 0 else []
        options = dist.GatherOptions()
        options.rootRank = 0
        self._complete(self._group.gather, [parts] if parts else [], [part.contiguous()], options)
        self.gathers += 1
        return torch.cat(parts, -1) if parts else part

    def abort(self) -> None:
        """End all pending collectives, from any thread. When a rank is gone, NCCL would wait for it forever."""
        self._group.abort()

    def _complete(self, collective: Callable[..., Any], *args: Any) -> None:
        try:
            collective(*args).wait()
        except RuntimeError as error:
            # dist.DistError is a RuntimeError, but gloo raises RuntimeError itself.
            raise RunnerError(f"the ranks lost contact ({first_line(error)})") from error


def _as_bytes(tensor: Tensor) -> Tensor:
    # Gathering only moves bytes, so the library need not support the dtype.
    return tensor.contiguous().view(-1).view(torch.uint8)
