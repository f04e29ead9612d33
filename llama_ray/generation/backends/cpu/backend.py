"""The backend of the C++ kernels."""

from __future__ import annotations

from typing import Self

from llama_ray.generation.adapters.active import ActiveAdapters
from llama_ray.generation.backends.backend import Backend, PostProduct, append_post_product
from llama_ray.generation.backends.cpu.adapters import CpuKernels
from llama_ray.generation.backends.cpu.cache import CpuCache
from llama_ray.generation.backends.cpu.linear import Format, PackedLinear
from llama_ray.generation.backends.cpu.modules import PackedBlocks, accelerate
from llama_ray.generation.sampling.draw import SamplerOps
from llama_ray.model.config import LlamaConfig
from llama_ray.model.llama import Llama


class CpuBackend(Backend):
    """A model whose layers `accelerate` has packed. Every result is the same to the bit in any batch."""

    batch_invariant = True

    @classmethod
    def convert(
        cls,
        model: Llama,
        format: Format | None,
        cache_config: LlamaConfig | None,
        sampler_ops: SamplerOps,
    ) -> Self:
        """Pack the weights of `model` in place; see `accelerate`."""
        adapters = ActiveAdapters()
        model = accelerate(model, format, adapters)
        return cls(model, cache_config, sampler_ops=sampler_ops, adapters=adapters)

    def allow_adapters(self, max_loras: int) -> CpuKernels:
        """See `Backend`."""
        return CpuKernels(self.model.config, self.dtype)

    @property
    def weight_bytes(self) -> int:
        """See `Backend`."""
        packed = (module for module in self.model.modules() if isinstance(module, PackedLinear))
        return super().weight_bytes + sum(linear.nbytes for linear in packed)

    @property
    def block_bytes(self) -> int:
        """See `Backend`."""
        return CpuCache.block_bytes(self.cache_config, self.block_size, self.dtype)

    def make_cache(self, num_blocks: int) -> CpuCache:
        """See `Backend`."""
        return CpuCache(self.cache_config, num_blocks, self.dtype, self.block_size)

    def join_ranks(self, sum_parts: PostProduct, gather_logits: PostProduct) -> None:
        """See `Backend`."""
        (blocks,) = self.model.layers
        assert isinstance(blocks, PackedBlocks)
        blocks.set_post_product(sum_parts)
        append_post_product(self.model, "lm_head", gather_logits)
