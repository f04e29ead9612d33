"""Accelerated models add the adapters of a step, as plain models with merged weights would compute."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed (the CPU build of torch comes without)")

from llama_ray.generation.adapters.weights import AdapterWeights
from llama_ray.generation.backends.cuda.backend import CudaBackend
from llama_ray.generation.backends.cuda.cache import PagedCache
from llama_ray.generation.backends.cuda.graphs import CudaCapture, GraphRunner
from llama_ray.generation.backends.kv_cache import TorchCache
from llama_ray.generation.backends.runner import Runner
from llama_ray.model.llama import Llama
from tests.generation.adapters.helpers import merged, save_random_adapter
from tests.generation.backends.cuda.helpers import BLOCK_SIZE
from tests.generation.backends.cuda.test_runner import DECODES, eager, make_batch, make_model, prompts_of


def plain_logits(model: Llama, chunks: list[tuple[int, int]]) -> torch.Tensor:
    weight = model.embed_tokens.weight
    runner = Runner(model, TorchCache(model.config, 66, weight.dtype, weight.device, BLOCK_SIZE))
    runner.forward(make_batch(prompts_of(chunks)))
    return runner.forward(make_batch(chunks))


@torch.inference_mode()
@pytest.mark.parametrize("accelerated", [True, False])
def test_each_sequence_gets_the_logits_of_its_merged_model(
    device: torch.device, tmp_path: Path, accelerated: bool
) -> None:
    model = make_model(device)
    directories = [save_random_adapter(tmp_path / str(i), model.config, i) for i in range(2)]
    own = copy.deepcopy(model)
    backend = CudaBackend.convert(own, None, False) if accelerated else CudaBackend(own)
    kernels = backend.adapter_kernels(max_loras=2)
    one, two = (kernels.pack(AdapterWeights.read(directory)) for directory in directories)
    cache = PagedCache(model.config, 66, model.embed_tokens.weight.dtype, device, BLOCK_SIZE)
    capture = CudaCapture() if device.type == "cuda" else eager
    runner = GraphRunner(backend.model, cache, 8, 96, capture, backend.adapters)
    expected = [plain_logits(m, DECODES) for m in (model, *(merged(model, d) for d in directories))]
    adapters = [None, one, two, one, None]
    for chunks in (prompts_of(DECODES), DECODES):
        with backend.adapters.rows([(a, c[0]) for a, c in zip(adapters, chunks, strict=True)]):
            logits = runner.forward(make_batch(chunks))
    assert not runner.graphs, "a recorded step knows no adapters"
    for row, which in enumerate((0, 1, 2, 1, 0)):
        torch.testing.assert_close(logits[row], expected[which][row], atol=5e-4, rtol=5e-4)
    plain = runner.forward(make_batch(DECODES[:1]))
    torch.testing.assert_close(plain[0], plain_logits(model, DECODES[:1])[0], atol=5e-4, rtol=5e-4)
