"""Token shards to batches: shuffled by (seed, epoch), every rank its own slice, position as a small state."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from llama_ray.data.shards import DatasetError, open_shard, read_info
from llama_ray.utils.integers import ceil_div, splitmix64

Batch = tuple[torch.Tensor, torch.Tensor]
"""(inputs, targets), int64 [batch, seq_len] each; targets are the inputs moved on by one token."""


class TokenDataset:
    """One split of a prepared data directory, memory-mapped.

    A sample of ``seq_len`` is ``seq_len + 1`` consecutive tokens of one shard; samples overlap by the one
    token that is the last target of the first and the first input of the second. What is left at a shard's
    end is not used.
    """

    def __init__(self, directory: str | Path, split: str) -> None:
        """Raises DatasetError for a directory, split or shard that is missing or damaged."""
        self.directory = Path(directory)
        self.split = split
        self.info = read_info(directory)
        if split not in self.info.splits:
            raise DatasetError(f"{directory} has no split {split!r}, only {sorted(self.info.splits)}")
        self.vocab_size = self.info.vocab_size
        self._shards = []
        for shard in self.info.splits[split]:
            tokens = open_shard(self.directory / shard.file)
            if len(tokens) != shard.tokens:
                raise DatasetError(
                    f"{self.directory / shard.file} holds {len(tokens)} tokens, dataset.json says {shard.tokens}: "
                    "prepare the data again (--overwrite)"
                )
            self._shards.append(tokens)
        self._lengths = np.array([len(tokens) for tokens in self._shards] or [0], dtype=np.int64)

    def __len__(self) -> int:
        """Number of tokens."""
        return self.info.tokens(self.split)

    def num_samples(self, seq_len: int) -> int:
        """How many samples of ``seq_len`` tokens the split holds."""
        return int(self._ends(seq_len)[-1])

    def samples(self, indices: npt.NDArray[np.int64], seq_len: int) -> Batch:
        """The samples ``indices`` as one batch."""
        ends = self._ends(seq_len)
        shards = np.searchsorted(ends, indices, side="right")
        rows = np.empty((len(indices), seq_len + 1), dtype=np.int64)
        for row, (shard, index) in enumerate(zip(shards, indices, strict=True)):
            before = ends[shard - 1] if shard else 0
            start = int(index - before) * seq_len
            rows[row] = self._shards[shard][start : start + seq_len + 1]
        tokens = torch.from_numpy(rows)
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def _ends(self, seq_len: int) -> npt.NDArray[np.int64]:
        """For each shard the number of samples up to its end."""
        if seq_len < 1:
            raise ValueError(f"seq_len is {seq_len}, must be at least 1")
        return np.cumsum(np.maximum(self._lengths - 1, 0) // seq_len)


class Loader:
    """The batches of one rank, epoch after epoch.

    An epoch visits the samples in an order that (seed, epoch) alone decide. Global batch ``g`` takes places
    ``[g * size, (g + 1) * size)`` of that order with ``size = batch_size * world_size *
    gradient_accumulation_steps``; micro-step ``m`` of rank ``r`` takes block ``m * world_size + r`` of it.
    So the global batches hold the same samples however ``size`` is split between ranks and micro-steps. The
    samples at the end of an epoch that fill no global batch are dropped; other ones each epoch.
    """

    def __init__(
        self,
        dataset: TokenDataset,
        *,
        seq_len: int,
        batch_size: int,
        rank: int,
        world_size: int,
        seed: int,
        gradient_accumulation_steps: int = 1,
    ) -> None:
        """``batch_size`` counts sequences per rank and micro-step.

        Raises ValueError where the data holds less than one global batch.
        """
        for name, value in (
            ("batch_size", batch_size),
            ("world_size", world_size),
            ("gradient_accumulation_steps", gradient_accumulation_steps),
        ):
            if value < 1:
                raise ValueError(f"{name} is {value}, must be at least 1")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank is {rank}, must be between 0 and {world_size - 1}")
        self._dataset = dataset
        self._seq_len = seq_len
        self._batch_size = batch_size
        self._rank = rank
        self._world_size = world_size
        self._micro_steps = gradient_accumulation_steps
        self._seed = seed
        self.global_batch_size = batch_size * world_size * gradient_accumulation_steps
        self.num_samples = dataset.num_samples(seq_len)
        self.batches_per_epoch = self.num_samples // self.global_batch_size
        if self.batches_per_epoch == 0:
            raise ValueError(
                f"the {dataset.split} split holds {self.num_samples} samples of {seq_len} tokens ({len(dataset)} "
                f"tokens), but one step takes {self.global_batch_size} (batch_size {batch_size} x world_size "
                f"{world_size} x gradient_accumulation_steps {gradient_accumulation_steps}): use more data, or "
                "lower one of these or max_seq_len"
            )
        self._epoch = 0
        self._global_batch = 0
        self._order = Permutation(self.num_samples, seed, self._epoch)

    @property
    def epoch(self) -> int:
        """The epoch, from 0, that the next global batch belongs to."""
        return self._epoch + (self._global_batch == self.batches_per_epoch)

    def next_global_batch(self) -> list[Batch]:
        """The rank's part of the next global batch, one entry a micro-step; epochs follow by themselves."""
        if self._global_batch == self.batches_per_epoch:
            self._start(self._epoch + 1, 0)
        micro_batches = []
        for micro_step in range(self._micro_steps):
            block = micro_step * self._world_size + self._rank
            first = self._global_batch * self.global_batch_size + block * self._batch_size
            places = np.arange(first, first + self._batch_size, dtype=np.uint64)
            micro_batches.append(self._dataset.samples(self._order(places), self._seq_len))
        self._global_batch += 1
        return micro_batches

    def state_dict(self) -> dict[str, int]:
        """The position: the same on all ranks, to be saved with the model."""
        return {
            "epoch": self._epoch,
            "global_batch": self._global_batch,
            "global_batch_size": self.global_batch_size,
            "num_samples": self.num_samples,
            "seed": self._seed,
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes on where ``state`` was taken.

        With another global batch size (a changed number of workers, say) it goes on at the first whole
        global batch behind that place. Another seed or other data would mean another order: ValueError.
        """
        for name, mine in (("seed", self._seed), ("num_samples", self.num_samples)):
            if state[name] != mine:
                raise ValueError(
                    f"the saved data position has {name} {state[name]}, this run has {mine}: resume with the same "
                    "data, max_seq_len and seed, or start a new run"
                )
        seen = state["global_batch"] * state["global_batch_size"]
        self._start(state["epoch"], min(ceil_div(seen, self.global_batch_size), self.batches_per_epoch))

    def _start(self, epoch: int, global_batch: int) -> None:
        if epoch != self._epoch:
            self._order = Permutation(self.num_samples, self._seed, epoch)
        self._epoch, self._global_batch = epoch, global_batch


def validation_batches(
    dataset: TokenDataset,
    seq_len: int,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    max_batches: int | None = None,
) -> Iterator[Batch]:
    """The rank's batches among the first ``max_batches`` (over all ranks; None: all), in order.

    Together the ranks see the same samples whatever their number. They may get unequal numbers of batches,
    and the last batch may be short, so weight a mean by tokens. Raises ValueError where the split holds no
    sample.
    """
    num_samples = dataset.num_samples(seq_len)
    if num_samples == 0:
        raise ValueError(
            f"the {dataset.split} split holds {len(dataset)} tokens, too few for one sample of {seq_len}: use more "
            "data, a larger validation_fraction or a smaller max_seq_len"
        )
    batches = ceil_div(num_samples, batch_size)
    if max_batches is not None:
        batches = min(batches, max_batches)
    return (
        dataset.samples(
            np.arange(batch * batch_size, min((batch + 1) * batch_size, num_samples), dtype=np.int64), seq_len
        )
        for batch in range(rank, batches, world_size)
    )


class Permutation:
    """A pseudo-random order of ``range(size)`` that takes no memory, whatever the size.

    A Feistel network (Luby and Rackoff, "How to construct pseudorandom permutations", 1988) permutes the
    next power of four; places that land outside ``size`` are sent through it again until they land inside
    (cycle walking: Black and Rogaway, "Ciphers with arbitrary finite domains", 2002), fewer than four times
    on average.
    """

    # Four rounds suffice for a strong round function and a large domain; small ones mix better with more.
    ROUNDS = 8

    def __init__(self, size: int, seed: int, epoch: int) -> None:
        if seed < 0:
            raise ValueError(f"seed is {seed}, must not be negative")
        self.size = size
        half = max((size - 1).bit_length() + 1, 2) // 2
        self._half = np.uint64(half)
        self._mask = np.uint64(2**half - 1)
        self._keys = np.random.SeedSequence([seed, epoch]).generate_state(self.ROUNDS, np.uint64)

    def __call__(self, places: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
        """The elements at ``places`` of the order; places lie in ``[0, size)``."""
        values = self._network(places.astype(np.uint64))
        outside = values >= self.size
        while outside.any():
            values[outside] = self._network(values[outside])
            outside = values >= self.size
        return values.astype(np.int64)

    def _network(self, values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        left, right = values >> self._half, values & self._mask
        for key in self._keys:
            left, right = right, left ^ (splitmix64(right + key) & self._mask)
        return (left << self._half) | right
