"""One rank of a model, in a process of its own, which `workers` started."""

from __future__ import annotations

import logging
import os
import select
import sys
import threading
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from llama_ray.generation.backend import Backend
from llama_ray.generation.batch import StepBatch
from llama_ray.generation.kv_cache import count_blocks
from llama_ray.generation.parallel.division import cut_tied_head, rank_config, rank_device, share
from llama_ray.generation.parallel.ranks import Ranks
from llama_ray.generation.parallel.runner import RankRunner, from_host
from llama_ray.generation.prepare import prepare
from llama_ray.generation.quantize import Quantization
from llama_ray.generation.runner import RunnerError
from llama_ray.model.checkpoint import load_model
from llama_ray.model.llama import Llama
from llama_ray.utils.errors import first_line

_log = logging.getLogger(__name__)


class Worker:
    """One rank, in its own process; its methods are what rank 0 can ask for."""

    backend: Backend
    ranks: Ranks
    runner: RankRunner

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size

    def answer(self, method: str, args: tuple[Any, ...]) -> tuple[type[Exception] | None, Any]:
        """(None, what the method returns), or what to raise on rank 0 and the message."""
        try:
            return None, getattr(self, method)(*args)
        except RunnerError as e:  # another rank is the cause; rank 0 will see which
            return RuntimeError, str(e)
        except Exception as e:
            _log.exception("rank %d: %s failed", self.rank, method)
            return _kind(e), first_line(e)

    def load(
        self,
        directory: Path,
        dtype: torch.dtype | None,
        kind: str,
        quantization: Quantization | None,
        batch_invariant: bool,
    ) -> int:
        """Read this rank's share of the model -> its bytes."""
        self.device = rank_device(kind, self.rank)
        if kind == "cuda":
            torch.cuda.set_device(self.device)
        model = load_model(directory, dtype, self.device, share(self.rank, self.size))
        self.backend = prepare_share(model, quantization, batch_invariant, self.rank, self.size)
        return self.backend.weight_bytes

    def connect(self, meeting_place: str) -> None:
        """Meet the other ranks in a directory."""
        self.ranks = Ranks(meeting_place, self.rank, self.size, self.device)

    def count_blocks(self, max_num_seqs: int, max_seq_len: int, memory_bytes: int | None) -> int:
        """`kv_cache.count_blocks` of this rank."""
        backend, limits = self.backend, (max_num_seqs, max_seq_len)
        return count_blocks(
            backend.block_bytes, backend.block_size, *limits, self.device, memory_bytes, self.size
        )

    def reserve(self, blocks: int) -> None:
        """Make the cache."""
        self.runner = RankRunner(self.backend, blocks, self.ranks)

    def step(self, batch: StepBatch, copies: list[tuple[int, int]]) -> None:
        """Compute this rank's part of a step; an error that all ranks have is raised, another ends the process."""
        try:
            result = self.runner.compute(from_host(batch), copies)
        except RunnerError:
            raise
        except Exception:
            _log.exception("rank %d is out of step and ends", self.rank)
            os._exit(1)
        if self.device.type == "cuda":
            # Rank 0 waits for the answer, not for its own GPU, where it could not tell whether a worker is gone.
            torch.cuda.current_stream().synchronize()
        if isinstance(result, Exception):
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            raise result


def work() -> None:
    """A worker's whole life; its arguments are the socket, the engine's process, rank, ranks and threads."""
    descriptor, parent, rank, size, threads = map(int, sys.argv[1:])
    threading.Thread(target=_end_with, args=(descriptor, parent), daemon=True).start()
    torch.set_num_threads(threads)
    connection, worker = Connection(descriptor), Worker(rank, size)
    try:
        while True:
            method, args = connection.recv()
            connection.send(worker.answer(method, args))
    except (EOFError, OSError):
        os._exit(0)


def prepare_share(
    model: Llama, quantization: Quantization | None, batch_invariant: bool, rank: int, size: int
) -> Backend:
    """Prepare one rank's share of a model; see `prepare`."""
    cut_tied_head(model, rank, size)
    config = rank_config(model.config, size)
    return prepare(model, quantization, batch_invariant=batch_invariant, cache_config=config)


def _kind(error: Exception) -> type[Exception]:
    """What rank 0 raises for it: the engine looks at whether memory ran out, its user at whose fault it is."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return MemoryError
    return ValueError if isinstance(error, ValueError) else RuntimeError


def _end_with(descriptor: int, parent: int) -> None:
    """End this process when the engine closes the socket or is gone.

    Not by PR_SET_PDEATHSIG, which comes when the thread that started the worker ends. The parent is looked at too:
    a process that it forked may hold the socket open.
    """
    poll = select.poll()
    poll.register(descriptor, 0)  # only hang-ups and errors, which are always told
    if hasattr(os, "pidfd_open"):
        try:
            poll.register(os.pidfd_open(parent), select.POLLIN)
        except ProcessLookupError:
            os._exit(0)
    poll.poll()
    os._exit(0)
