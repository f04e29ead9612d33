"""A sender that runs ahead of its receiver by a bounded amount of memory."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator

import pytest
import torch
from torch import Tensor

from llama_ray.training.checkpointing.host_copy import BUFFER_BYTES, HostCopies

# Two buffers.
LARGE = torch.arange(BUFFER_BYTES // 4, dtype=torch.int64)


def start_sending(copies: HostCopies, tensors: Iterable[Tensor]) -> threading.Thread:
    thread = threading.Thread(target=copies.send, args=(tensors,), daemon=True)
    thread.start()
    return thread


@pytest.mark.parametrize("limit", [1, 2 * BUFFER_BYTES, None])
def test_bytes_arrive_in_order_in_every_transfer(limit: int | None) -> None:
    copies = HostCopies(limit, pinned=False)
    matrix = torch.arange(12, dtype=torch.int32).reshape(3, 4)
    tensors = [torch.tensor(3.0), matrix.t(), torch.empty(0), LARGE, matrix.bfloat16()]
    expected = b"".join(t.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for t in tensors)
    for _ in range(2):
        copies.begin()
        for _ in range(2):
            thread = start_sending(copies, tensors)
            assert b"".join(bytes(chunk) for chunk in copies.receive()) == expected
            thread.join()
        copies.end()


def test_the_sender_waits_at_the_limit_until_the_transfer_ends() -> None:
    copies = HostCopies(2 * BUFFER_BYTES, pinned=False)
    changed = torch.zeros_like(LARGE)
    first_tensor_copied = threading.Event()

    def tensors() -> Iterator[Tensor]:
        yield changed
        first_tensor_copied.set()
        yield LARGE

    thread = start_sending(copies, tensors())
    # Two buffers are filled without a receiver.
    assert first_tensor_copied.wait(60)
    chunks = copies.receive()
    # Training continues; what was copied does not change.
    changed.fill_(1)
    assert not any(next(chunks)[:100])
    assert thread.is_alive()
    copies.end()
    thread.join(60)
    assert not thread.is_alive()
    # It is dropped at once, since the transfer has ended.
    copies.send([LARGE])


def test_a_sender_that_fails_does_not_leave_the_receiver_waiting() -> None:
    copies = HostCopies(None, pinned=False)

    def tensors() -> Iterator[Tensor]:
        yield LARGE
        raise MemoryError("none left")

    with pytest.raises(MemoryError):
        copies.send(tensors())
    with pytest.raises(OSError, match="copying to host memory failed: none left"):
        list(copies.receive())
