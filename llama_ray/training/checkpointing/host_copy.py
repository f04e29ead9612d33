"""Copies of tensors on their way from training to the thread that writes them, in a bounded amount of memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from queue import SimpleQueue
from threading import Semaphore

import torch
from torch import Tensor

BUFFER_BYTES = 32 * 2**20
"""What is handed over at once. glibc gives blocks of this size back to the system as soon as they are freed."""

_Copy = tuple[Tensor, int, torch.cuda.Event | None]  # a buffer, how much of it is filled, and when that is so


class HostCopies:
    """One thread sends tensors, another receives their bytes; the sender waits while `limit_bytes` are on the way.

    At least one buffer always is. None sets no limit. `pinned` is for tensors of a GPU: the memory is then kept from
    one transfer to the next, since pinning is slow.
    """

    def __init__(self, limit_bytes: int | None, *, pinned: bool) -> None:
        self._limit, self._pinned = limit_bytes, pinned
        self._free: list[Tensor] = []
        self.begin()

    def begin(self) -> None:
        """Start a transfer; the one before must have ended."""
        self._ended = False
        self._sent: SimpleQueue[_Copy | BaseException | None] = SimpleQueue()
        self._slots = None if self._limit is None else Semaphore(max(1, self._limit // BUFFER_BYTES))

    def send(self, tensors: Iterable[Tensor]) -> None:
        """Copy `tensors` as the bytes of one file; to be matched by one `receive`.

        A tensor on the CPU may be changed afterwards; one on a GPU by what is queued on its stream after this.
        """
        if self._ended:
            return
        try:
            self._copy(tensors)
        except BaseException as e:
            self._sent.put(e)  # or the receiver would wait for ever
            raise
        self._sent.put(None)

    def receive(self) -> Iterator[memoryview]:
        """The bytes that one `send` copies, in pieces; each is valid until the next is asked for.

        Raises OSError where the sender failed.
        """
        while (copy := self._sent.get()) is not None:
            if isinstance(copy, BaseException):
                raise OSError(f"copying to host memory failed: {copy}") from copy
            buffer, used, copied = copy
            if copied is not None:
                copied.synchronize()
            yield buffer.numpy().data[:used]
            self._free.append(buffer)
            if self._slots is not None:
                self._slots.release()

    def end(self) -> None:
        """Let no sender wait any longer, whether or not all was received, and free what is not pinned."""
        self._ended = True
        if not self._pinned:
            self._free.clear()
        if self._slots is not None:
            self._slots.release()

    def _copy(self, tensors: Iterable[Tensor]) -> None:
        buffer: Tensor | None = None
        used = 0
        for run in (run for tensor in tensors for run in _runs(tensor)):
            while run.numel():
                if buffer is None:
                    buffer, used = self._take(), 0
                if self._ended:
                    return
                now, run = run[: BUFFER_BYTES - used], run[BUFFER_BYTES - used :]
                buffer[used : used + now.numel()].copy_(now, non_blocking=self._pinned)
                used += now.numel()
                if used == BUFFER_BYTES:
                    self._hand_over(buffer, used)
                    buffer = None
        if buffer is not None:
            self._hand_over(buffer, used)

    def _take(self) -> Tensor:
        if self._slots is not None:
            self._slots.acquire()
        try:
            return self._free.pop()
        except IndexError:
            return torch.empty(BUFFER_BYTES, dtype=torch.uint8, pin_memory=self._pinned)

    def _hand_over(self, buffer: Tensor, used: int) -> None:
        copied = torch.cuda.current_stream().record_event() if self._pinned else None
        self._sent.put((buffer, used, copied))


def _runs(tensor: Tensor) -> Iterator[Tensor]:
    """The bytes of `tensor` in row-major order, as uint8 vectors that share its memory."""
    if tensor.is_contiguous():
        yield tensor.view(-1).view(torch.uint8)
    else:
        for row in tensor:
            yield from _runs(row)
