from __future__ import annotations

import ctypes

from llama_ray.generation.backends.cpu import abi


def test_structures_have_the_same_layout_in_python_and_in_cpp(native: ctypes.CDLL) -> None:
    assert native.struct_layouts().decode().splitlines() == abi.python_layouts().splitlines()
