"""Stages of a run: shares of the sources, length of sequences and size of a step, from given steps on."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from llama_ray.data.mixtures.weights import shares
from llama_ray.utils.fields import check_fields, limits


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What changes at a step of a run; what is left out stays as it was before.

    Args:
        from_step: The first step of the stage, counted from 1.
        weights: Weights of the sources, by name; a source that is left out is not used in this stage.
        seq_len: Tokens per sequence; it must divide the seq_len of the run, which is the longest.
        batch_tokens: Tokens of the global batch; a multiple of the seq_len of the run.
    """

    from_step: int = field(metadata=limits(1))
    weights: dict[str, float] | None = field(default=None, hash=False)
    seq_len: int | None = field(default=None, metadata=limits(1))
    batch_tokens: int | None = field(default=None, metadata=limits(1, 2**40))

    def __post_init__(self) -> None:
        check_fields(self, "stages.")
        if self.weights is not None:
            # Raises ValueError.
            shares(self.weights)

    def __str__(self) -> str:
        return f"the stage from step {self.from_step}"


@dataclass(frozen=True)
class Segment:
    """Steps from `from_step` on that are alike: each takes `windows` windows, cut into sequences of `seq_len` tokens.

    `shares` are those of the sources, see `weights.shares`.
    """

    from_step: int
    windows: int
    seq_len: int
    shares: Mapping[str, int]

    def sequences(self, window: int) -> int:
        """Return the sequences of a global batch of windows of `window` tokens."""
        return self.windows * (window // self.seq_len)


def segments(base: Segment, stages: Sequence[Stage], names: Collection[str]) -> list[Segment]:
    """Return the segments of a run that begins as `base`, whose sequences are whole windows; one for each stage.

    `names` are the sources that a stage may give weights. Raises ValueError, naming the stage, for one that does not
    come after the one before, for an unknown source, a seq_len that does not divide the window, and a batch of other
    than whole windows.
    """
    found = [base]
    for stage in stages:
        last = found[-1]
        if stage.from_step <= last.from_step and (stage is not stages[0] or stage.from_step < last.from_step):
            raise ValueError(
                f"{stage} comes after one from step {last.from_step}; write stages in the order of their steps"
            )
        found.append(
            Segment(
                stage.from_step,
                windows_of(stage, base.seq_len) or last.windows,
                _seq_len(stage, base.seq_len) or last.seq_len,
                _shares(stage, names) or last.shares,
            )
        )
    return found[1:] if stages and stages[0].from_step == base.from_step else found


def windows_of(stage: Stage, window: int) -> int | None:
    """Return the windows of `window` tokens that a step of `stage` takes; None if that does not change."""
    if stage.batch_tokens is None:
        return None
    if stage.batch_tokens % window:
        raise ValueError(
            f"{stage} has batch_tokens {stage.batch_tokens}; it must be a multiple of {window}, the seq_len of the run"
        )
    return stage.batch_tokens // window


def _seq_len(stage: Stage, window: int) -> int | None:
    if stage.seq_len is not None and window % stage.seq_len:
        raise ValueError(
            f"{stage} has seq_len {stage.seq_len}; it must divide {window}, the seq_len of the run"
        )
    return stage.seq_len


def _shares(stage: Stage, names: Collection[str]) -> dict[str, int] | None:
    if stage.weights is None:
        return None
    for name in stage.weights:
        if name not in names:
            raise ValueError(
                f"{stage} has a weight for {name!r}; the sources are {', '.join(sorted(names))}; correct the "
                "name, or give that source with --data"
            )
    return shares(stage.weights)


def share_of_worker(segment: Segment, window: int, batch_size: int, workers: int) -> tuple[int, int]:
    """Return (sequences of a micro-batch, micro-steps) of each of `workers` workers.

    A micro-batch has at most the tokens of `batch_size` windows. Raises ValueError if the workers cannot share the
    sequences of a step evenly.
    """
    sequences = segment.sequences(window)
    if sequences % workers:
        good = [str(n) for n in range(1, workers + 1) if sequences % n == 0]
        raise ValueError(
            f"the global batch of {sequences} sequences from step {segment.from_step} on cannot be shared by {workers} "
            f"workers; {', '.join(good[:20])} would work"
        )
    share = sequences // workers
    limit = batch_size * (window // segment.seq_len)
    micro_batch = max(n for n in range(1, min(limit, share) + 1) if share % n == 0)
    return micro_batch, share // micro_batch
