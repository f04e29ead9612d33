"""Samples to batches, shuffled by (seed, epoch) and divided among ranks; the position is a small state."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypedDict

import numpy as np

from llama_ray.data.dataset.batch import Batch
from llama_ray.data.dataset.token_dataset import TokenDataset
from llama_ray.data.mixtures.permutation import Permutation
from llama_ray.utils.integers import ceil_div


class Position(TypedDict):
    """A position in the data, as a checkpoint keeps it: what was trained on, and how far."""

    epoch: int
    global_batch: int
    """Global batches of the epoch that were taken, of `global_batch_size` samples each."""
    global_batch_size: int
    num_samples: int
    seq_len: int
    seed: int
    data: str
    """See `TokenDataset.fingerprint`."""


class Loader:
    """The batches of one rank, epoch after epoch.

    The order of an epoch's samples depends on (seed, epoch) only. Global batch `g` takes the positions
    `[g * size, (g + 1) * size)` of that order, where `size = batch_size * world_size * gradient_accumulation_steps`;
    micro-step `m` of rank `r` takes block `m * world_size + r` of them. So the global batches hold the same samples
    however `size` is divided among ranks and micro-steps. The remaining samples at the end of an epoch, too few for a
    global batch, are dropped; which ones differs from epoch to epoch.
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
        """Start at the first global batch; `batch_size` is the number of sequences per rank and micro-step.

        Raises ValueError for an impossible argument, and for data of less than one global batch.
        """
        for name, value in (
            ("batch_size", batch_size),
            ("world_size", world_size),
            ("gradient_accumulation_steps", gradient_accumulation_steps),
        ):
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank is {rank}; it must be between 0 and {world_size - 1}")
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
                f"tokens); one step takes {self.global_batch_size} (batch_size {batch_size} x world_size "
                f"{world_size} x gradient_accumulation_steps {gradient_accumulation_steps}); use more data, or "
                "lower one of these or max_seq_len"
            )
        self._epoch = 0
        self._global_batch = 0
        self._order = Permutation(self.num_samples, seed, self._epoch)

    @property
    def epoch(self) -> int:
        """Number of the epoch that the next global batch belongs to, from 0."""
        return self._epoch + (self._global_batch == self.batches_per_epoch)

    def next_global_batch(self) -> list[Batch]:
        """Return this rank's part of the next global batch, one entry a micro-step, across the ends of epochs."""
        if self._global_batch == self.batches_per_epoch:
            self._start(self._epoch + 1, 0)
        micro_batches = []
        for micro_step in range(self._micro_steps):
            block = micro_step * self._world_size + self._rank
            first = self._global_batch * self.global_batch_size + block * self._batch_size
            positions = np.arange(first, first + self._batch_size, dtype=np.uint64)
            micro_batches.append(self._dataset.samples(self._order(positions), self._seq_len))
        self._global_batch += 1
        return micro_batches

    @property
    def steps(self) -> int:
        """Global batches of today's size from the beginning of the first epoch to this position."""
        return self._epoch * self.batches_per_epoch + self._global_batch

    def state_dict(self) -> Position:
        """Return the position, equal on all ranks, to save in a checkpoint."""
        return {
            "epoch": self._epoch,
            "global_batch": self._global_batch,
            "global_batch_size": self.global_batch_size,
            "num_samples": self.num_samples,
            "seq_len": self._seq_len,
            "seed": self._seed,
            "data": self._dataset.fingerprint,
        }

    def load_state_dict(self, state: Position, *, allow_other_data: bool = False) -> bool:
        """Continue at the position `state`; return whether it is one in this data.

        With another global batch size, for example on another number of workers, continue at the first whole global
        batch after that position. Other data, another seq_len and another seed have other samples or another order:
        they raise ValueError, but with `allow_other_data` the position stays at the beginning.
        """
        mine = self.state_dict()
        for name in ("data", "seed", "seq_len", "num_samples"):
            # Positions saved by earlier versions lack some.
            if state.get(name, mine[name]) == mine[name]:
                continue
            if allow_other_data:
                return False
            raise ValueError(
                f"the checkpoint was trained with {name} {str(state[name])[:12]}; this run has {str(mine[name])[:12]} "
                f"({self._dataset.directory}); resume with the same data, seq_len and seed, give --allow_other_data "
                "to begin a first epoch of these, or start a new run"
            )
        seen = state["global_batch"] * state["global_batch_size"]
        self._start(state["epoch"], min(ceil_div(seen, self.global_batch_size), self.batches_per_epoch))
        return True

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
    """Return this rank's batches among the split's first `max_batches` (None: all), in order.

    Together the ranks see the same samples whatever their number. Ranks may get unequal numbers of batches, and the
    last batch may be short, so a mean must be weighted by tokens. Raises ValueError if the split holds no sample.
    """
    num_samples = dataset.num_samples(seq_len)
    if num_samples == 0:
        raise ValueError(
            f"the {dataset.split} split holds {len(dataset)} tokens; one sample of {seq_len} needs {seq_len + 1}; "
            "use more data, a larger validation_fraction or a smaller max_seq_len"
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
