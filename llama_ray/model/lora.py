"""Low-rank adapters beside frozen linear layers (LoRA: Hu et al. 2021, arXiv:2106.09685)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama_ray.model.lora_config import LoraConfig

FACTOR_A, FACTOR_B = "lora_A", "lora_B"
"""What PEFT calls the two factors, A [rank, inputs] and B [outputs, rank]."""


class LoraLinear(nn.Linear):
    """A linear layer without bias whose frozen weight has an adapter: x -> x W^T + scale dropout(x) A^T B^T."""

    def __init__(self, linear: nn.Linear, config: LoraConfig) -> None:
        """Take the weight of `linear`; the factors are on its device, in fp32, and not initialised on `meta`."""
        inputs, outputs, device = linear.in_features, linear.out_features, linear.weight.device
        super().__init__(inputs, outputs, bias=False, device="meta")
        self.weight = linear.weight
        self.scale, self.dropout = config.scale, config.dropout
        factors = {FACTOR_A: (inputs, config.rank), FACTOR_B: (config.rank, outputs)}
        for name, (columns, rows) in factors.items():
            factor = nn.Linear(columns, rows, bias=False, device="meta", dtype=torch.float32)
            self.add_module(name, factor.to_empty(device=device))

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return A [rank, inputs] and B [outputs, rank]."""
        return self.get_parameter(f"{FACTOR_A}.weight"), self.get_parameter(f"{FACTOR_B}.weight")

    def forward(self, x: Tensor) -> Tensor:
        """[..., inputs] -> [..., outputs]."""
        a, b = (factor.to(x.dtype) for factor in self.factors())
        dropped = F.dropout(x, self.dropout, self.training) if self.dropout else x
        # Scaled where it is small, and added within the product: neither costs a pass over the outputs.
        low = F.linear(dropped, a) * self.scale
        out = F.linear(x, self.weight)
        return torch.addmm(out.flatten(0, -2), low.flatten(0, -2), b.T).view_as(out)

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """Return the weight with its adapter added in fp32, in the dtype of the weight."""
        return merge(self.weight, *self.factors(), self.scale)


def merge(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Return `weight` [outputs, inputs] + `scale` b a, added in fp32 and rounded to the dtype of `weight`."""
    return torch.addmm(weight.float(), b.float(), a.float(), alpha=scale).to(weight.dtype)
