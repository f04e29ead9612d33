"""The shape of a LLaMA, and its cost in parameters and floating point operations."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Self

from llama_ray.utils.fields import check_fields, limits


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are lowered for contexts longer than the model was first trained for.

    `linear` divides all frequencies by `factor` (position interpolation, Chen et al. 2023, arXiv:2306.15595).
    `llama3` divides only low frequencies: wavelengths above `original_max_seq_len / low_freq_factor` tokens are
    stretched, those below `original_max_seq_len / high_freq_factor` stay, and those between are interpolated
    (Llama 3.1, Grattafiori et al. 2024, arXiv:2407.21783).
    """

    rope_type: Literal["linear", "llama3"]
    factor: float = field(metadata=limits(1))
    low_freq_factor: float = field(default=1.0, metadata=limits(above=0))
    high_freq_factor: float = field(default=4.0, metadata=limits(above=0))
    original_max_seq_len: int = field(default=8192, metadata=limits(1))

    def __post_init__(self) -> None:
        check_fields(self, "rope_scaling.")
        if self.rope_type == "llama3" and self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                f"low_freq_factor is {self.low_freq_factor}; it must be below high_freq_factor, "
                f"{self.high_freq_factor}"
            )


@dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """The shape of a LLaMA (Touvron et al. 2023, arXiv:2302.13971).

    Raises ValueError for an impossible shape. The upper limits are far above any model; they catch mistyped numbers.

    Args:
        vocab_size: Entries of the vocabulary.
        hidden_size: Width of the residual stream.
        num_layers: Transformer blocks.
        num_heads: Attention heads of the queries.
        num_kv_heads: Attention heads of keys and values; 0 means num_heads. Fewer are grouped-query attention
            (Ainslie et al. 2023, arXiv:2305.13245).
        head_dim: Width of an attention head; 0 means hidden_size / num_heads.
        intermediate_size: Inner width of the feed-forward blocks.
        max_seq_len: Longest sequence, in tokens.
        rope_theta: Base of the rotary frequencies.
        rope_scaling: How rotary frequencies are stretched for sequences beyond those of the first training.
        norm_eps: Added to the mean square in RMSNorm.
        tie_embeddings: Whether the output projection shares the weights of the embedding.
    """

    vocab_size: int = field(metadata=limits(1, 2**24))
    hidden_size: int = field(metadata=limits(1, 2**20))
    num_layers: int = field(metadata=limits(1, 2**14))
    num_heads: int = field(metadata=limits(1, 2**16))
    num_kv_heads: int = field(default=0, metadata=limits(0, 2**16))
    head_dim: int = field(default=0, metadata=limits(0, 2**16))
    intermediate_size: int = field(metadata=limits(1, 2**24))
    max_seq_len: int = field(default=2048, metadata=limits(1, 2**27))
    rope_theta: float = field(default=10_000.0, metadata=limits(above=0))
    rope_scaling: RopeScaling | None = None
    norm_eps: float = field(default=1e-6, metadata=limits(above=0, most=1))
    tie_embeddings: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        # The dataclass is frozen; the two fields whose defaults depend on others are set once, here.
        if self.num_kv_heads == 0:
            object.__setattr__(self, "num_kv_heads", self.num_heads)
        if self.head_dim == 0:
            if self.hidden_size % self.num_heads:
                raise ValueError(
                    f"hidden_size is {self.hidden_size}; it must be a multiple of num_heads, {self.num_heads}; "
                    "change one of them or give head_dim"
                )
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_heads)
        if self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(
                f"head_dim is {self.head_dim}; it must be even, because rotary embedding rotates pairs; change "
                "hidden_size or num_heads, or give head_dim"
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads is {self.num_heads}; it must be a multiple of num_kv_heads, {self.num_kv_heads}; "
                "change one of them"
            )

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> Self:
        """Return the published shape `name`, with the fields of `overrides` replaced.

        Raises ValueError for an unknown name. `head_dim` follows an overridden `hidden_size` or `num_heads`, and
        `num_kv_heads` follows `num_heads` if the preset has no grouped-query attention.
        """
        if name not in PRESETS:
            raise ValueError(f"preset is {name!r}; it must be one of {', '.join(PRESETS)}")
        return cls(**{**PRESETS[name], **overrides})

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as values that YAML and JSON can hold."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Return the config that `to_dict` gave `values` for."""
        scaling = values.get("rope_scaling")
        return cls(**{**values, "rope_scaling": RopeScaling(**scaling) if scaling else None})

    def num_parameters(self) -> int:
        """Number of weights of the model; a tied embedding counts once."""
        embeddings = self.vocab_size * self.hidden_size
        norms = (2 * self.num_layers + 1) * self.hidden_size
        return self._matmul_parameters() + norms + (0 if self.tie_embeddings else embeddings)

    def flops_per_token(self, seq_len: int, *, frozen: bool = False) -> int:
        """Floating point operations a token in training, forward and backward, in sequences of `seq_len` tokens.

        6 N + 12 num_layers num_heads head_dim seq_len, where N counts the weights of matrix products, that is all but
        norms and the embedding table. Attention is counted in full, not halved for causality. This is the convention of
        PaLM (Chowdhery et al. 2022, arXiv:2204.02311, appendix B), which published MFU figures follow. Of `frozen`
        weights no gradient is computed: 4 N instead of 6 N.
        """
        attention = 12 * self.num_layers * self.num_heads * self.head_dim * seq_len
        return (4 if frozen else 6) * self._matmul_parameters() + attention

    def _matmul_parameters(self) -> int:
        attention = self.hidden_size * self.head_dim * 2 * (self.num_heads + self.num_kv_heads)
        mlp = 3 * self.hidden_size * self.intermediate_size
        return self.num_layers * (attention + mlp) + self.vocab_size * self.hidden_size


