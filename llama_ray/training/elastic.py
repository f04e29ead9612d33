"""The same global batch for any number of workers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from llama_ray.data.mixtures.stages import Segment
from llama_ray.training.config import TrainConfig
from llama_ray.training.parallel.layout import Layout
from llama_ray.utils.integers import ceil_div

_LISTED = 20
"""Numbers of workers that a message lists."""


def for_workers(config: TrainConfig, workers: int, planned: int) -> TrainConfig:
    """Return `config`, which was written for `planned` data-parallel workers, for `workers` of them.

    The global batch stays `batch_size x gradient_accumulation_steps x planned` sequences. The number of micro-steps is
    recomputed, and `batch_size` becomes smaller if the share of a worker is not a multiple of it. Raises ValueError if
    `workers` does not divide the global batch. A limited validation keeps its number of sequences, up to one batch.
    """
    total = config.batch_size * config.gradient_accumulation_steps * planned
    if total % workers:
        raise ValueError(
            f"the global batch of {total} sequences cannot be shared by {workers} workers; "
            f"{_numbers_that_work(total, 1, planned)}"
        )
    share = total // workers
    batch_size = max(n for n in range(1, min(config.batch_size, share) + 1) if share % n == 0)
    return replace(
        config,
        batch_size=batch_size,
        gradient_accumulation_steps=share // batch_size,
        validation_batches=ceil_div(config.validation_batches * config.batch_size, batch_size),
    )


def for_layout(config: TrainConfig, layout: Layout) -> TrainConfig:
    """Return `config` for `layout`, which may have more tensor parallelism than asked for where `auto` picked it.

    The workers of a tensor-parallel group see the same data, so more micro-steps keep the global batch.
    """
    return for_workers(config, layout.data_world, layout.world_size // config.tensor_parallel)


def check_range(config: TrainConfig, least: int, most: int, tensor_parallel: int = 1) -> None:
    """Raise ValueError unless every number of workers from `least` to `most` can share the global batch.

    The `tensor_parallel` workers of a group take the same batches, so a number must also be a multiple of their number.
    """
    total = config.batch_size * config.gradient_accumulation_steps * (most // tensor_parallel)
    _check_total(f"the global batch of {total} sequences", total, least, most, tensor_parallel)


def check_segments(
    segments: Iterable[Segment], window: int, least: int, most: int, tensor_parallel: int = 1
) -> None:
    """Raise ValueError as `check_range` does, for steps whose windows of `window` tokens are cut into sequences."""
    for segment in segments:
        total = segment.sequences(window)
        name = f"the global batch of {total} sequences from step {segment.from_step} on"
        _check_total(name, total, least, most, tensor_parallel)


def _check_total(name: str, total: int, least: int, most: int, tensor_parallel: int) -> None:
    bad = [n for n in range(least, most + 1) if n % tensor_parallel or total % (n // tensor_parallel)]
    if bad:
        raise ValueError(
            f"world_size {least}..{most} includes {_listed(bad)}, which cannot share {name}; "
            f"{_numbers_that_work(total, least, most, tensor_parallel)}; give one of these, a "
            "smaller range, or another batch_size"
        )


def _numbers_that_work(total: int, least: int, most: int, tensor_parallel: int = 1) -> str:
    good = [
        n for n in range(least, most + 1) if n % tensor_parallel == 0 and total % (n // tensor_parallel) == 0
    ]
    return f"{_listed(good)} would work" if good else "no number in the range would work"


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:_LISTED])) + (", ..." if len(numbers) > _LISTED else "")
