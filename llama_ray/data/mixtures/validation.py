"""The batches of a validation."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from llama_ray.data.dataset.batch import Batch
from llama_ray.data.mixtures.mixture import Mixture
from llama_ray.utils.integers import ceil_div


def validation_batches(
    mixture: Mixture,
    seq_len: int,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    max_batches: int | None = None,
) -> Iterator[Batch]:
    """Return this rank's batches of every source's validation split, in order.

    `max_batches` (None: all) are divided evenly among the sources. Together the ranks see the same samples whatever
    their number. Ranks may get unequal numbers of batches, and the last batch of a source may be short, so a mean must
    be weighted by tokens. Raises ValueError if a split holds no sample.
    """
    limit = None if max_batches is None else ceil_div(max_batches, len(mixture.datasets))
    batches: list[tuple[int, int, int]] = []
    for source, (dataset, counted) in enumerate(
        zip(mixture.datasets.values(), mixture.sources(seq_len), strict=True)
    ):
        if counted.num_windows == 0:
            raise ValueError(
                f"the {dataset.split} split of {dataset.location} holds {len(dataset)} tokens; one sample of "
                f"{seq_len} needs {seq_len + 1}; use more data, a larger validation_fraction or a smaller max_seq_len"
            )
        firsts = range(0, counted.num_windows, batch_size)[:limit]
        batches += [(source, first, min(first + batch_size, counted.num_windows)) for first in firsts]
    return (
        mixture.windows(np.full(end - first, source), np.arange(first, end, dtype=np.int64), seq_len)
        for source, first, end in batches[rank::world_size]
    )
