"""Which adapters a model has, and how large they are (LoRA: Hu et al. 2021, arXiv:2106.09685)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from llama_ray.model.config import LlamaConfig
from llama_ray.utils.fields import check_fields, limits, shown

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The linear layers of a block, which can have adapters; all of them do by default."""


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """The adapters of a model: `scale` B A is added to each weight of `targets`.

    A value that cannot work raises ValueError.

    Args:
        rank: Rows of A and columns of B.
        alpha: Sets the scale, whatever the rank.
        dropout: Probability of dropout at the inputs of A, in training.
        targets: The linear layers that have adapters, in every block.
        rslora: Divide `alpha` by the square root of the rank instead of the rank (rank-stabilised: Kalajdzievski 2023,
            arXiv:2312.03732).
    """

    rank: int = field(metadata=limits(1, 1024))
    alpha: float = field(metadata=limits(above=0))
    dropout: float = field(default=0.0, metadata=limits(0, below=1))
    targets: tuple[str, ...] = TARGETS
    rslora: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        unknown = [name for name in self.targets if name not in TARGETS]
        if unknown or not self.targets:
            raise ValueError(
                f"lora_targets has {shown(unknown[0]) if unknown else 'no layer'}; choose of {', '.join(TARGETS)}"
            )
        # However they are named, equal adapters are equal.
        object.__setattr__(self, "targets", tuple(name for name in TARGETS if name in self.targets))

    @property
    def scale(self) -> float:
        """The factor of B A."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def num_parameters(self, model: LlamaConfig) -> int:
        """Number of weights of the adapters of `model`."""
        sizes = linear_sizes(model)
        return model.num_layers * self.rank * sum(sum(sizes[name]) for name in set(self.targets))

    def flops_per_token(self, model: LlamaConfig, seq_len: int) -> int:
        """Floating point operations a token in training adapters of `model`: 4 N + 12 L h d s + 6 n.

        N and the term of attention are those of `LlamaConfig.flops_per_token`; n counts the weights of the adapters.
        """
        return model.flops_per_token(seq_len, frozen=True) + 6 * self.num_parameters(model)


def linear_sizes(model: LlamaConfig) -> dict[str, tuple[int, int]]:
    """Return (inputs, outputs) of each linear layer of a block, by its name in TARGETS."""
    hidden, inner = model.hidden_size, model.intermediate_size
    queries, keys = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    return {
        "q_proj": (hidden, queries),
        "k_proj": (hidden, keys),
        "v_proj": (hidden, keys),
        "o_proj": (queries, hidden),
        "gate_proj": (hidden, inner),
        "up_proj": (hidden, inner),
        "down_proj": (inner, hidden),
    }
