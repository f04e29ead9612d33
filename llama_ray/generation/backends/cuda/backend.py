"""The backend of the Triton kernels."""

from __future__ import annotations

from typing import Self

from llama_ray.generation.adapters.active import ActiveAdapters, AdapterKernels
from llama_ray.generation.adapters.plain import FUSED_PRODUCTS, TorchKernels
from llama_ray.generation.backends.backend import BLOCK_SIZE, Backend
from llama_ray.generation.backends.cuda.cache import PagedCache
from llama_ray.generation.backends.cuda.drawing import TRITON_OPS
from llama_ray.generation.backends.cuda.graphs import GraphRunner
from llama_ray.generation.backends.cuda.modules import FusedBlock, accelerate
from llama_ray.generation.backends.quantize import Quantization
from llama_ray.model.config import LlamaConfig
from llama_ray.model.llama import Llama


class CudaBackend(Backend):
    """A model on a paged cache, decoding in CUDA graphs; its layers are fused (`convert`) or as they were."""

    def __init__(
        self,
        model: Llama,
        cache_config: LlamaConfig | None = None,
        *,
        batch_invariant: bool = False,
        block_size: int = BLOCK_SIZE,
        adapters: ActiveAdapters | None = None,
    ) -> None:
        super().__init__(
            model, cache_config, block_size=block_size, sampler_ops=TRITON_OPS, adapters=adapters
        )
        self.batch_invariant = batch_invariant

    @classmethod
    def convert(
        cls,
        model: Llama,
        quantization: Quantization | None,
        batch_invariant: bool,
        cache_config: LlamaConfig | None = None,
    ) -> Self:
        """Fuse the layers of `model` in place; see `accelerate`."""
        adapters = ActiveAdapters()
        model = accelerate(model, quantization, batch_invariant, adapters)
        return cls(model, cache_config, batch_invariant=batch_invariant, adapters=adapters)

    def allow_adapters(self, max_loras: int) -> AdapterKernels:
        """See `Backend`."""
        if not any(isinstance(layer, FusedBlock) for layer in self.model.layers):
            return super().allow_adapters(max_loras)
        return TorchKernels(self.model.config, FUSED_PRODUCTS, self.dtype, self.device, max_loras)

    def make_cache(self, num_blocks: int) -> PagedCache:
        """See `Backend`."""
        return PagedCache(
            self.cache_config,
            num_blocks,
            self.dtype,
            self.device,
            self.block_size,
            batch_invariant=self.batch_invariant,
        )

    def make_runner(self, num_blocks: int, max_num_seqs: int, max_seq_len: int) -> GraphRunner:
        """See `Backend`."""
        cache = self.make_cache(num_blocks)
        return GraphRunner(self.model, cache, max_num_seqs, max_seq_len, adapters=self.adapters)
