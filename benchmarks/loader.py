"""The loader on a large corpus: how soon it starts, how fast it reads, whether its memory grows.

    python benchmarks/loader.py --tokens 5e9 --directory /tmp/corpus      # 10 GB of uint16, written for real

Read twice: after the kernel was asked to drop the files from its cache, and again with what is cached by then. The
loader reads on the training thread, so what it needs for a batch is lost to training: `eats` is what the model takes.
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

from llama_ray.data.loader import Loader, TokenDataset
from llama_ray.data.shards import DatasetInfo, Shard, shard_name, write_info, write_shard

SHARD_TOKENS = 250_000_000
PIECE_TOKENS = 8_000_000


def main(
    directory: str = "loader-benchmark",
    tokens: float = 5e9,
    seq_len: int = 256,
    batch_size: int = 8,
    batches: int = 4000,
    eats: float = 1500.0,
) -> None:
    """Write `tokens` to `directory` where they are not there yet, then read shuffled batches of them.

    Args:
        directory: Where the corpus lies or is made; it stays there.
        tokens: Size of the corpus.
        seq_len: Tokens per sequence.
        batch_size: Sequences per batch.
        batches: How many to read.
        eats: Tokens/s that the model takes.
    """
    path = Path(directory)
    if not (path / "dataset.json").exists():
        write_corpus(path, int(tokens))
    for shard in path.glob("*.bin"):
        with shard.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    start = time.perf_counter()
    loader = Loader(
        TokenDataset(path, "train"), seq_len=seq_len, batch_size=batch_size, rank=0, world_size=1, seed=0
    )
    loader.next_global_batch()
    print(
        f"{len(TokenDataset(path, 'train')):,} tokens: first batch after {time.perf_counter() - start:.3f} s"
    )
    for name in ("cold", "again"):
        loader = Loader(
            TokenDataset(path, "train"), seq_len=seq_len, batch_size=batch_size, rank=0, world_size=1, seed=0
        )
        loader.next_global_batch()
        before, start = own_memory(), time.perf_counter()
        for _ in range(batches):
            loader.next_global_batch()
        rate = batches * batch_size * seq_len / (time.perf_counter() - start)
        grown = (own_memory() - before) / 2**20
        print(
            f"{name}: {rate:,.0f} tok/s, {rate / eats:,.0f} times what the model eats, memory {grown:+.1f} MiB"
        )


def own_memory() -> int:
    """Bytes of this process that are not pages of mapped files."""
    info = psutil.Process().memory_info()
    return int(info.rss - info.shared)


def write_corpus(directory: Path, tokens: int) -> None:
    """Random ids; every piece is different, so that no file system can share them."""
    directory.mkdir(parents=True, exist_ok=True)
    piece = np.random.default_rng(0).integers(0, 32000, PIECE_TOKENS, dtype=np.uint16)

    def pieces(count: int, shard: int) -> Iterator[npt.NDArray[np.uint16]]:
        for i in range(0, count, PIECE_TOKENS):
            yield (piece ^ np.uint16((shard * 131 + i // PIECE_TOKENS) % 32768))[: count - i]

    shards = []
    for number, first in enumerate(range(0, tokens, SHARD_TOKENS)):
        name = shard_name("train", number)
        count = write_shard(directory / name, pieces(min(SHARD_TOKENS, tokens - first), number), 2)
        shards.append(Shard(name, count, 1))
    splits: dict[str, tuple[Shard, ...]] = {"train": tuple(shards), "validation": ()}
    info = DatasetInfo("random", 0, "random", 32768, "random", 2, splits)
    write_info(directory, info)


if __name__ == "__main__":
    auto_cli(main)
