"""Global batches that are built in a thread before they are asked for."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from llama_ray.data.dataset.batch import Batch

Build = Callable[[int], list[Batch]]


class Prefetch:
    """Builds up to `depth` global batches ahead; with a depth of 0 each is built when it is asked for."""

    def __init__(self, depth: int) -> None:
        self._depth = depth
        self._thread: ThreadPoolExecutor | None = None
        self._ahead: deque[tuple[int, Future[list[Batch]]]] = deque()

    def get(self, step: int, build: Build) -> list[Batch]:
        """Return `build(step)`, and begin to build what the steps after it will ask for.

        Raises what `build` raised for this step, and does so again when asked again.
        """
        if not self._depth:
            return build(step)
        if self._ahead and self._ahead[0][0] != step:
            self.clear()
        self._fill(step, build)
        batches = self._ahead[0][1].result()
        self._ahead.popleft()
        self._fill(step + 1, build)
        return batches

    def clear(self) -> None:
        """Forget what was built ahead."""
        for _, future in self._ahead:
            future.cancel()
        self._ahead.clear()

    def close(self) -> None:
        """Forget what was built ahead, and end the thread. Another call of `get` starts it again."""
        self.clear()
        if self._thread is not None:
            self._thread.shutdown(wait=True)
            self._thread = None

    def _fill(self, step: int, build: Build) -> None:
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches")
        for ahead in range(step + len(self._ahead), step + self._depth):
            self._ahead.append((ahead, self._thread.submit(build, ahead)))
