from __future__ import annotations

from functools import partial
from unittest.mock import patch

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from llama_ray.data.dataset.batch import Batch
from llama_ray.model.config import LlamaConfig
from llama_ray.model.llama import Llama
from llama_ray.training.config import TrainConfig
from llama_ray.training.optimizers.build import build_optimizer
from llama_ray.training.parallel.compilation import should_compile
from llama_ray.training.parallel.layout import SINGLE_WORKER
from llama_ray.training.parallel.parallelize import parallelize
from llama_ray.training.step import Stepper
from tests.model.attention.helpers import starts_of


@pytest.mark.parametrize(("steps", "pays"), [(10, False), (10_000, True)])
def test_on_a_cpu_only_a_long_run_is_compiled_and_it_says_why(steps: int, pays: bool) -> None:
    verdict, reason = should_compile(torch.device("cpu"), steps, flops_per_step=4e11)
    assert verdict is pays
    assert f"in {steps} steps" in reason
    assert ("not compiled" in reason) is not pays


def test_on_a_gpu_even_a_short_run_is_compiled() -> None:
    assert should_compile(torch.device("cuda"), 1, 1e9)[0]


@pytest.fixture
def counter() -> CompileCounter:
    return CompileCounter()


@pytest.fixture
def deep(counter: CompileCounter) -> nn.Module:
    """A model of more layers than torch compiles graphs of a function: eight, and the rest is eager."""
    shape = LlamaConfig.preset("llama-tiny", num_layers=10)
    with patch("torch.compile", partial(torch.compile, backend=counter)):
        return parallelize(
            Llama(shape), TrainConfig(), SINGLE_WORKER, torch.device("cpu"), compile_blocks=True
        )


def test_all_layers_share_one_compiled_graph(deep: nn.Module, counter: CompileCounter) -> None:
    tokens = torch.zeros(2, 16, dtype=torch.int64)
    # With gradients, the compiler itself would read `.grad` of what is no leaf, which is a warning.
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        deep(tokens, targets=tokens)
    assert counter.frame_count == 1


def test_so_do_all_layers_and_batches_under_document_masks(deep: nn.Module, counter: CompileCounter) -> None:
    config = TrainConfig()
    stepper = Stepper(deep, build_optimizer(deep, config), config, device=torch.device("cpu"))
    tokens = torch.zeros(2, 200, dtype=torch.int64)
    batches = [
        Batch(tokens, tokens, starts_of(rows, 200)) for rows in ([[], []], [[9], [1, 150]], [[1] * 99, []])
    ]
    stepper.validate(batches)
    assert counter.frame_count == 1
