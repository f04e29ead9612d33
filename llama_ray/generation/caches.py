"""Divides memory into KV blocks for a model and its proposer, and makes the runner that uses them."""

from __future__ import annotations

from dataclasses import dataclass

from llama_ray.generation.backends.backend import Backend
from llama_ray.generation.backends.kv_cache import count_blocks
from llama_ray.generation.backends.runner import Runner
from llama_ray.generation.parallel.sharded_model import ShardedModel
from llama_ray.generation.speculation.proposer import Proposer


@dataclass(frozen=True)
class Caches:
    """A model's runner, the number of blocks in its cache, and the bytes of all caches on all ranks."""

    runner: Runner
    num_blocks: int
    nbytes: int


def make_caches(
    backend: Backend,
    proposer: Proposer | None,
    sharded: ShardedModel | None,
    max_num_seqs: int,
    max_seq_len: int,
    memory_bytes: int | None,
) -> Caches:
    """Allocate the caches. Raises ValueError if one sequence does not fit or the proposer does not suit the model."""
    limits = (max_num_seqs, max_seq_len)
    per_block = backend.block_bytes
    if proposer is not None:
        proposer.check(backend.model.config.vocab_size, max_seq_len)
        per_block += proposer.block_bytes
    if sharded is None:
        blocks = count_blocks(per_block, backend.block_size, *limits, backend.device, memory_bytes)
        runner, other_ranks = backend.make_runner(blocks, *limits), 0
    else:
        blocks = sharded.count_blocks(per_block, *limits, memory_bytes)
        runner, other_ranks = sharded.runner(blocks), sharded.size - 1
    if proposer is not None:
        proposer.reserve(blocks, *limits)
    return Caches(runner, blocks, blocks * (per_block + other_ranks * backend.block_bytes))
