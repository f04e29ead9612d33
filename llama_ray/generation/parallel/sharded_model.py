"""A model that lies on several ranks: this process, which has the engine, and its workers."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from llama_ray.data.tokenizer import Tokenizer
from llama_ray.generation.backend import Backend
from llama_ray.generation.kv_cache import count_blocks
from llama_ray.generation.parallel.division import check_ranks, rank_device, share
from llama_ray.generation.parallel.ranks import Ranks
from llama_ray.generation.parallel.runner import TensorParallelRunner
from llama_ray.generation.parallel.worker import prepare_share
from llama_ray.generation.parallel.workers import Workers, checked
from llama_ray.generation.quantize import Quantization
from llama_ray.generation.runner import RunnerError
from llama_ray.model.checkpoint import load_config
from llama_ray.pretrained import load_pretrained


class ShardedModel:
    """A model that is loaded on several ranks: this process is rank 0, the others are `workers`.

    `directory` is a checkpoint; each rank reads its share of it, no more. Raises ValueError for a checkpoint that
    cannot be read, or not be divided so, and RunnerError where a worker fails to start.
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
        kind = torch.device(device).type
        config = load_config(directory)
        check_ranks(config, size, torch.device(device))
        self.backend: Backend
        self.tokenizer: Tokenizer | None
        self.size = size
        self._workers = Workers(size)
        try:
            form = (quantization, batch_invariant)
            self._workers.ask("load", directory, dtype, kind, *form)
            first = rank_device(kind, 0)
            model, self.tokenizer = load_pretrained(directory, dtype, first, share(0, size))
            self.backend = prepare_share(model, *form, 0, size)
            self.weight_bytes = self.backend.weight_bytes + sum(checked(self._workers.answers()))
            with tempfile.TemporaryDirectory() as meeting_place:
                self._workers.ask("connect", meeting_place)
                self._ranks = Ranks(meeting_place, 0, size, first)
                checked(self._workers.answers())
            self._workers.connect(self._ranks)
        except RunnerError as e:
            raise self._workers.lost(str(e)) from e
        except BaseException:
            self._workers.close()
            raise

    def count_blocks(
        self, bytes_per_block: int, max_num_seqs: int, max_seq_len: int, memory_bytes: int | None
    ) -> int:
        """`kv_cache.count_blocks` of the rank with the least room; `bytes_per_block` are those of rank 0."""
        limits = (max_num_seqs, max_seq_len)
        backend = self.backend
        own = count_blocks(
            bytes_per_block, backend.block_size, *limits, backend.device, memory_bytes, self.size
        )
        others: list[int] = self._workers.call("count_blocks", *limits, memory_bytes)
        return min(own, *others)

    def runner(self, blocks: int) -> TensorParallelRunner:
        """Caches of so many blocks on all ranks, and what runs steps on them."""
        self._workers.ask("reserve", blocks)
        runner = TensorParallelRunner(self.backend, blocks, self._ranks, self._workers)
        checked(self._workers.answers())
        return runner

    def close(self) -> None:
        """End the workers."""
        self._workers.close()
