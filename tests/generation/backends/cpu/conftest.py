"""Two builds of the kernels: for this machine, and with narrower vectors as on other machines."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator

import pytest
import torch

from llama_ray.generation.backends.cpu import build, ops

NARROW = {"x86_64": ("-mno-avx512f", "-mavx2", "-mfma"), "aarch64": ()}


@pytest.fixture(scope="session")
def native() -> ctypes.CDLL:
    return build.open_library(build.build())


@pytest.fixture(scope="session")
def narrow() -> ctypes.CDLL:
    """Build for AVX2 even if the machine has AVX-512: without special instructions for bfloat16 or bytes."""
    flags = NARROW.get(platform.machine(), ())
    return build.open_library(build.build((*build.FLAGS, *flags)))


@pytest.fixture(params=["native", "narrow"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ctypes.CDLL:
    """Use this library in all modules that the test makes."""
    library: ctypes.CDLL = request.getfixturevalue(request.param)
    monkeypatch.setattr(ops, "load", lambda: library)
    return library


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    """Divide work between threads, whatever number the whole suite runs with."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
