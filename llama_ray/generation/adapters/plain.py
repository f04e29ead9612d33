"""Adapters in plain torch, for any device."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from llama_ray.generation.adapters.active import ActiveAdapters, Adapter, Segment
from llama_ray.generation.adapters.weights import AdapterWeights
from llama_ray.model.config import LlamaConfig
from llama_ray.model.lora_config import TARGETS, linear_sizes

FUSED_PRODUCTS: dict[str, tuple[str, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "o_proj": ("o_proj",),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "down_proj": ("down_proj",),
}
"""The products of a block whose projections are joined, and the targets of each, whose outputs lie side by side."""
PLAIN_PRODUCTS: dict[str, tuple[str, ...]] = {target: (target,) for target in TARGETS}


@dataclass(frozen=True)
class Part:
    """What an adapter adds to the outputs from `first` on of a product."""

    a: Tensor
    """[in, rank]"""
    b: Tensor
    """[rank, out], times the scale."""
    first: int


Parts = dict[tuple[int, str], list[Part]]
"""The parts of each product, by block and name."""


@dataclass(frozen=True, eq=False)
class TorchAdapter(Adapter):
    """An adapter in host memory, in page-locked memory for a GPU."""

    parts: Parts = field(default_factory=dict)


class TorchKernels:
    """See `AdapterKernels`. Copies of the `most` adapters that were used last stay on the device."""

    def __init__(
        self,
        config: LlamaConfig,
        products: Mapping[str, Sequence[str]],
        dtype: torch.dtype,
        device: torch.device,
        most: int,
    ) -> None:
        self._config, self._products, self._dtype = config, products, dtype
        self._device, self._most = device, most
        self._copies: OrderedDict[Adapter, Parts] = OrderedDict()

    def pack(self, weights: AdapterWeights) -> TorchAdapter:
        """See `AdapterKernels`."""
        sizes = linear_sizes(self._config)
        packed: Parts = {}
        for product, targets in self._products.items():
            first = 0
            for target in targets:
                for layer in range(self._config.num_layers):
                    factor = weights.factors.get((layer, target))
                    if factor is not None:
                        a, b = self._host(factor.a.T), self._host(factor.b.T.float() * factor.scale)
                        packed.setdefault((layer, product), []).append(Part(a, b, first))
                first += sizes[target][1]
        nbytes = sum(part.a.nbytes + part.b.nbytes for parts in packed.values() for part in parts)
        return TorchAdapter(weights.digest, nbytes, packed)

    def begin(self, segments: Sequence[Segment]) -> TorchAdapters:
        """See `AdapterKernels`."""
        step: list[tuple[Parts, Tensor]] = []
        for segment in segments:
            copy = self._copies.pop(segment.adapter, None) or self._copy(segment.adapter)
            self._copies[segment.adapter] = copy
            step.append((copy, torch.tensor(segment.rows, device=self._device)))
        while len(self._copies) > self._most:
            self._copies.popitem(last=False)
        return TorchAdapters(step)

    def _host(self, factor: Tensor) -> Tensor:
        factor = factor.to(self._dtype).contiguous()
        return factor.pin_memory() if self._device.type == "cuda" else factor

    def _copy(self, adapter: Adapter) -> Parts:
        assert isinstance(adapter, TorchAdapter)

        def on_device(tensor: Tensor) -> Tensor:
            return tensor.to(self._device, non_blocking=True)

        return {
            place: [Part(on_device(part.a), on_device(part.b), part.first) for part in parts]
            for place, parts in adapter.parts.items()
        }


class TorchAdapters:
    """See `StepAdapters`: adapters on the device, and the rows of each, int64."""

    def __init__(self, segments: Sequence[tuple[Parts, Tensor]]) -> None:
        self._segments = segments

    def add(self, layer: int, product: str, x: Tensor, y: Tensor) -> Tensor:
        """See `StepAdapters`."""
        inputs, outputs = x.flatten(0, -2), y.flatten(0, -2)
        for parts, rows in self._segments:
            own: Tensor | None = None
            for part in parts.get((layer, product), ()):
                own = inputs[rows] if own is None else own
                columns = outputs[:, part.first : part.first + part.b.shape[1]]
                columns.index_add_(0, rows, own @ part.a @ part.b)
        return outputs.view_as(y)


class AdaptedProduct(nn.Module):
    """A matrix product to whose results the adapters of a step are added."""

    def __init__(self, product: nn.Module, adapters: ActiveAdapters, layer: int, name: str) -> None:
        super().__init__()
        self.product, self._adapters, self._layer, self._name = product, adapters, layer, name

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        y: Tensor = self.product(x)
        step = self._adapters.step
        return y if step is None else step.add(self._layer, self._name, x, y)
