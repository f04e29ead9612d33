"""The backend of the Triton kernels."""

from __future__ import annotations

from typing import Self

from llama_ray.generation.backends.backend import BLOCK_SIZE, Backend
from llama_ray.generation.backends.cuda.cache import PagedCache
from llama_ray.generation.backends.cuda.drawing import TRITON_OPS
from llama_ray.generation.backends.cuda.graphs import GraphRunner
from llama_ray.generation.backends.cuda.modules import accelerate
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
    ) -> None:
        super().__init__(model, cache_config, block_size=block_size, sampler_ops=TRITON_OPS)
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
        model = accelerate(model, quantization, batch_invariant)
        return cls(model, cache_config, batch_invariant=batch_invariant)

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
        return GraphRunner(self.model, self.make_cache(num_blocks), max_num_seqs, max_seq_len)