def _shape(
    hidden_size: int, num_layers: int, num_heads: int, intermediate_size: int, **more: Any
) -> dict[str, Any]:
    return {
        "vocab_size": 32000,
        "hidden_size": hidden_size,
        "num_layers": num_layers,
        "num_heads": num_heads,
        "intermediate_size": intermediate_size,
        **more,
    }


_LLAMA2 = {"max_seq_len": 4096, "norm_eps": 1e-5}
_LLAMA3 = {
    "vocab_size": 128_256,
    "num_kv_heads": 8,
    "max_seq_len": 8192,
    "rope_theta": 500_000.0,
    "norm_eps": 1e-5,
}
_LLAMA32 = {
    **_LLAMA3,
    "max_seq_len": 131_072,
    "rope_scaling": RopeScaling(rope_type="llama3", factor=32.0),
    "tie_embeddings": True,
}

PRESETS: dict[str, dict[str, Any]] = {
    "llama-tiny": _shape(64, 2, 4, 176, vocab_size=512, num_kv_heads=2, max_seq_len=256),
    "llama-30m": _shape(512, 8, 8, 1376, vocab_size=8192, max_seq_len=1024),
    "llama-110m": _shape(768, 12, 12, 2048, max_seq_len=1024),
    "llama-7b": _shape(4096, 32, 32, 11008),
    "llama-13b": _shape(5120, 40, 40, 13824),
    "llama-33b": _shape(6656, 60, 52, 17920),
    "llama-65b": _shape(8192, 80, 64, 22016),
    "llama-2-7b": _shape(4096, 32, 32, 11008, **_LLAMA2),
    "llama-2-13b": _shape(5120, 40, 40, 13824, **_LLAMA2),
    "llama-2-70b": _shape(8192, 80, 64, 28672, num_kv_heads=8, **_LLAMA2),
    "llama-3-8b": _shape(4096, 32, 32, 14336, **_LLAMA3),
    "llama-3-70b": _shape(8192, 80, 64, 28672, **_LLAMA3),
    "llama-3.2-1b": _shape(2048, 16, 32, 8192, **_LLAMA32),
    "llama-3.2-3b": _shape(3072, 28, 24, 8192, **_LLAMA32),
    "tinyllama-1.1b": _shape(2048, 22, 32, 5632, num_kv_heads=4, norm_eps=1e-5),
}
