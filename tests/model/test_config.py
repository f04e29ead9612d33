import pytest
import torch

from llama_ray.model.config import PRESETS, LlamaConfig, RopeScaling
from llama_ray.model.llama import Llama

PUBLISHED = {
    "llama-7b": 6_738_415_616,
    "llama-13b": 13_015_864_320,
    "llama-33b": 32_528_943_616,
    "llama-65b": 65_285_660_672,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "tinyllama-1.1b": 1_100_048_384,
}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_has_the_number_of_parameters_that_num_parameters_says(name: str) -> None:
    config = LlamaConfig.preset(name)
    model = Llama(config, device="meta")
    assert sum(p.numel() for p in model.parameters()) == config.num_parameters()
    assert all(p.is_meta for p in model.parameters())
    if name in PUBLISHED:
        assert config.num_parameters() == PUBLISHED[name]


def test_flops_per_token_counts_matrices_and_full_attention() -> None:
    config = LlamaConfig.preset("llama-7b")
    matrices = config.num_parameters() - 32000 * 4096 - 65 * 4096
    assert config.flops_per_token(2048) == 6 * matrices + 12 * 32 * 4096 * 2048


def test_flops_per_token_equals_what_torch_counts() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    from llama_ray.model.loss import cross_entropy_sum

    def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        # Plain matrix products: the counter does not know the fused attention of a CPU.
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        return (q @ k.transpose(-1, -2)).softmax(-1) @ v

    config = LlamaConfig.preset("llama-tiny")
    model = Llama(config)
    tokens = torch.randint(0, config.vocab_size, (2, 64))
    with FlopCounterMode(display=False) as counter:
        cross_entropy_sum(model(tokens, attend=attend), tokens).backward()
    assert counter.get_total_flops() == config.flops_per_token(64) * tokens.numel()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 5}, "hidden_size is 64; it must be a multiple of num_heads, 5"),
        ({"num_kv_heads": 3}, "num_heads is 4; it must be a multiple of num_kv_heads, 3"),
        ({"head_dim": 7}, "head_dim is 7"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"norm_eps": 0.0}, "norm_eps is 0.0"),
        ({"rope_theta": -1.0}, "rope_theta is -1.0"),
    ],
)
def test_an_impossible_shape_is_refused(change: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LlamaConfig.preset("llama-tiny", **change)


def test_an_unknown_preset_or_scaling_is_refused_with_the_choices() -> None:
    with pytest.raises(ValueError, match=r"llama-8b.*llama-7b"):
        LlamaConfig.preset("llama-8b")
    with pytest.raises(ValueError, match="'yarn'"):
        RopeScaling(rope_type="yarn", factor=2.0)  # type: ignore[arg-type]


def test_from_dict_inverts_to_dict() -> None:
    config = LlamaConfig.preset("llama-3.2-1b")
    assert LlamaConfig.from_dict(config.to_dict()) == config
