"""Whether torch.compile earns back the time that it takes."""

from __future__ import annotations

import torch

# Measured with a 34M model (benchmarks/RESULTS.md) on a 2-core CPU, where compiling takes 20 to 30 s. Blocks are alike:
# it hardly takes longer for a larger model.
COMPILE_S = 30.0
SAVED = 0.09  # share of an eager step's time that compiled blocks save
EAGER_MFU = 0.7


def compile_pays(
    device: torch.device, steps: int, flops_per_step: float, peak_flops: float
) -> tuple[bool, str]:
    """Whether to compile the blocks for a run of so many more `steps`, and why, in one line.

    `flops_per_step` are one worker's, `peak_flops` what its device does at best in a second. On a GPU always: there
    the gain is large, and memory is saved as well. On a CPU when the time saved is twice what compiling takes.
    """
    if device.type == "cuda":
        return True, "blocks are compiled, as always on a GPU"
    saved = steps * flops_per_step / (peak_flops * EAGER_MFU) * SAVED
    verdict = f"save about {saved:,.0f} s in {steps} steps and take {COMPILE_S:.0f} s to compile"
    if saved >= 2 * COMPILE_S:
        return True, f"blocks are compiled: they {verdict}"
    return False, f"blocks are not compiled: they would {verdict} (--compile true does it anyway)"
