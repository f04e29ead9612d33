"""The number formats of matrix products in training."""

from __future__ import annotations

import torch

from llama_ray.training.config import Precision

DTYPES: dict[Precision, torch.dtype] = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp8": torch.bfloat16,
}
"""The dtype that autocast computes in by precision, on fp32 parameters; with fp8 the blocks' products are in float8."""
