"""Compile Triton kernels for a GPU that need not be there, and read what they use of it."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

HOPPER = 90
"""Compute capability of H100 and H200."""
SHARED_BYTES = 227 * 1024
"""Shared memory that a program can use on Hopper."""


class Resources(NamedTuple):
    """What a kernel uses."""

    name: str
    registers: int
    """Of each thread."""
    spilled: int
    """Bytes of memory of each thread, for what does not fit into registers."""
    shared: int
    """Bytes of shared memory of each program."""
    warps: int

    def problem(self) -> str | None:
        """Return why the kernel is slow or cannot run, or None."""
        if self.shared > SHARED_BYTES:
            return f"{self.shared} bytes of shared memory"
        return f"{self.spilled} bytes spilled" if self.spilled else None


class _NoGpu:
    """The driver of a GPU that is not there: it knows for which one to compile."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


_kernels: list[Any] = []


def only_compile(capability: int = HOPPER) -> None:
    """Let this process compile kernels for `capability`, into Triton's cache, instead of launching them."""
    driver.set_active(_NoGpu(capability))
    launch = JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        _kernels.append(launch(self, *args, grid=grid, warmup=True, **options))

    JITFunction.run = run


def resources(function: Callable[[], object]) -> list[Resources]:
    """Return what the kernels use that `function` would launch; call `only_compile` first."""
    _kernels.clear()
    function()
    return [_read(kernel) for kernel in _kernels]


def _read(kernel: Any) -> Resources:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True).stdout
    used = {name: int(number) for name, number in re.findall(r"(\w+):(\d+)", text)}
    metadata = kernel.metadata
    spilled = used["STACK"] + used["LOCAL"]
    return Resources(metadata.name, used["REG"], spilled, metadata.shared, metadata.num_warps)
