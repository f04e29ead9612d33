from __future__ import annotations

import ctypes
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from llama_ray.generation.backends.batch import StepBatch
from llama_ray.generation.backends.cpu.cache import CpuCache
from llama_ray.generation.backends.cpu.linear import Format
from llama_ray.generation.backends.cpu.modules import accelerate
from llama_ray.generation.backends.quantize import GROUP_SIZE, Quantization, quantize
from llama_ray.model.config import LlamaConfig
from llama_ray.model.llama import Llama
from tests.generation.helpers import dequantize

CONFIGS = {
    "multi-head": {"num_heads": 4},
    "grouped, tied": {"num_heads": 4, "num_kv_heads": 2, "tie_embeddings": True},
    "odd": {"num_heads": 3, "head_dim": 14, "num_kv_heads": 1},
}


def random_model(dtype: torch.dtype, **numbers: int) -> Llama:
    """Return a model with larger weights than training starts from, so that logits differ and attention matters."""
    config = LlamaConfig(
        **{"vocab_size": 211, "hidden_size": 56, "num_layers": 3, "intermediate_size": 101, **numbers},
        max_seq_len=128,
    )
    model = Llama(config, seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(5)
            else:
                parameter.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(1))
    return model.to(dtype)


def tokens(batch: int, seq: int) -> torch.Tensor:
    return torch.randint(211, (batch, seq), generator=torch.Generator().manual_seed(0))


def logits(model: Llama, ids: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
    return model.head(model.hidden(ids, positions))


@pytest.mark.parametrize("name", CONFIGS)
@torch.inference_mode()
def test_fp32_logits_equal_those_of_the_plain_model(kernels: ctypes.CDLL, name: str) -> None:
    model = random_model(torch.float32, **CONFIGS[name])
    ids = tokens(2, 50)
    positions = torch.stack([torch.arange(50), torch.arange(50) + 30])
    expected = logits(model, ids, positions)
    result = logits(accelerate(model), ids, positions)
    torch.testing.assert_close(result, expected, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("name", CONFIGS)
@torch.inference_mode()
def test_bfloat16_logits_are_as_precise_as_those_of_the_plain_model(kernels: ctypes.CDLL, name: str) -> None:
    model = random_model(torch.bfloat16, **CONFIGS[name])
    ids = tokens(2, 50)
    plain = logits(model, ids).float()
    exact = logits(random_model(torch.bfloat16, **CONFIGS[name]).float(), ids)
    result = logits(accelerate(model), ids)
    assert result.dtype == torch.float32
    assert (result - exact).norm() < 1.05 * (plain - exact).norm()


@pytest.mark.parametrize("format", ["int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_quantised_logits_are_close_to_those_of_a_plain_model_with_rounded_weights(
    kernels: ctypes.CDLL, dtype: torch.dtype, format: Quantization
) -> None:
    """Close, not equal: the kernels round inputs to 8 bits too."""
    model, rounded = (random_model(dtype, num_heads=4) for _ in range(2))
    for name, weight in rounded.named_parameters():
        if "proj" in name or "head" in name:
            padded = F.pad(weight, (0, -weight.shape[1] % GROUP_SIZE))
            values = dequantize(quantize(padded, "int8" if "head" in name else format))
            weight.copy_(values[:, : weight.shape[1]])
    ids = tokens(2, 50)
    expected = logits(rounded, ids).float()
    result = logits(accelerate(model, format), ids)
    assert (result - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("format", ["float32", "int8", "int4"])
@torch.inference_mode()
def test_logits_have_the_same_bits_in_cached_steps_and_in_one_step(
    kernels: ctypes.CDLL, format: Format
) -> None:
    """Compare a prompt in two chunks, followed by single tokens, with the same text in one step."""
    model = accelerate(random_model(torch.float32, num_heads=4, num_kv_heads=2), format)
    ids = tokens(1, 80)

    def run(edges: list[int]) -> torch.Tensor:
        cache = CpuCache(model.config, 3, torch.float32, 32)
        parts = []
        for start, end in pairwise(edges):
            positions = torch.arange(start, end)
            batch = StepBatch(
                tokens=ids[0, start:end],
                positions=positions,
                slots=positions,
                query_start=torch.tensor([0, end - start], dtype=torch.int32),
                context_len=torch.tensor([end], dtype=torch.int32),
                block_table=torch.tensor([[0, 1, 2]], dtype=torch.int32),
                logit_rows=positions,
            )
            parts.append(model.head(model.hidden(batch.tokens[None], positions, cache.attend(batch))))
        return torch.cat(parts, 1)

    assert run([0, 37, 60, *range(61, 81)]).equal(run([0, 80]))


def test_a_packed_model_keeps_no_plain_matrix_but_the_embedding() -> None:
    model = random_model(torch.bfloat16, num_heads=4)
    matrices = {id(p): p.numel() for p in model.parameters() if p.dim() == 2}
    embedding = model.embed_tokens.weight
    accelerate(model)
    assert [p for p in model.parameters() if p.dim() == 2] == [embedding]
    assert sum(matrices.values()) > embedding.numel()


def test_a_model_in_fp16_is_refused_before_anything_is_replaced() -> None:
    model = random_model(torch.float16, num_heads=4)
    with pytest.raises(ValueError, match="dtype is float16; the CPU kernels support"):
        accelerate(model)
    assert model.layers[0].self_attn.q_proj.weight.dtype == torch.float16
