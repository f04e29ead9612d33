from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llama_ray.exporting.averaging import average, shares_of
from llama_ray.model.checkpoint import load_model
from llama_ray.model.config import LlamaConfig
from llama_ray.model.llama import Llama
from llama_ray.model.saving import save_model, save_stored
from llama_ray.model.stored_model import open_model
from llama_ray.model.weight_files import CheckpointError
from tests.small_models import random_model, small_config

CONFIG = small_config(60)


def saved(directory: Path, config: LlamaConfig = CONFIG, dtype: torch.dtype = torch.float32) -> list[Path]:
    for seed in (1, 2, 3):
        save_model(random_model(config, seed).to(dtype), directory / str(seed))
    return [directory / str(seed) for seed in (1, 2, 3)]


def averaged(paths: Sequence[Path], directory: Path, shares: Sequence[float]) -> Llama:
    with ExitStack() as stack:
        models = [open_model(path, stack) for path in paths]
        save_stored(average(models, list(map(str, paths)), shares), directory)
    return load_model(directory)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_weight_is_the_sum_of_its_shares_in_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    paths = saved(tmp_path, dtype=dtype)
    result = averaged(paths, tmp_path / "average", shares := [0.5, 0.2, 0.3])
    models = [load_model(path) for path in paths]
    for name, weight in result.named_parameters():
        parts = [
            model.get_parameter(name).double() * share for model, share in zip(models, shares, strict=True)
        ]
        expected = sum(parts, torch.zeros((), dtype=torch.float64))
        # Rounded once, at the end: half a step of the dtype.
        step = torch.finfo(dtype).eps * expected.abs() / 2 + 1e-6
        assert bool(((weight - expected).abs() <= step).all()), name


def test_models_of_other_shapes_are_refused_by_the_first_field_that_differs(tmp_path: Path) -> None:
    first, *_ = saved(tmp_path)
    save_model(Llama(small_config(60, intermediate_size=96)), tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"intermediate_size of \S*other is 96; it must be 64, that of"):
        averaged([first, tmp_path / "other"], tmp_path / "average", [0.5, 0.5])


@given(st.lists(st.floats(0.01, 1e6), min_size=1, max_size=9))
def test_shares_have_the_sum_of_1_and_the_proportions_of_the_weights(weights: list[float]) -> None:
    shares = shares_of(weights, len(weights))
    assert sum(shares) == pytest.approx(1)
    for weight, share in zip(weights, shares, strict=True):
        assert share * weights[0] == pytest.approx(shares[0] * weight)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0], "weights has 1 numbers; it must have 2, one for each model"),
        ([1.0, -1.0], "weights has the sum 0.0; it must be above 0"),
        ([1.0, float("nan")], "weights has the sum nan; it must be above 0"),
    ],
)
def test_weights_without_a_proportion_are_refused(weights: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        shares_of(weights, 2)
