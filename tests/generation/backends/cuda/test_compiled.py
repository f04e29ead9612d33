"""Every kernel compiles for Hopper, spills no registers and fits into shared memory; needs Triton, but no GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed (the CPU build of torch comes without)")


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU, the kernels themselves are tested")
@pytest.mark.parametrize(
    ("group", "kernels"),
    [
        ("attention", "attend_kernel decode_kernel"),
        ("products", "multiply_kernel"),
        ("one_row", "_multiply_row"),
        ("drawing", "_block_keys _draw _part_masses _token_keys"),
        ("others", "_rms_norm _rotate_and_store _swiglu widen_kernel"),
    ],
)
def test_kernels_compile_for_hopper_without_spilling(group: str, kernels: str) -> None:
    script, root = Path(__file__).with_name("compile_kernels.py"), Path(__file__).parents[4]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = f"{root}{os.pathsep}{root / 'benchmarks'}"
    done = subprocess.run(
        [sys.executable, script, group], capture_output=True, text=True, env=environment, check=False
    )
    assert done.stdout == f"compiled {kernels}\n", done.stdout + done.stderr[-2000:]
