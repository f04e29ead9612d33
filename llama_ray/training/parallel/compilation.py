"""Whether torch.compile saves more time than it takes."""

from __future__ import annotations

import shutil

import torch

# Measured with a 34M model on a 2-core CPU (benchmarks/RESULTS.md). All blocks share one compiled graph, so a deeper
# model hardly takes longer to compile.
_COMPILE_S = 30.0
"""Seconds that compiling takes: a cautious guess, as first steps took 20 to 30 s on a busy machine."""
_SAVED_SHARE = 0.09
"""Share of an eager step's time that compiled blocks save."""
_EAGER_MFU = 0.7
_FLOPS_PER_THREAD = 2e11
"""Rate of bf16 matrix products per second."""


def should_compile(device: torch.device, steps: int, flops_per_step: float) -> tuple[bool, str]:
    """Decide whether to compile the blocks for a run of `steps`; also return the reason, in one line.

    `flops_per_step` counts one worker's operations. On a GPU compiling always pays: it saves much time, and memory as
    well. On a CPU it must save twice the time that it takes. Compiled and eager blocks round differently, so the
    decision must be the same on every worker and after every restart: it rests on no measurement, and `steps` is the
    length of the whole run, not what is left of it.
    """
    if device.type == "cuda":
        return True, "blocks are compiled, as always on a GPU"
    if shutil.which("g++") is None:
        return False, "blocks are not compiled, as this machine has no g++"
    eager_s = steps * flops_per_step / (_FLOPS_PER_THREAD * torch.get_num_threads() * _EAGER_MFU)
    saved_s = eager_s * _SAVED_SHARE
    verdict = f"save about {saved_s:,.0f} s in {steps} steps and take {_COMPILE_S:.0f} s to compile"
    if saved_s >= 2 * _COMPILE_S:
        return True, f"blocks are compiled: they {verdict}"
    return False, f"blocks are not compiled: they would {verdict} (--compile true does it anyway)"
