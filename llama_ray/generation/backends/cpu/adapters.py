"""Adapters laid out for the kernel in adapters.cpp."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from llama_ray.generation.adapters.active import Adapter, Segment
from llama_ray.generation.adapters.plain import FUSED_PRODUCTS
from llama_ray.generation.adapters.weights import AdapterWeights, LowRank
from llama_ray.generation.backends.cpu import abi
from llama_ray.generation.backends.cpu.ops import kernels
from llama_ray.model.config import LlamaConfig
from llama_ray.model.lora_config import linear_sizes

_PANEL = 64
"""Outputs of B that are stored together."""
_WIDEST_VECTOR = 16
"""Floats in the widest vector of any processor: A has a multiple of this many columns."""

_PRODUCTS = list(FUSED_PRODUCTS)
"""In the order of the enum in block.cpp."""


@dataclass(frozen=True, eq=False)
class CpuAdapter(Adapter):
    """An adapter in the layout of the kernel."""

    products: ctypes.Array[abi.AdapterProduct]
    """Those of all blocks, in the order in which they are computed."""
    kept: object
    """The memory that `products` points to."""


class CpuKernels:
    """See `AdapterKernels`. Adapters are computed from host memory: there is nothing to copy for a step."""

    def __init__(self, config: LlamaConfig, dtype: torch.dtype) -> None:
        self._config, self._dtype = config, dtype

    def pack(self, weights: AdapterWeights) -> CpuAdapter:
        """See `AdapterKernels`."""
        places = [(layer, name) for layer in range(self._config.num_layers) for name in _PRODUCTS]
        products = (abi.AdapterProduct * len(places))()
        kept: list[object] = []
        nbytes = 0
        for argument, (layer, name) in zip(products, places, strict=True):
            factors = [weights.factors.get((layer, target)) for target in FUSED_PRODUCTS[name]]
            if any(factors):
                tensors, parts = self._pack_product(name, factors, argument)
                nbytes += sum(tensor.nbytes for tensor in tensors)
                kept += (tensors, parts)
        return CpuAdapter(weights.digest, nbytes, products, kept)

    def begin(self, segments: Sequence[Segment]) -> CpuAdapters:
        """See `AdapterKernels`."""
        return CpuAdapters(segments)

    def _pack_product(
        self, name: str, factors: Sequence[LowRank | None], argument: abi.AdapterProduct
    ) -> tuple[list[Tensor], object]:
        """Fill the argument of one product; return what it points to."""
        sizes = linear_sizes(self._config)
        tensors, parts = list[Tensor](), list[abi.AdapterPart]()
        column = output = 0
        for target, factor in zip(FUSED_PRODUCTS[name], factors, strict=True):
            outputs = sizes[target][1]
            if factor is not None:
                tensors.append(_panels(factor.b.to(self._dtype)))
                address = tensors[-1].data_ptr()
                parts.append(abi.AdapterPart(address, column, factor.rank, output, outputs, factor.scale))
                column += factor.rank
            output += outputs
        columns = torch.cat([factor.a.to(self._dtype) for factor in factors if factor is not None])
        tensors.append(_units(columns))
        array = (abi.AdapterPart * len(parts))(*parts)
        inputs = sizes[FUSED_PRODUCTS[name][0]][0]
        argument.a = tensors[-1].data_ptr()
        argument.in_features = inputs + padding(inputs, self._dtype)
        argument.columns = tensors[-1].shape[1]
        argument.parts, argument.num_parts = ctypes.addressof(array), len(parts)
        return tensors, array


class CpuAdapters:
    """See `StepAdapters`; `address` is that of the step's argument for C++."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        rows = torch.tensor([row for segment in segments for row in segment.rows])
        starts = torch.tensor([0, *(len(segment.rows) for segment in segments)]).cumsum(0)
        adapters = []
        for segment in segments:
            assert isinstance(segment.adapter, CpuAdapter)
            adapters.append(ctypes.addressof(segment.adapter.products))
        pointers = (ctypes.c_void_p * len(adapters))(*adapters)
        addresses = rows.data_ptr(), starts.data_ptr(), ctypes.addressof(pointers)
        step = abi.AdapterStep(*addresses, len(adapters))
        # C++ has only the addresses; this keeps the memory alive.
        self._kept = rows, starts, pointers, step, segments
        self.address = ctypes.addressof(step)

    def add(self, layer: int, product: str, x: Tensor, y: Tensor) -> Tensor:
        """See `StepAdapters`; `y` is contiguous and changed in place."""
        if x.dtype != y.dtype or not y.is_contiguous():
            raise ValueError(f"a product of {x.dtype} gave {y.dtype} with strides {y.stride()}")
        x = F.pad(x, (0, padding(x.shape[-1], x.dtype))).contiguous()
        kernels().add_adapters(
            *(self.address, layer * len(_PRODUCTS) + _PRODUCTS.index(product), x.dtype == torch.bfloat16),
            *(x.data_ptr(), y.data_ptr(), y.shape[-1], torch.get_num_threads()),
        )
        return y


def padding(inputs: int, dtype: torch.dtype) -> int:
    """Return how many zeros an input gets: bfloat16 is multiplied in pairs."""
    return inputs % 2 if dtype == torch.bfloat16 else 0


def _units(a: Tensor) -> Tensor:
    """[columns, in] -> [in / values in a unit, columns] in units of 32 bits; padded with zeros in both dimensions."""
    columns, inputs = a.shape
    padded = F.pad(a, (0, padding(inputs, a.dtype), 0, -columns % _WIDEST_VECTOR))
    return padded.contiguous().view(torch.int32).T.contiguous()


def _panels(b: Tensor) -> Tensor:
    """[out, rank] -> [panels, rank, 64], padded with zeros."""
    padded = F.pad(b, (0, 0, 0, -len(b) % _PANEL))
    return padded.view(-1, _PANEL, b.shape[1]).transpose(1, 2).contiguous()
