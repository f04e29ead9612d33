"""The one LLaMA of this project, for training and for generation."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor, nn

from llama_ray.model.config import LlamaConfig
from llama_ray.model.layers import Attend, Block, RMSNorm, RotaryEmbedding, causal_attention
from llama_ray.model.loss import Head

INIT_STD = 0.02


class Llama(nn.Module):
    """A decoder-only transformer (Touvron et al. 2023, arXiv:2302.13971).

    Module names are those of a Hugging Face checkpoint without its `model.` prefix. On `device="meta"` no memory
    is taken and nothing is initialised; call `materialize(device)` and then fill or `reset_parameters(seed)`.
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
        # Built without memory first: torch would otherwise draw its own initial weights, only to be overwritten.
        with torch.device("meta"):
            self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
            self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_layers))
            self.norm = RMSNorm(config.hidden_size, config.norm_eps)
            self.lm_head = Head(config.hidden_size, config.vocab_size)
            self.rotary = RotaryEmbedding(config)
        self.to(dtype or torch.get_default_dtype())
        if torch.device(device or "cpu").type == "meta":
            self.tie_weights()
        else:
            self.materialize(device or "cpu")
            self.reset_parameters(seed)

    def tie_weights(self) -> None:
        """Make the head read the embedding's weights, where the config says so."""
        if self.config.tie_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def materialize(self, device: torch.device | str) -> None:
        """Give every weight uninitialised memory on `device`, and fill the rotary table."""
        self.to_empty(device=device)
        self.tie_weights()
        self.rotary.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, seed: int) -> None:
        """Draw fresh weights; see `draw`."""
        for name, parameter in self.named_parameters():
            self.draw(name, parameter, seed)

    @torch.no_grad()
    def draw(self, name: str, weight: Tensor, seed: int) -> None:
        """Fill `weight` with the initial values of the parameter `name`: normal with deviation 0.02, norms 1.

        The two projections that write into the residual stream are scaled by 1 / sqrt(2 layers), so that its
        variance does not grow with depth (Radford et al. 2019, GPT-2). Each parameter draws from its own
        generator, seeded by (seed, name): the weights do not depend on which others are made, or in what order.
        """
        if weight.dim() == 1:
            weight.fill_(1.0)
            return
        digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
        generator = torch.Generator(weight.device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        residual = name.endswith(("o_proj.weight", "down_proj.weight"))
        deviation = INIT_STD / math.sqrt(2 * self.config.num_layers) if residual else INIT_STD
        weight.normal_(0.0, deviation, generator=generator)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        attend: Attend = causal_attention,
        *,
        targets: Tensor | None = None,
        scale: Tensor | float = 1.0,
        z_loss: float = 0.0,
    ) -> Tensor:
        """Int64 [batch, seq] -> logits [batch, seq, vocab_size]; with `targets` what `head_loss` returns for them.

        See `hidden` for positions and attend, `head_loss` for scale and z_loss.
        """
        return self.lm_head(  # type: ignore[no-any-return]
            self.hidden(tokens, positions, attend), targets, scale, z_loss
        )

    def hidden(
        self, tokens: Tensor, positions: Tensor | None = None, attend: Attend = causal_attention
    ) -> Tensor:
        """Int64 [batch, seq] -> the normed last hidden states [batch, seq, hidden_size].

        `positions` (int64 [seq] or [batch, seq]) default to 0 .. seq-1. `attend` says what queries look at.
        Raises ValueError for a position at or beyond `max_seq_len`; positions given on an accelerator are not
        looked at, since that would make the host wait for the device.
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
