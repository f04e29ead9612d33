"""Products in float8, on a CPU, whose float8 products are slow and exact; GPUs are in tests/training/test_cuda.py."""

from __future__ import annotations

import pytest
import torch

from llama_ray.model.config import LlamaConfig
from llama_ray.model.llama import Llama
from llama_ray.training.config import TrainConfig
from llama_ray.training.parallel.float8 import check_float8, use_float8

TOKENS = 64


def make_model(**shape: int) -> Llama:
    config = LlamaConfig(
        **{
            "vocab_size": 96,
            "hidden_size": 64,
            "num_layers": 2,
            "num_heads": 4,
            "num_kv_heads": 2,
            "intermediate_size": 160,
            "max_seq_len": TOKENS // 2,
            **shape,
        }
    )
    return Llama(config)


def loss_and_gradients(model: Llama) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    tokens = torch.randint(96, (2, TOKENS // 2 + 1), generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(tokens[:, :-1], targets=tokens[:, 1:])[0] / TOKENS
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_losses_and_gradients_are_those_of_bf16_up_to_the_rounding_of_float8() -> None:
    plain, rounded = make_model(), make_model()
    use_float8(rounded, TOKENS)
    expected, gradients = loss_and_gradients(plain)
    loss, got = loss_and_gradients(rounded)
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=0)
    assert got.keys() == gradients.keys()
    for name, gradient in gradients.items():
        # e4m3 has 3 bits of fraction, e5m2 has 2: a number is off by up to an eighth.
        assert (got[name] - gradient).norm() < 0.2 * gradient.norm(), name
    assert any(not torch.equal(got[name], gradients[name]) for name in got)


def test_a_size_that_the_kernels_do_not_take_is_named() -> None:
    with pytest.raises(ValueError, match=r"batch_size x seq_len is 40; with precision fp8 .* multiple of 16"):
        use_float8(make_model(), 40)
    with pytest.raises(ValueError, match=r"outputs of mlp.gate_proj is 168; .*; use bf16"):
        use_float8(make_model(intermediate_size=168), TOKENS)


def test_a_cpu_is_refused_and_other_precisions_are_not() -> None:
    cpu = torch.device("cpu")
    with pytest.raises(ValueError, match="precision is fp8; it needs a GPU, and this run trains on a cpu"):
        check_float8(TrainConfig(precision="fp8"), cpu)
    check_float8(TrainConfig(precision="bf16"), cpu)
