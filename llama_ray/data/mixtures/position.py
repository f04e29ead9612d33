"""A position in the data, as a checkpoint keeps it, and whether a run may go on from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypedDict

from llama_ray.data.mixtures.stages import Segment
from llama_ray.data.mixtures.weights import WHOLE

WAYS_OUT = "give --allow_other_data to begin a first epoch of this data, or start a new run"


class SourceState(TypedDict):
    """A source that was trained on."""

    data: str
    """See `TokenDataset.fingerprint`."""
    windows: int


class StageState(TypedDict):
    """A stage that has begun, with the position at which it did."""

    from_step: int
    position: int
    seq_len: int
    shares: dict[str, int]


class Position(TypedDict):
    """What was trained on, and how far: `position` windows in `step` steps."""

    step: int
    position: int
    windows_per_step: int
    """In the last step."""
    seq_len: int
    """Of the windows: the longest of the run."""
    seed: int
    sources: dict[str, SourceState]
    stages: list[StageState]


def difference(before: Position, now: Position, ahead: Sequence[Segment]) -> str | None:
    """Return why a run that is `now` at its beginning cannot go on at `before`, in one line; None if it can.

    `ahead` are the segments of the run's plan. Behind the position they, the sources, the length of a window and the
    seed must be what they were; ahead of it they may be any.
    """
    if "stages" not in before:
        return f"the checkpoint has its position in the data from an earlier version; {WAYS_OUT}"
    if before["seed"] != now["seed"]:
        return _changed("seed", before["seed"], now["seed"])
    if before["seq_len"] != now["seq_len"]:
        return _changed("seq_len", before["seq_len"], now["seq_len"])
    used = sorted({name for stage in before["stages"] for name in stage["shares"]})
    return _changed_source(used, before, now) or _changed_stage(before, ahead)


def _changed_source(used: Sequence[str], before: Position, now: Position) -> str | None:
    for name in used:
        if name not in now["sources"]:
            return (
                f"the checkpoint was trained on source {name}, which is not in --data "
                f"({', '.join(now['sources'])}); name it there, with weight 0 if it is to be used no longer, or "
                f"{WAYS_OUT}"
            )
        there, here = before["sources"][name], now["sources"][name]
        what = "data" if len(now["sources"]) == 1 else f"data of source {name}"
        if there["data"] != here["data"]:
            return _changed(what, there["data"][:12], here["data"][:12])
        if there["windows"] != here["windows"]:
            return _changed(f"{what} in windows:", there["windows"], here["windows"])
    return None


def _changed_stage(before: Position, ahead: Sequence[Segment]) -> str | None:
    step = before["step"]
    begun = [segment for segment in ahead if segment.from_step <= step]
    for stage, segment in zip(before["stages"], begun, strict=False):
        there = _described(stage["from_step"], stage["seq_len"], stage["shares"])
        here = _described(segment.from_step, segment.seq_len, segment.shares)
        if there != here or stage["shares"] != segment.shares:
            return (
                f"up to step {step} the checkpoint was trained with a stage {there}; this run has one {here}; leave "
                f"stages as they were that have begun, and add one from step {step + 1} on, or {WAYS_OUT}"
            )
    if len(begun) != len(before["stages"]):
        more = begun[len(before["stages"]) :] or before["stages"][len(begun) :]
        first = more[0]
        from_step = first.from_step if isinstance(first, Segment) else first["from_step"]
        who = "this run has" if isinstance(first, Segment) else "the checkpoint was trained with"
        return (
            f"only {who} a stage from step {from_step}, which is behind step {step} of the checkpoint; leave stages as "
            f"they were that have begun, and add one from step {step + 1} on, or {WAYS_OUT}"
        )
    return None


def _described(from_step: int, seq_len: int, shares: Mapping[str, int]) -> str:
    parts = ", ".join(f"{name} {share / WHOLE:.6g}" for name, share in sorted(shares.items()))
    return f"from step {from_step} (seq_len {seq_len}, weights {parts})"


def _changed(name: str, before: object, now: object) -> str:
    return (
        f"the checkpoint was trained with {name} {before}; this run has {now}; resume with the same data, seq_len and "
        f"seed, {WAYS_OUT}"
    )
