"""Whether torch.compile earns back the time that it takes."""

from __future__ import annotations

import shutil

import torch

# Of a 34M model on a 2-core CPU (benchmarks/RESULTS.md). Blocks are alike, so a deeper model hardly takes longer.
COMPILE_S = 30.0  # a cautious guess: first steps took 20 to 30 s on a busy machine
SAVED = 0.09  # share of an eager step's time that compiled blocks save
EAGER_MFU = 0.7
THREAD_FLOPS = 2e11  # bf16 matrix products


def compile_pays(device: torch.device, steps: int, flops_per_step: float) -> tuple[bool, str]:
    """Whether to compile the blocks for a run of `steps`, from first to last, and why, in one line.

    `flops_per_step` are one worker's. On a GPU always: there the gain is large, and memory is saved as well. On a CPU
    when the time saved is twice what compiling takes. Compiled and eager blocks round differently, so the answer
    must be the same for every worker and after every restart: nothing is measured here, and `steps` are not those
    that are left.
    """
    if device.type == "cuda":
        return True, "blocks are compiled, as always on a GPU"
    if shutil.which("g++") is None:
        return False, "blocks are not compiled: there is no g++ here"
    saved = steps * flops_per_step / (THREAD_FLOPS * torch.get_num_threads() * EAGER_MFU) * SAVED
    verdict = f"save about {saved:,.0f} s in {steps} steps and take {COMPILE_S:.0f} s to compile"
    if saved >= 2 * COMPILE_S:
        return True, f"blocks are compiled: they {verdict}"
    return False, f"blocks are not compiled: they would {verdict} (--compile true does it anyway)"
