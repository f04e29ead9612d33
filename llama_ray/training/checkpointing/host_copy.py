"""Copies of tensors on their way from training to the thread that writes them, in a bounded amount of memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from queue import SimpleQueue
from threading import Semaphore

import torch
from torch import Tensor

BUFFER_BYTES = 32 * 2**20
"""Bytes that are handed over at a time. glibc returns blocks of this size to the system as soon as they are freed."""

# A buffer, the number of bytes in it, and the event after which they are there (None: they already are).
_Copy = tuple[Tensor, int, torch.cuda.Event | None]


class HostCopies:
    """One thread sends tensors, another receives their bytes; the sender waits while `limit_bytes` are in transit.

    At least one buffer is always allowed; None sets no limit. `pinned` is for tensors on a GPU: their buffers are kept
    from one transfer to the next, since pinning memory is slow.
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
        """Copy `tensors` as the bytes of one file, for one call of `receive`.

        Afterwards a tensor on the CPU may be changed, and one on a GPU by work that is queued later on its stream.
        """
        if self._ended:
            return
        try:
            self._copy(tensors)
        except BaseException as error:
            # Without it the receiver would wait forever.
            self._sent.put(error)
            raise
        self._sent.put(None)

    def receive(self) -> Iterator[memoryview]:
        """Yield the bytes that one `send` copies, in chunks; each is valid until the next one is requested.

        Raises OSError if the sender failed.
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
        """Stop the sender, even if not everything was received, and free the buffers that are not pinned."""
        self._ended = True
        if not self._pinned:
            self._free.clear()
        if self._slots is not None:
            self._slots.release()

    def _copy(self, tensors: Iterable[Tensor]) -> None:
        buffer: Tensor | None = None
        used = 0
        for remaining in (vector for tensor in tensors for vector in _byte_vectors(tensor)):
            while remaining.numel():
                if buffer is None:
                    buffer, used = self._take(), 0
                if self._ended:
                    return
                head, remaining = remaining[: BUFFER_BYTES - used], remaining[BUFFER_BYTES - used :]
                buffer[used : used + head.numel()].copy_(head, non_blocking=self._pinned)
                used += head.numel()
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


def _byte_vectors(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the bytes of `tensor` in row-major order, as uint8 vectors that share its memory."""
    if tensor.is_contiguous():
        yield tensor.view(-1).view(torch.uint8)
    else:
        for row in tensor:
            yield from _byte_vectors(row)
