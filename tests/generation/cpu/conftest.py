"""Kernels of two kinds: as built for this machine, and with narrower vectors, as other machines build them."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator

import pytest
import torch

from llama_ray.generation.cpu import build, ops

NARROW = {"x86_64": ("-mno-avx512f", "-mavx2", "-mfma"), "aarch64": ()}


@pytest.fixture(scope="session")
def native() -> ctypes.CDLL:
    return build.open_library(build.build())


@pytest.fixture(scope="session")
def narrow() -> ctypes.CDLL:
    """AVX2 where the machine has more: the code that has no instruction of its own for bfloat16 or bytes."""
    flags = NARROW.get(platform.machine(), ())
    return build.open_library(build.build((*build.FLAGS, *flags)))


@pytest.fixture(params=["native", "narrow"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ctypes.CDLL:
    """The library that modules made in this test call."""
    library: ctypes.CDLL = request.getfixturevalue(request.param)
    monkeypatch.setattr(ops, "load", lambda: library)
    return library


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    """Work is divided, whatever the suite's own number of threads is."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
