"""Kernels run natively on a GPU, and without one in Triton's interpreter, if Triton is installed."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

if DEVICE.type == "cpu":
    # Triton reads this when a kernel is defined.
    os.environ["TRITON_INTERPRET"] = "1"


def _mend_interpreter() -> None:
    """Let Triton 3.6's interpreter loop up to a tensor, and multiply as a GPU does."""
    try:
        import numpy as np
        from triton.runtime import interpreter
    except ImportError:
        return
    patch_tensor = interpreter._patch_lang_tensor

    def patch(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        # numpy 2.5 refuses to convert an array of one element.
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    def dot(_: Any, a: Any, b: Any, sums: Any, *options: Any) -> Any:
        # A BLAS adds up in another order for other shapes; in fp64 that makes no difference that is left in fp32.
        total = (np.matmul(a.data.astype(float), b.data.astype(float)) + sums.data).astype(sums.data.dtype)
        return interpreter.TensorHandle(total, sums.dtype.scalar)

    interpreter._patch_lang_tensor = patch
    interpreter.InterpreterBuilder.create_dot = dot


if DEVICE.type == "cpu":
    _mend_interpreter()


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
    """Triton's interpreter does not compute in bfloat16."""
    return torch.bfloat16 if DEVICE.type == "cuda" else torch.float16
