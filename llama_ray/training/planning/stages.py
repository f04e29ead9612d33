"""The stages of a run, each with the plan of its steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest

from llama_ray.data.mixtures.loader import Loader
from llama_ray.data.mixtures.opening import open_mixture
from llama_ray.data.mixtures.sources import DataSource
from llama_ray.data.mixtures.stages import Segment, segments, share_of_worker
from llama_ray.training.config import Schedule
from llama_ray.training.planning.plan import Plan
from llama_ray.training.preflight import check_steps


@dataclass(frozen=True)
class StagePlan:
    """The steps of a run from `segment.from_step` on: `steps` of them, or None where their number is not known."""

    segment: Segment
    steps: int | None
    plan: Plan
    """Of these steps; the memory is that of the whole run."""

    @property
    def tokens(self) -> int | None:
        """Tokens of the stage."""
        return None if self.steps is None else self.steps * self.plan.tokens_per_step

    @property
    def days(self) -> float | None:
        """Days that the stage takes."""
        return None if self.steps is None else self.steps * self.plan.step_s / 86400


def plan_stages(plan: Plan, sources: Sequence[DataSource] = ()) -> list[StagePlan]:
    """Return the stages of the planned run up to its `max_steps`, or with `sources` to the end of its epochs.

    The trace of the plan holds for all: a micro-batch never has more tokens than `batch_size` longest sequences. Raises
    ValueError for stages that do not fit, and with `sources` for steps and repetitions that `check_steps` refuses.
    """
    last = plan.config.max_steps
    if sources:
        loader = _loader(plan, sources)
        schedule = Schedule.of(plan.config, loader.timetable, loader.windows_per_epoch)
        check_steps(loader, schedule, plan.config, sources)
        found, last = list(loader.timetable.ahead(schedule.total_steps)), schedule.total_steps
    else:
        found = _segments(plan)
    found = [segment for segment in found if last is None or segment.from_step <= last]
    return [
        StagePlan(now, _steps(now, following, last), _plan_of(plan, now))
        for now, following in zip_longest(found, found[1:])
    ]


def _steps(now: Segment, following: Segment | None, last: int | None) -> int | None:
    if following is not None:
        return following.from_step - now.from_step
    return None if last is None else last + 1 - now.from_step


def _loader(plan: Plan, sources: Sequence[DataSource]) -> Loader:
    return Loader(
        open_mixture(sources, "train"),
        seq_len=plan.seq_len,
        batch_size=plan.config.batch_size,
        rank=0,
        world_size=plan.layout.data_world,
        gradient_accumulation_steps=plan.micro_steps,
        seed=plan.config.seed,
        stages=plan.config.stages,
    )


def _segments(plan: Plan) -> list[Segment]:
    windows = plan.config.batch_size * plan.micro_steps * plan.layout.data_world
    names = {name for stage in plan.config.stages for name in stage.weights or {}}
    return segments(Segment(1, windows, plan.seq_len, {}), plan.config.stages, names)


def _plan_of(plan: Plan, segment: Segment) -> Plan:
    workers = plan.layout.data_world
    micro_batch, micro_steps = share_of_worker(segment, plan.seq_len, plan.config.batch_size, workers)
    config = replace(
        plan.config,
        seq_len=segment.seq_len,
        batch_size=micro_batch,
        gradient_accumulation_steps=micro_steps,
        tensor_parallel=plan.layout.tensor,
        stages=(),
    )
    return replace(plan, config=config)
