"""Every number of every configuration: what it may be is declared, and nothing else passes, in any entry."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, get_args, get_type_hints

import pytest

from llama_ray.data.preparing.config import PrepareConfig
from llama_ray.evaluation.evaluate import EvaluationConfig
from llama_ray.exporting.averages import AverageConfig
from llama_ray.exporting.export import ExportConfig
from llama_ray.generation.options import EngineOptions
from llama_ray.model.config import PRESETS, LlamaConfig, RopeScaling
from llama_ray.model.lora_config import LoraConfig
from llama_ray.orchestration.launch import LaunchConfig
from llama_ray.training.config import TrainConfig
from llama_ray.training.planning.plan import Cluster

VALID: dict[type, dict[str, Any]] = {
    TrainConfig: {},
    LlamaConfig: PRESETS["llama-tiny"],
    RopeScaling: {"rope_type": "llama3", "factor": 8.0},
    LaunchConfig: {},
    LoraConfig: {"rank": 8, "alpha": 16.0},
    PrepareConfig: {"source": ["builtin"], "output": "data"},
    Cluster: {"gpus": 8, "gpu_memory_bytes": 80 * 2**30},
    EngineOptions: {},
    EvaluationConfig: {"text": ("builtin",)},
    ExportConfig: {"ref": "model", "to": "exported"},
    AverageConfig: {"refs": ("a", "b")},
}
"""Each configuration, and values for the fields without a default."""

ODD = [
    math.nan,
    math.inf,
    -math.inf,
    -1,
    -0.5,
    0,
    2**64,
    10**5000,
    float("1e400"),
    1e39,
    1e-46,
    True,
    "7",
    [1],
]


def numeric_fields() -> list[tuple[type, str, type]]:
    found = []
    for config in VALID:
        types = get_type_hints(config)
        for field in dataclasses.fields(config):
            kinds = [
                kind for kind in get_args(types[field.name]) or [types[field.name]] if kind in (int, float)
            ]
            found += [(config, field.name, kind) for kind in kinds]
    return found


@pytest.mark.parametrize(("config", "name", "kind"), numeric_fields())
def test_an_odd_number_is_refused_in_one_line_or_has_a_meaning(config: type, name: str, kind: type) -> None:
    for value in ODD:
        try:
            kept = float(getattr(config(**(VALID[config] | {name: value})), name))
        except ValueError as refused:
            message = str(refused)
            assert name in message
            assert len(message) < 250
            assert "\n" not in message
        else:
            # What passes is a number that arithmetic in float32 or int64 holds.
            assert math.isfinite(kept)
            assert 0 <= kept < 2**63 if kind is int else kept == 0 or 1e-38 < kept < 3.5e38


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"seed": 2**64}, "seed is 18446744073709551616; it must be at most 9223372036854775807"),
        ({"beta1": 1}, "beta1 is 1; it must be at least 0 and below 1"),
        ({"learning_rate": math.nan}, "learning_rate is nan; it must be above 0"),
        ({"learning_rate": "3e-4"}, "learning_rate is '3e-4'; it must be a number"),
        ({"max_grad_norm": 1e-46}, "max_grad_norm is 1e-46; it must be at least 1.18e-38"),
        ({"z_loss": float("1e400")}, r"z_loss is inf; it must be at most 3.4e\+38"),
        ({"batch_size": 2.0}, "batch_size is 2.0; it must be a whole number"),
        ({"compile": "no"}, "compile is 'no'; it must be true or false"),
    ],
)
def test_a_refusal_names_value_and_limit(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**values)
