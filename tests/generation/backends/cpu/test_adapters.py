from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch

from llama_ray.generation.adapters.active import Segment
from llama_ray.generation.adapters.plain import FUSED_PRODUCTS
from llama_ray.generation.adapters.weights import AdapterWeights, LowRank
from llama_ray.generation.backends.cpu import ops
from llama_ray.generation.backends.cpu.adapters import CpuKernels
from llama_ray.generation.backends.cpu.linear import PackedLinear
from llama_ray.generation.backends.prepare import prepare
from llama_ray.generation.engine import Engine
from llama_ray.generation.sampling.params import SamplingParams
from llama_ray.model.lora_config import linear_sizes
from tests.generation.adapters.helpers import merged, save_random_adapter
from tests.small_models import random_model, small_config

CONFIG = small_config(100, hidden_size=130, num_layers=2, num_heads=3, num_kv_heads=1, head_dim=50)
CONFIGS = [
    CONFIG,
    small_config(100, hidden_size=37, num_heads=3, num_kv_heads=1, head_dim=14, intermediate_size=71),
]


def random_weights(index: int, rank: int, seed: int, missing: str) -> AdapterWeights:
    generator = torch.Generator().manual_seed(seed)
    return AdapterWeights(
        {
            (layer, target): LowRank(
                torch.randn(rank, inputs, generator=generator),
                torch.randn(outputs, rank, generator=generator),
                0.5,
            )
            for layer in range(2)
            for target, (inputs, outputs) in linear_sizes(CONFIGS[index]).items()
            if target != missing
        }
    )


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_each_row_gets_the_product_of_its_adapter(
    kernels: ctypes.CDLL, dtype: torch.dtype, index: int
) -> None:
    config = CONFIGS[index]
    sizes = linear_sizes(config)
    library = CpuKernels(config, dtype)
    weights = [random_weights(index, 16, 1, "k_proj"), random_weights(index, 5, 2, "o_proj")]
    adapters = [library.pack(w) for w in weights]
    rows = [[0, 2, 3, 9, 5, 6, 7, 8], [4, 1]]
    step = library.begin([Segment(a, r) for a, r in zip(adapters, rows, strict=True)])
    for product, targets in FUSED_PRODUCTS.items():
        widths = [sizes[target][1] for target in targets]
        x = torch.randn(11, sizes[targets[0]][0], generator=torch.Generator().manual_seed(3)).to(dtype)
        y = torch.randn(11, sum(widths), generator=torch.Generator().manual_seed(4)).to(dtype)
        expected = y.double()
        for own, indices in zip(weights, rows, strict=True):
            for target, columns in zip(targets, expected.split(widths, 1), strict=True):
                if factor := own.factors.get((1, target)):
                    a, b = (t.to(dtype).double() for t in (factor.a, factor.b))
                    columns[indices] += 0.5 * (x[indices].double() @ a.T @ b.T)
        found = step.add(1, product, x, y.clone())
        torch.testing.assert_close(
            found.double(), expected, atol=2e-3, rtol=1e-5 if dtype.itemsize == 4 else 1e-2
        )
        assert found[10].equal(y[10])
        for own, indices in zip(adapters, rows, strict=True):
            alone = library.begin([Segment(own, indices[-1:])]).add(1, product, x, y.clone())
            assert alone[indices[-1]].equal(found[indices[-1]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_an_activation_of_its_own_has_the_bits_of_the_one_in_the_product(
    kernels: ctypes.CDLL, dtype: torch.dtype
) -> None:
    weight, x = torch.randn(2 * 101, 64).to(dtype), torch.randn(7, 64).to(dtype)
    packed = PackedLinear(weight, "float32" if dtype == torch.float32 else "bfloat16", gated=True)
    assert ops.silu_product(packed.apart(x)).equal(packed(x))


def test_inputs_of_an_odd_number_keep_their_rows_beside_quantised_weights(
    kernels: ctypes.CDLL, tmp_path: Path
) -> None:
    config = small_config(100, intermediate_size=63)
    adapter = save_random_adapter(tmp_path / "adapter", config, 1, rank=5)
    model = random_model(config).bfloat16()
    params = SamplingParams(max_tokens=1, prompt_logprobs=0)

    def logprobs(engine: Engine, adapter: str | None) -> torch.Tensor:
        [completion] = engine.generate([[i * 7 % 50 for i in range(40)]], params, adapter=adapter)
        return torch.tensor([entry.logprob for entry in completion.prompt_logprobs or []])

    expected = logprobs(Engine(prepare(merged(model, adapter), "int8"), None), None)
    engine = Engine(prepare(model, "int8"), None)
    plain = logprobs(engine, None)
    engine.add_adapter("a", adapter)
    assert (plain - expected).abs().mean() > 0.4
    # It differs by the rounding of the weights to 8 bits.
    assert (logprobs(engine, "a") - expected).abs().mean() < 0.05
