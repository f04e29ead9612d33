"""A model that is divided between ranks: this process, which runs the engine, and its workers."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from llama_ray.data.tokenizing.tokenizer import Tokenizer
from llama_ray.generation.backends.backend import Backend
from llama_ray.generation.backends.kv_cache import count_blocks
from llama_ray.generation.backends.quantize import Quantization
from llama_ray.generation.backends.runner import RunnerError
from llama_ray.generation.parallel.calls import Connect, CountBlocks, Load, Reserve
from llama_ray.generation.parallel.division import check_ranks, rank_device, rank_slicer
from llama_ray.generation.parallel.ranks import Ranks
from llama_ray.generation.parallel.runner import TensorParallelRunner
from llama_ray.generation.parallel.worker import prepare_share
from llama_ray.generation.parallel.workers import Workers
from llama_ray.pretrained import load_pretrained, load_shape


class ShardedModel:
    """A checkpoint loaded on `size` ranks: this process is rank 0, with `backend`; the others are workers.

    Each rank reads only its share of the checkpoint. Raises ValueError for a checkpoint that cannot be read or divided,
    and RunnerError if a worker fails to start.
    """

    def __init__(
        self,
        directory: Path,
        dtype: torch.dtype | None,
        device: torch.device | str,
        quantization: Quantization | None,
        batch_invariant: bool,
        size: int,
    ) -> None:
        device_type = torch.device(device).type
        check_ranks(load_shape(directory), size, torch.device(device))
        self.backend: Backend
        self.tokenizer: Tokenizer | None
        self.size = size
        self._workers = Workers(size)
        try:
            form = (quantization, batch_invariant)
            loading = self._workers.ask(Load(directory, dtype, device_type, *form))
            own_device = rank_device(device_type, 0)
            model, self.tokenizer = load_pretrained(directory, dtype, own_device, rank_slicer(0, size))
            self.backend = prepare_share(model, *form, 0, size)
            self.weight_bytes = self.backend.weight_bytes + sum(loading.results())
            self._ranks = self._meet(own_device)
            self._workers.connect(self._ranks)
        except RunnerError as error:
            raise self._workers.lost(str(error)) from error
        except BaseException:
            self._workers.close()
            raise

    def count_blocks(
        self, bytes_per_block: int, max_num_seqs: int, max_seq_len: int, memory_bytes: int | None
    ) -> int:
        """Return `kv_cache.count_blocks` of the rank with the least memory; `bytes_per_block` are those of rank 0."""
        limits = (max_num_seqs, max_seq_len)
        block_size, device = self.backend.block_size, self.backend.device
        own = count_blocks(bytes_per_block, block_size, *limits, device, memory_bytes, self.size)
        return min(own, *self._workers.ask(CountBlocks(*limits, memory_bytes)).results())

    def runner(self, num_blocks: int) -> TensorParallelRunner:
        """Allocate caches of `num_blocks` blocks on all ranks; return the runner that uses them."""
        reserving = self._workers.ask(Reserve(num_blocks))
        runner = TensorParallelRunner(self.backend, num_blocks, self._ranks, self._workers)
        reserving.results()
        return runner

    def close(self) -> None:
        """End the workers."""
        self._workers.close()

    def _meet(self, device: torch.device) -> Ranks:
        with tempfile.TemporaryDirectory() as directory:
            connecting = self._workers.ask(Connect(directory))
            ranks = Ranks(directory, 0, self.size, device)
            connecting.results()
        return ranks
