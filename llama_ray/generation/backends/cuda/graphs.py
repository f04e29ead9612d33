"""Decode in CUDA graphs: the launches of a step are recorded once for each of some batch sizes, and then replayed.

Only steps in which every sequence has one query are recorded; prompts take longer to compute than to launch. A graph
reads its inputs from tensors of its own. Rows beyond the batch decode token 0 into the scratch block.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llama_ray.generation.adapters.active import ActiveAdapters
from llama_ray.generation.backends.batch import StepBatch, to_device
from llama_ray.generation.backends.kv_cache import KVCache
from llama_ray.generation.backends.runner import Runner
from llama_ray.model.llama import Llama
from llama_ray.utils.integers import ceil_div

Capture = Callable[[Callable[[], Tensor]], tuple[Tensor, Callable[[], None]]]
"""Records a function without arguments; returns the tensor of its result, and a function that computes it again."""


def batch_sizes(largest: int) -> list[int]:
    """Return the recorded batch sizes: 1, 2, 4, and multiples of 8 up to the first that is at least `largest`."""
    return [1, 2, 4, *range(8, largest + 8, 8)]


class Graph:
    """A recorded step, with its inputs on the device and the memory of the host from which they are copied.

    Args:
        columns: int64 [4, rows]: tokens, positions, slots, context lengths.
        block_table: int32 [rows, blocks of the longest sequence].
        hidden: [rows, hidden_size], valid after `replay`.
        replay: Computes `hidden` again.
    """

    def __init__(
        self, columns: Tensor, block_table: Tensor, hidden: Tensor, replay: Callable[[], None]
    ) -> None:
        self.columns, self.block_table, self.hidden, self.replay = columns, block_table, hidden, replay
        self._staged = torch.zeros(columns.shape, dtype=torch.long, pin_memory=columns.is_cuda)
        self._host = self._staged.numpy()
        self._copied = torch.cuda.Event() if columns.is_cuda else None  # type: ignore[no-untyped-call]
        self._table = np.empty((0, 0), dtype=np.int32)

    def fill(self, batch: StepBatch) -> None:
        """Copy a step from host memory into the first rows; the others become padding."""
        if self._copied is not None:
            # The device may still be reading what the step before has left here.
            self._copied.synchronize()
        used = len(batch.context_len)
        for row, values in zip(
            self._host, (batch.tokens, batch.positions, batch.slots, batch.context_len), strict=True
        ):
            row[:used] = values.numpy()
        self._host[:, used:] = 0
        self._host[3, used:] = 1
        self.columns.copy_(self._staged, non_blocking=True)
        if self._copied is not None:
            self._copied.record()
        table = batch.block_table.numpy()
        # A sequence gets a block once in `block_size` steps.
        if table.shape != self._table.shape or not np.array_equal(table, self._table):
            self._copy_table(table)

    def _copy_table(self, table: NDArray[np.int32]) -> None:
        # Entries beyond a row's context are never read, so they may be left over from another step.
        used, width = table.shape
        staged = torch.zeros(
            len(self.block_table), width, dtype=torch.int32, pin_memory=self.block_table.is_cuda
        )
        staged.numpy()[:used] = table
        self.block_table[:, :width].copy_(staged, non_blocking=True)
        self._table = table


class GraphRunner(Runner):
    """A runner that decodes up to `max_num_seqs` sequences of up to `max_seq_len` tokens with graphs.

    A graph is recorded when its batch size first occurs, which takes a fraction of a second. Logits are computed
    outside the graphs: their number varies, and each graph would keep a tensor of their size.
    """

    def __init__(
        self,
        model: Llama,
        cache: KVCache,
        max_num_seqs: int,
        max_seq_len: int,
        capture: Capture | None = None,
        adapters: ActiveAdapters | None = None,
    ) -> None:
        super().__init__(model, cache, adapters)
        self.batch_sizes = batch_sizes(max_num_seqs)
        self._width = ceil_div(max_seq_len, cache.block_size)
        self._capture = capture or CudaCapture()
        self.graphs: dict[int, Graph] = {}

    @torch.inference_mode()
    def forward(self, batch: StepBatch) -> Tensor:
        """See `Runner`."""
        sequences = len(batch.context_len)
        # Graphs are recorded without adapters.
        recorded = self.adapters.step is None and len(batch.tokens) == sequences
        if not recorded or sequences > self.batch_sizes[-1]:
            return super().forward(batch)
        size = self.batch_sizes[bisect_left(self.batch_sizes, sequences)]
        graph = self.graphs.get(size)
        if graph is None:
            graph = self.graphs[size] = self._record(size)
        graph.fill(batch)
        graph.replay()
        return self.model.head(self._rows(graph.hidden, batch.logit_rows, sequences))

    def _rows(self, hidden: Tensor, rows: Tensor, sequences: int) -> Tensor:
        """Return `hidden[rows]`, which mostly is each of the sequences once, in order: a view."""
        if len(rows) == sequences and np.array_equal(rows.numpy(), np.arange(sequences)):
            return hidden[:sequences]
        return hidden[to_device(rows, self.device)]

    def _record(self, size: int) -> Graph:
        columns = torch.zeros(4, size, dtype=torch.long, device=self.device)
        columns[3] = 1
        block_table = torch.zeros(size, self._width, dtype=torch.int32, device=self.device)
        query_start = torch.arange(size + 1, dtype=torch.int32, device=self.device)

        def compute() -> Tensor:
            tokens, positions, slots, context_len = columns
            batch = StepBatch(
                tokens, positions, slots, query_start, context_len.int(), block_table, logit_rows=tokens
            )
            return self.model.hidden(tokens[None], positions, self.cache.attend(batch))[0]

        return Graph(columns, block_table, *self._capture(compute))


class CudaCapture:
    """Records CUDA graphs that share one memory pool, so only one may be replayed at a time."""

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, function: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        """See `Capture`."""
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        # The first run compiles kernels and lets libraries allocate their workspaces.
        with torch.cuda.stream(stream):
            function()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads may use the device during the capture.
        with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
            result = function()
        self._pool = graph.pool()
        return result, graph.replay
