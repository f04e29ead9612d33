"""Run a function in several real processes that form a gloo process group."""

from __future__ import annotations

import multiprocessing
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist


def in_processes(world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """`function(*args)` on every rank; the results by rank. A failure on any rank fails the caller."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as directory:
        pipes, processes = [], []
        for rank in range(world_size):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(
                target=_worker, args=(rank, world_size, directory, theirs, function, args), daemon=True
            )
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        results = [pipe.recv() for pipe in pipes]
        for process in processes:
            process.join()
    for error, _ in results:
        if error:
            raise AssertionError(error)
    return [result for _, result in results]


def _worker(
    rank: int, world_size: int, directory: str, pipe: Connection, function: Callable[..., Any], args: Any
) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{directory}/store", rank=rank, world_size=world_size
        )
        pipe.send((None, function(*args)))
        dist.destroy_process_group()
    except BaseException:
        pipe.send((traceback.format_exc(), None))
