"""Kernels run natively on a GPU, and without one in Triton's interpreter, if Triton is installed."""

from __future__ import annotations

import os

import pytest
import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

if DEVICE.type == "cpu":
    # Triton reads this when a kernel is defined.
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if DEVICE.type == "cpu":
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="there is no CUDA device"))


@pytest.fixture
def device() -> torch.device:
    return DEVICE


@pytest.fixture
def half() -> torch.dtype:
    """Triton 3.7's interpreter multiplies bfloat16 as if it were integers."""
    return torch.bfloat16 if DEVICE.type == "cuda" else torch.float16
