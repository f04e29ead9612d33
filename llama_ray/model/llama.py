"""The LLaMA model, one definition for training and generation."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor, nn

from llama_ray.model.attention.causal import Attend
from llama_ray.model.config import LlamaConfig
from llama_ray.model.layers import Block, RMSNorm, RotaryEmbedding
from llama_ray.model.lora import FACTOR_A, FACTOR_B
from llama_ray.model.lora_config import LoraConfig
from llama_ray.model.loss import Head

INIT_STD = 0.02
"""Standard deviation of the initial weights."""


class Llama(nn.Module):
    """A decoder-only transformer (Touvron et al. 2023, arXiv:2302.13971).

    Parameter names are those of a Hugging Face checkpoint without the `model.` prefix. `device` None is torch's
    default device, `dtype` None its default dtype. On the meta device nothing is allocated or initialised: call
    `materialize(device)`, then `init_weights(seed)` or copy weights into the parameters.
    """

    def __init__(
        self,
        config: LlamaConfig,
        *,
        seed: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.lora: LoraConfig | None = None
        """The adapters that `add_adapters` gave the model."""
        # Of all ways to set a default device, a new tensor sees each, in every version of torch.
        device = torch.device(device) if device is not None else torch.empty(0).device
        # On the meta device torch does not spend time on initial weights of its own, which would be overwritten.
        with torch.device("meta"):
            # Given a weight, `Embedding` draws none: on meta tensors torch imports its compiler for that, in over 1 s.
            weight = torch.empty(config.vocab_size, config.hidden_size)
            self.embed_tokens = nn.Embedding.from_pretrained(weight, freeze=False)  # type: ignore[no-untyped-call]
            self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_layers))
            self.norm = RMSNorm(config.hidden_size, config.norm_eps)
            self.lm_head = Head(config.hidden_size, config.vocab_size)
            self.rotary = RotaryEmbedding(config)
        self.to(dtype or torch.get_default_dtype())
        if device.type == "meta":
            self.tie_weights()
        else:
            self.materialize(device)
            self.init_weights(seed)

    def tie_weights(self) -> None:
        """Let the head share the embedding's weight if the config ties them."""
        if self.config.tie_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def materialize(self, device: torch.device | str) -> None:
        """Allocate all weights on `device`, uninitialised, and compute the rotary tables."""
        self.to_empty(device=device)
        self.tie_weights()
        self.rotary.fill_tables()

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Initialise all parameters; see `init_parameter`."""
        for name, parameter in self.named_parameters():
            self.init_parameter(name, parameter, seed)

    @torch.no_grad()
    def init_parameter(self, name: str, weight: Tensor, seed: int) -> None:
        """Fill `weight` with the initial values of the parameter `name`: 1 for norms, else normal with mean 0.

        The standard deviation is INIT_STD. The two projections that write into the residual stream are scaled by
        1 / sqrt(2 num_layers), so that its variance does not grow with depth (Radford et al. 2019, GPT-2). Of an
        adapter's factors B is 0, and A uniform up to 1 / sqrt(inputs) on both sides, as in PEFT. Each parameter has its
        own generator, seeded by (seed, name), so its values do not depend on which other parameters are initialised,
        or in which order.
        """
        if weight.dim() == 1:
            weight.fill_(1.0)
            return
        if name.endswith(f"{FACTOR_B}.weight"):
            weight.zero_()
            return
        digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
        generator = torch.Generator(weight.device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        if name.endswith(f"{FACTOR_A}.weight"):
            bound = 1 / math.sqrt(weight.shape[1])
            weight.uniform_(-bound, bound, generator=generator)
            return
        residual = name.endswith(("o_proj.weight", "down_proj.weight"))
        deviation = INIT_STD / math.sqrt(2 * self.config.num_layers) if residual else INIT_STD
        weight.normal_(0.0, deviation, generator=generator)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        attend: Attend | None = None,
        *,
        targets: Tensor | None = None,
        scale: Tensor | float = 1.0,
        z_loss: float = 0.0,
        groups: Tensor | None = None,
        each: bool = False,
    ) -> Tensor:
        """Int64 [batch, seq] -> logits [batch, seq, vocab_size]; with `targets`, the result of `head_loss`.

        With `targets` and `each`, the result of `token_losses`: fp32 [batch, seq]. See `hidden` for `positions` and
        `attend`, `head_loss` for `scale`, `z_loss` and `groups`.
        """
        return self.lm_head(  # type: ignore[no-any-return]
            self.hidden(tokens, positions, attend), targets, scale, z_loss, groups, each
        )

    def hidden(self, tokens: Tensor, positions: Tensor | None = None, attend: Attend | None = None) -> Tensor:
        """Int64 [batch, seq] -> hidden states after the last norm [batch, seq, hidden_size].

        `positions` (int64 [seq] or [batch, seq]) default to 0 .. seq-1. Without `attend` each position attends to
        itself and to those before it. Raises ValueError for a position at or beyond `max_seq_len`. `positions` on an
        accelerator are not checked, because that would make the host wait for the device.
        """
        limit = self.config.max_seq_len
        if positions is None:
            if tokens.shape[1] > limit:
                raise ValueError(_too_long(tokens.shape[1] - 1, limit))
            positions = torch.arange(tokens.shape[1], device=tokens.device)
        elif positions.device.type == "cpu" and not torch.compiler.is_compiling():
            last = int(positions.max())
            if last >= limit:
                raise ValueError(_too_long(last, limit))
        rope = self.rotary(positions)
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x, rope, attend)
        return self.norm(x)  # type: ignore[no-any-return]

    def head(self, hidden: Tensor) -> Tensor:
        """[..., hidden_size] -> logits [..., vocab_size]."""
        return self.lm_head(hidden)  # type: ignore[no-any-return]


def _too_long(position: int, limit: int) -> str:
    return (
        f"position {position} is beyond this model's max_seq_len of {limit} tokens (positions 0 to {limit - 1}); "
        "shorten the input or use a model with a larger max_seq_len"
    )
