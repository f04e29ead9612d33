"""One rank of a model in its own process, which `workers` starts."""

from __future__ import annotations

import logging
import os
import select
import sys
import threading
from multiprocessing.connection import Connection
from typing import Any

import torch

from llama_ray.generation.backends.backend import Backend
from llama_ray.generation.backends.kv_cache import count_blocks
from llama_ray.generation.backends.prepare import prepare
from llama_ray.generation.backends.quantize import Quantization
from llama_ray.generation.backends.runner import RunnerError
from llama_ray.generation.parallel.calls import Call, Connect, CountBlocks, Failure, Load, Reserve, Step
from llama_ray.generation.parallel.division import cut_tied_head, rank_config, rank_device, rank_slicer
from llama_ray.generation.parallel.ranks import Ranks
from llama_ray.generation.parallel.runner import RankRunner
from llama_ray.model.llama import Llama
from llama_ray.pretrained import load_pretrained
from llama_ray.utils.errors import first_line
from llama_ray.utils.memory import is_out_of_memory
from llama_ray.utils.panics import panics_as_errors

_log = logging.getLogger(__name__)


class Worker:
    """Answers the calls of rank 0, which come in the order `Load`, `Connect`, `CountBlocks`, `Reserve`, `Step`s."""

    backend: Backend
    ranks: Ranks
    runner: RankRunner

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size

    def answer(self, call: Call[Any]) -> Any:
        """Return the answer to a call, or a `Failure`."""
        try:
            with panics_as_errors():
                return self._answer(call)
        except RunnerError as error:
            # Another rank is the cause; rank 0 finds out which.
            return Failure(RuntimeError, str(error))
        except Exception as error:
            _log.exception("rank %d: %s failed", self.rank, type(call).__name__)
            return Failure(_kind(error), first_line(error))

    def _answer(self, call: Call[Any]) -> Any:
        match call:
            case Load():
                return self._load(call)
            case Connect(directory):
                self.ranks = Ranks(directory, self.rank, self.size, self.backend.device)
            case CountBlocks():
                return self._count_blocks(call)
            case Reserve(num_blocks):
                self.runner = RankRunner(self.backend, num_blocks, self.ranks)
            case Step():
                self._step(call)
            case _:
                raise TypeError(f"the call is {type(call).__name__}, which no worker knows")
        return None

    def _load(self, call: Load) -> int:
        device = rank_device(call.device_type, self.rank)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        model, _ = load_pretrained(call.directory, call.dtype, device, rank_slicer(self.rank, self.size))
        self.backend = prepare_share(model, call.quantization, call.batch_invariant, self.rank, self.size)
        return self.backend.weight_bytes

    def _count_blocks(self, call: CountBlocks) -> int:
        backend, limits = self.backend, (call.max_num_seqs, call.max_seq_len)
        return count_blocks(
            backend.block_bytes, backend.block_size, *limits, backend.device, call.memory_bytes, self.size
        )

    def _step(self, call: Step) -> None:
        """Raise an error after which the ranks are in step; any other error ends the process."""
        try:
            with panics_as_errors():
                result = self.runner.compute(call.batch, call.copies)
        except RunnerError:
            raise
        except Exception:
            _log.exception("rank %d is out of step and ends", self.rank)
            os._exit(1)
        if self.backend.device.type == "cuda":
            # Rank 0 waits for the answer instead of its own GPU, so that it notices when a worker is gone.
            torch.cuda.current_stream().synchronize()
        if result.error is not None:
            if self.backend.device.type == "cuda":
                torch.cuda.empty_cache()
            raise result.error


def work() -> None:
    """Answer calls until the socket closes; sys.argv: the socket, the engine's process, rank, ranks and threads."""
    descriptor, parent, rank, size, threads = map(int, sys.argv[1:])
    threading.Thread(target=_end_with, args=(descriptor, parent), daemon=True).start()
    torch.set_num_threads(threads)
    connection, worker = Connection(descriptor), Worker(rank, size)
    try:
        while True:
            connection.send(worker.answer(connection.recv()))
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
    """Return MemoryError, upon which the engine shrinks; ValueError, the caller's mistake; else RuntimeError."""
    if is_out_of_memory(error):
        return MemoryError
    return ValueError if isinstance(error, ValueError) else RuntimeError


def _end_with(descriptor: int, parent: int) -> None:
    """End this process when the engine closes the socket or is gone.

    PR_SET_PDEATHSIG would not do: it is sent when the thread that started the worker ends. The parent process is
    watched too, because a fork of it may hold the socket open.
    """
    poll = select.poll()
    # An empty mask still reports hang-ups and errors.
    poll.register(descriptor, 0)
    if hasattr(os, "pidfd_open"):
        try:
            poll.register(os.pidfd_open(parent), select.POLLIN)
        except ProcessLookupError:
            os._exit(0)
    poll.poll()
    os._exit(0)
