"""What a model runs with on its device: the cache, the runner and the sampler. The base class is plain torch."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import cast

from torch import Tensor, nn

from llama_ray.generation.adapters.active import ActiveAdapters, AdapterKernels
from llama_ray.generation.adapters.plain import PLAIN_PRODUCTS, AdaptedProduct, TorchKernels
from llama_ray.generation.backends.kv_cache import KVCache, TorchCache
from llama_ray.generation.backends.runner import Runner
from llama_ray.generation.sampling.draw import TORCH_OPS, SamplerOps
from llama_ray.generation.sampling.sampler import Sampler
from llama_ray.model.config import LlamaConfig
from llama_ray.model.layers import Block
from llama_ray.model.llama import Llama

BLOCK_SIZE = 32
"""Default number of tokens in a block of the cache."""

PostProduct = Callable[[Tensor], Tensor]
"""Is applied to the result of a matrix product, such as the sum over ranks."""


class Backend:
    """A model with the cache, runner and sampler that suit it; this class runs on any device that torch knows.

    `cache_config` is the shape of the keys and values: under tensor parallelism one rank's share of the heads, and by
    default the model's own config. Everything that counts in blocks takes `block_size` from here.
    """

    batch_invariant = False
    """Whether a token's logits have the same bits whatever else is computed in the step."""

    def __init__(
        self,
        model: Llama,
        cache_config: LlamaConfig | None = None,
        *,
        sampler_ops: SamplerOps = TORCH_OPS,
        block_size: int = BLOCK_SIZE,
        adapters: ActiveAdapters | None = None,
    ) -> None:
        self.model, self.block_size = model, block_size
        self.adapters, self._allowing = adapters or ActiveAdapters(), threading.Lock()
        self.cache_config = cache_config or model.config
        self.sampler_ops = sampler_ops
        self.device, self.dtype = model.embed_tokens.weight.device, model.embed_tokens.weight.dtype

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights, in whatever format they are stored."""
        return sum(p.nbytes for p in self.model.parameters())

    @property
    def block_bytes(self) -> int:
        """Bytes of one block of the cache, over all layers."""
        return TorchCache.block_bytes(self.cache_config, self.block_size, self.dtype)

    def make_cache(self, num_blocks: int) -> KVCache:
        """Return an empty cache."""
        return TorchCache(self.cache_config, num_blocks, self.dtype, self.device, self.block_size)

    def make_runner(self, num_blocks: int, max_num_seqs: int, max_seq_len: int) -> Runner:
        """Return a runner with an empty cache, for up to `max_num_seqs` sequences of up to `max_seq_len` tokens."""
        return Runner(self.model, self.make_cache(num_blocks), self.adapters)

    def make_sampler(self) -> Sampler:
        """Return a sampler for the model's logits."""
        return Sampler(self.sampler_ops)

    def adapter_kernels(self, max_loras: int) -> AdapterKernels:
        """Return how adapters are computed, at most `max_loras` in a step; from then on the products add them."""
        # Adapters are read in several threads; the products must add them once.
        with self._allowing:
            if self.adapters.kernels is None:
                self.adapters.kernels = self.allow_adapters(max_loras)
            return self.adapters.kernels

    def allow_adapters(self, max_loras: int) -> AdapterKernels:
        """Have the products add adapters; see `adapter_kernels`."""
        for layer, block in enumerate(self._blocks()):
            for parent in (block.self_attn, block.mlp):
                for name in PLAIN_PRODUCTS:
                    if isinstance(product := getattr(parent, name, None), nn.Module):
                        parent.register_module(name, AdaptedProduct(product, self.adapters, layer, name))
        return TorchKernels(self.model.config, PLAIN_PRODUCTS, self.dtype, self.device, max_loras)

    def join_ranks(self, sum_parts: PostProduct, gather_logits: PostProduct) -> None:
        """Complete the products of one rank's share of a model, in place; call this once.

        `sum_parts` is applied to each result of o_proj and down_proj, `gather_logits` to the result of the head.
        """
        for block in self._blocks():
            append_post_product(block.self_attn, "o_proj", sum_parts)
            append_post_product(block.mlp, "down_proj", sum_parts)
        append_post_product(self.model, "lm_head", gather_logits)

    def _blocks(self) -> Iterable[Block]:
        return (cast(Block, block) for block in self.model.layers)


class WithPostProduct(nn.Module):
    """A matrix product whose result goes through `post_product`."""

    def __init__(self, product: nn.Module, post_product: PostProduct) -> None:
        super().__init__()
        self.product, self.post_product = product, post_product

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return self.post_product(self.product(x))


def append_post_product(parent: nn.Module, name: str, post_product: PostProduct) -> None:
    """Replace the product `name` of `parent` by the same product followed by `post_product`."""
    parent.register_module(name, WithPostProduct(parent.get_submodule(name), post_product))
