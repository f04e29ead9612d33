"""The loader on a large mixture: seconds to the first batch, tokens/s, growth of memory.

    python benchmarks/loader.py --tokens 5e9 --directory /tmp/corpus

Needs 10 GB of disk, which is written once, and a few minutes. The corpus is read twice: after the kernel was asked to
drop its files from the page cache, and again, each time on the thread that asks. In training another thread reads
ahead. The output compares the rate with the model's (`model_tokens_per_s`).
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import psutil
from jsonargparse import auto_cli

from llama_ray.data.dataset.info import DatasetInfo, SourceInfo, TokenizerInfo, write_info
from llama_ray.data.dataset.shards import Shard, ShardWriter, shard_name
from llama_ray.data.mixtures.loader import Loader
from llama_ray.data.mixtures.opening import open_mixture
from llama_ray.data.mixtures.sources import DataSource

SHARD_TOKENS = 250_000_000
CHUNK_TOKENS = 8_000_000
DOCUMENT_TOKENS = 1000


def main(
    directory: str = "loader-benchmark",
    tokens: float = 5e9,
    sources: int = 5,
    seq_len: int = 256,
    batch_size: int = 8,
    batches: int = 4000,
    documents: bool = True,
    model_tokens_per_s: float = 1500.0,
) -> None:
    """Write a corpus to `directory` unless it holds one, then read shuffled batches of it.

    Args:
        directory: The corpus, which is kept.
        tokens: Tokens of the corpus.
        sources: Sources of the same size, whose weights are 1, 2, 3 and so on.
        seq_len: Tokens per sequence.
        batch_size: Sequences per batch.
        batches: Batches to read.
        documents: Whether batches say where their documents begin, as training with document masks asks.
        model_tokens_per_s: Rate at which the model trains, to compare with.
    """
    path = Path(directory)
    data = [DataSource(f"source{n}", str(path / f"source{n}"), float(n)) for n in range(1, sources + 1)]
    for n, source in enumerate(data):
        if not Path(source.location, "dataset.json").exists():
            write_corpus(Path(source.location), int(tokens) // sources, n)
    for shard in path.glob("*/*.bin"):
        with shard.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def new_loader() -> Loader:
        mixture = open_mixture(data, "train", documents=documents)
        return Loader(mixture, seq_len=seq_len, batch_size=batch_size, rank=0, world_size=1, seed=0)

    start = time.perf_counter()
    loader = new_loader()
    loader.next_global_batch()
    taken = time.perf_counter() - start
    size = sum(map(len, loader.mixture.datasets.values()))
    print(f"{size:,} tokens in {sources} sources: first batch after {taken:.3f} s")
    for name in ("cold", "again"):
        loader = new_loader()
        loader.next_global_batch()
        before, start = own_memory(), time.perf_counter()
        for _ in range(batches):
            loader.next_global_batch()
        rate = batches * batch_size * seq_len / (time.perf_counter() - start)
        grown = (own_memory() - before) / 2**20
        print(
            f"{name}: {rate:,.0f} tok/s, {rate / model_tokens_per_s:,.0f} times the model's, memory {grown:+.1f} MiB"
        )


def own_memory() -> int:
    """Return the bytes of this process that are not pages of mapped files."""
    info = psutil.Process().memory_info()
    return int(info.rss - info.shared)


def write_corpus(directory: Path, tokens: int, seed: int) -> None:
    """Write documents of random ids; every chunk is different, so that the file system cannot deduplicate them."""
    directory.mkdir(parents=True, exist_ok=True)
    chunk = np.random.default_rng(seed).integers(0, 32000, CHUNK_TOKENS, dtype=np.uint16)

    def chunks(count: int, shard: int) -> Iterator[npt.NDArray[np.uint16]]:
        for i in range(0, count, CHUNK_TOKENS):
            yield (chunk ^ np.uint16((shard * 131 + i // CHUNK_TOKENS) % 32768))[: count - i]

    shards: list[Shard] = []
    for number, first in enumerate(range(0, tokens, SHARD_TOKENS)):
        with ShardWriter(directory / shard_name("train", number), 2, source="random") as writer:
            for ids in chunks(min(SHARD_TOKENS, tokens - first), number):
                lengths = np.full(len(ids) // DOCUMENT_TOKENS, DOCUMENT_TOKENS)
                writer.add(ids[: lengths.sum()], lengths)
        assert writer.shard is not None
        shards.append(writer.shard)
    info = DatasetInfo(
        fingerprint="random",
        seed=0,
        token_bytes=2,
        tokenizer=TokenizerInfo("random", 32768),
        sources=(SourceInfo("random", "benchmarks/loader.py"),),
        splits={"train": tuple(shards), "validation": ()},
    )
    write_info(directory, info)


if __name__ == "__main__":
    auto_cli(main)
