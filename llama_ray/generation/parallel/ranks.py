"""The collectives between the ranks of one model."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from llama_ray.generation.runner import RunnerError
from llama_ray.utils.errors import first_line

TIMEOUT_S = 300.0
"""For the other ranks to take part in a step; a first one may compile kernels."""


class Ranks:
    """The collectives of one rank: NCCL between GPUs, gloo on the loopback device between CPU processes.

    The group belongs to this object alone, beside torch's default group and other engines of the process. Making
    one waits for the others; they meet in `directory`.
    """

    def __init__(self, directory: str | Path, rank: int, size: int, device: torch.device) -> None:
        self.rank, self.size = rank, size
        self.sums = self.gathers = 0
        """So many of each since they were last set to 0."""
        store = dist.FileStore(f"{directory}/store", size)  # type: ignore[attr-defined]
        try:
            self._group: Any = (_nccl if device.type == "cuda" else _gloo)(store, rank, size)
        except RuntimeError as e:
            raise RunnerError(f"the ranks did not meet ({first_line(e)})") from e
        self.sum(torch.zeros(1, device=device))  # NCCL connects with the first one

    def sum(self, part: Tensor) -> Tensor:
        """One tensor of each rank -> their sum on every rank, the same to the bit.

        Parts are gathered and added in the order of the ranks, in fp32, and rounded once. A ring or a tree would
        move less with four ranks and more (half as much with four), but it adds in an order that depends on where
        an element lies, and so on how many tokens share the step.
        """
        parts = part.new_empty((self.size, *part.shape))
        self._complete(self._group._allgather_base, _bytes(parts), _bytes(part))
        self.sums += 1
        total = parts[0].to(torch.promote_types(part.dtype, torch.float32))
        for other in parts[1:]:
            total += other
        return total.to(part.dtype)

    def gather(self, part: Tensor) -> Tensor:
        """[rows, n] of each rank -> [rows, ranks * n] on rank 0; the others get their own part back."""
        if len(part):
            parts = [torch.empty_like(part) for _ in range(self.size)] if self.rank == 0 else []
            options = dist.GatherOptions()
            options.rootRank = 0
            self._complete(self._group.gather, [parts] if parts else [], [part.contiguous()], options)
            self.gathers += 1
            return torch.cat(parts, -1) if parts else part
        return part.new_empty((0, part.shape[-1] * self.size))

    def abort(self) -> None:
        """End whatever is under way, from any thread: another rank is gone, and NCCL would wait for it for ever."""
        self._group.abort()

    def _complete(self, collective: Callable[..., Any], *args: Any) -> None:
        try:
            collective(*args).wait()
        except RuntimeError as e:  # dist.DistError is one, but gloo raises this itself
            raise RunnerError(f"the ranks lost contact ({first_line(e)})") from e


def _nccl(store: Any, rank: int, size: int) -> Any:
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timedelta(seconds=TIMEOUT_S)
    return dist.ProcessGroupNCCL(store, rank, size, options)


def _gloo(store: Any, rank: int, size: int) -> Any:
    options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
    options._timeout = timedelta(seconds=TIMEOUT_S)
    return dist.ProcessGroupGloo(store, rank, size, options)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)
