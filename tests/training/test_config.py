from __future__ import annotations

from typing import Any

import pytest

from llama_ray.training.config import TrainConfig
from tests.training.helpers import schedule_of


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0; it must be at least 1"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0; it must be above 0"),
        ({"precision": "fp4"}, "precision is 'fp4'; choose bf16, fp16, fp32 or fp8"),
        ({"beta2": 1.5}, "beta2 is 1.5; it must be at least 0 and below 1"),
        ({"max_steps": 0}, "max_steps is 0; it must be at least 1"),
        ({"schedule": "step"}, "schedule is 'step'; choose cosine, linear or wsd"),
        ({"decay_fraction": 1.1}, "decay_fraction is 1.1; it must be at least 0 and at most 1"),
        ({"tensor_parallel": 0}, "tensor_parallel is 0; it must be at least 1"),
        ({"fsdp_size": 2}, "fsdp_size is 2; it must be 0 with parallelism auto; drop it or choose hsdp"),
    ],
)
def test_a_value_that_cannot_work_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**values)


def test_an_epoch_is_the_default_length_and_period() -> None:
    schedule = schedule_of(TrainConfig(epochs=3))
    assert (schedule.total_steps, schedule.warmup_steps) == (120, 12)
    assert [s for s in range(1, 121) if schedule.saves(s)] == [40, 80, 120]


def test_max_steps_overrides_epochs_and_the_last_step_validates() -> None:
    shorter = schedule_of(TrainConfig(epochs=3, max_steps=50, validate_every=20))
    assert [s for s in range(1, 51) if shorter.validates(s)] == [20, 40, 50]


def test_the_first_and_the_last_step_are_logged() -> None:
    schedule = schedule_of(TrainConfig(max_steps=25, log_every=10))
    assert [s for s in range(1, 26) if schedule.logs(s)] == [1, 10, 20, 25]
