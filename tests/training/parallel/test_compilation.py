from __future__ import annotations

import pytest
import torch

from llama_ray.training.parallel.compilation import should_compile


@pytest.mark.parametrize(("steps", "pays"), [(10, False), (10_000, True)])
def test_on_a_cpu_only_a_long_run_is_compiled_and_it_says_why(steps: int, pays: bool) -> None:
    verdict, reason = should_compile(torch.device("cpu"), steps, flops_per_step=4e11)
    assert verdict is pays
    assert f"in {steps} steps" in reason
    assert ("not compiled" in reason) is not pays


def test_on_a_gpu_even_a_short_run_is_compiled() -> None:
    assert should_compile(torch.device("cuda"), 1, 1e9)[0]
