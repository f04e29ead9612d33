"""The number formats of matrix products in training."""

from __future__ import annotations

import torch

from llama_ray.training.config import Precision

DTYPES: dict[Precision, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
"""The dtype of matrix products by precision; in bf16 and fp16 they run under autocast, on fp32 parameters."""
