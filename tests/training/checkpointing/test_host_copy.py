"""A sender that runs ahead of its receiver by a bounded amount of memory."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llama_ray.data.tokenizer import Tokenizer
from llama_ray.model.config import LlamaConfig
from llama_ray.model.llama import Llama
from llama_ray.training.checkpointing.checkpointer import Checkpointer
from llama_ray.training.checkpointing.host_copy import BUFFER_BYTES, HostCopies
from llama_ray.training.checkpointing.progress import Progress
from llama_ray.training.config import TrainConfig
from llama_ray.training.optimizers.build import build_optimizer
from tests.training.helpers import growth, in_processes

LARGE = torch.arange(BUFFER_BYTES // 4, dtype=torch.int64)  # two buffers


def sent(copies: HostCopies, tensors: list[Tensor]) -> threading.Thread:
    thread = threading.Thread(target=copies.send, args=(tensors,), daemon=True)
    thread.start()
    return thread


@pytest.mark.parametrize("limit", [1, 2 * BUFFER_BYTES, None])
def test_bytes_arrive_in_order_and_transfers_can_follow_each_other(limit: int | None) -> None:
    copies = HostCopies(limit, pinned=False)
    matrix = torch.arange(12, dtype=torch.int32).reshape(3, 4)
    tensors = [torch.tensor(3.0), matrix.t(), torch.empty(0), LARGE, matrix.bfloat16()]
    expected = b"".join(t.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for t in tensors)
    for _ in range(2):
        copies.begin()
        for _ in range(2):
            thread = sent(copies, tensors)
            assert b"".join(bytes(chunk) for chunk in copies.receive()) == expected
            thread.join()
        copies.end()


def test_the_sender_waits_at_the_limit_and_is_let_go_at_the_end() -> None:
    copies = HostCopies(2 * BUFFER_BYTES, pinned=False)
    changed = torch.zeros_like(LARGE)
    third = threading.Event()

    def tensors() -> Iterator[Tensor]:
        yield changed
        third.set()
        yield LARGE

    thread = threading.Thread(target=copies.send, args=(tensors(),), daemon=True)
    thread.start()
    assert third.wait(60)  # two buffers were filled without a receiver
    chunks = copies.receive()
    changed.fill_(1)  # training goes on; what was copied stays
    assert not any(next(chunks)[:100])
    assert thread.is_alive()
    copies.end()
    thread.join(60)
    assert not thread.is_alive()
    copies.send([LARGE])  # nobody receives it: thrown away at once


def test_a_sender_that_fails_does_not_leave_the_receiver_waiting() -> None:
    copies = HostCopies(None, pinned=False)

    def tensors() -> Iterator[Tensor]:
        yield LARGE
        raise MemoryError("none left")

    with pytest.raises(MemoryError):
        copies.send(tensors())
    with pytest.raises(OSError, match="copying to host memory failed: none left"):
        list(copies.receive())


def _save_twice(run: Path, data: Path, copies_mib: int) -> tuple[int, int]:
    """(bytes of state, growth of memory)."""
    config = TrainConfig(checkpoint_copies_mib=copies_mib)
    model = Llama(LlamaConfig.preset("llama-30m"))
    optimizer = build_optimizer(model, config)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    checkpointer = Checkpointer(str(run), model, optimizer, Tokenizer.load(data), config)

    def save() -> None:
        for step in (1, 2):
            checkpointer.save(Progress(step=step))
        checkpointer.wait()

    grown = growth(save)
    assert [result.error for result in checkpointer.take_results()] == [None, None]
    checkpointer.close()
    return 12 * sum(p.numel() for p in model.parameters()), grown


def test_a_checkpoint_takes_no_more_memory_than_it_may(dataset: Path, tmp_path: Path) -> None:
    [(state, grown)] = in_processes(1, _save_twice, tmp_path, dataset, 64)
    assert state > 400e6
    assert grown < 64 * 2**20 + 48 * 2**20  # and what the code itself needs to write files
