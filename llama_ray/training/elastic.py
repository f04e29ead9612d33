"""The same global batch for any number of workers."""

from __future__ import annotations

from dataclasses import replace

from llama_ray.training.config import TrainConfig


def for_workers(config: TrainConfig, workers: int, planned: int) -> TrainConfig:
    """`config`, meant for `planned` workers that each take batches of their own, for `workers` of them.

    The global batch of `batch_size x gradient_accumulation_steps x planned` sequences stays; the micro-steps are
    recomputed, and the batch of one becomes smaller where it must. Raises ValueError where it cannot be shared.
    """
    total = config.batch_size * config.gradient_accumulation_steps * planned
    if total % workers:
        raise ValueError(
            f"the global batch of {total} sequences cannot be shared by {workers} workers; "
            f"{_that_work(total, 1, planned)}"
        )
    share = total // workers
    batch_size = max(n for n in range(1, min(config.batch_size, share) + 1) if share % n == 0)
    return replace(config, batch_size=batch_size, gradient_accumulation_steps=share // batch_size)


def check_range(config: TrainConfig, least: int, most: int, layer_workers: int = 1) -> None:
    """Raise ValueError unless every number of workers between `least` and `most` can share the global batch.

    `layer_workers` (tensor parallelism) take the same batches, so a number must also be a multiple of theirs.
    """
    total = config.batch_size * config.gradient_accumulation_steps * (most // layer_workers)
    bad = [n for n in range(least, most + 1) if n % layer_workers or total % (n // layer_workers)]
    if bad:
        raise ValueError(
            f"world_size {least}..{most} includes {', '.join(map(str, bad))}, which cannot share the global batch of "
            f"{total} sequences; {_that_work(total, least, most, layer_workers)}: give one of these, a smaller "
            "range, or another batch_size"
        )


def _that_work(total: int, least: int, most: int, layer_workers: int = 1) -> str:
    good = [n for n in range(least, most + 1) if n % layer_workers == 0 and total % (n // layer_workers) == 0]
    return f"{', '.join(map(str, good))} would work" if good else "no number in the range would work"
