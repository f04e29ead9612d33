import pytest
import torch

from llama_ray.model.config import LlamaConfig
from llama_ray.model.llama import Llama
from llama_ray.training.config import TrainConfig
from llama_ray.training.parallel.layout import GIB, Layout, activation_bytes, choose_layout, state_bytes

TINY = LlamaConfig.preset("llama-tiny")


def sizes(layout: Layout) -> tuple[int, int, int]:
    return layout.replicas, layout.shards, layout.tensor


@pytest.mark.parametrize(
    ("preset", "workers", "node", "expected", "why"),
    [
        ("llama-110m", 1, 1, (1, 1, 1), "one worker"),
        ("llama-110m", 8, 8, (8, 1, 1), "ddp on 8 workers, the whole model fits"),
        ("llama-7b", 8, 8, (1, 8, 1), "fsdp over 8 workers"),
        ("llama-7b", 64, 8, (8, 8, 1), "hsdp, 8 replicas, each sharded within a node of 8"),
        ("llama-65b", 64, 8, (1, 64, 1), "fsdp over 64 workers"),
    ],
)
def test_auto_picks_what_fits_an_80_gib_gpu_and_says_why(
    preset: str, workers: int, node: int, expected: tuple[int, int, int], why: str
) -> None:
    config = TrainConfig(batch_size=1, activation_checkpointing="full")
    model = LlamaConfig.preset(preset)
    layout = choose_layout(model, config, workers, memory_bytes=80 * GIB, node_size=node)
    assert sizes(layout) == expected
    assert why in layout.reason
    assert "GiB a worker of 80" in layout.reason
    assert layout.data_world == workers


def test_auto_adds_tensor_parallelism_if_activations_alone_are_too_large() -> None:
    model = LlamaConfig.preset("llama-7b", max_seq_len=16384)
    config = TrainConfig(batch_size=1)
    assert activation_bytes(model, config) > 80 * GIB
    layout = choose_layout(model, config, 64, memory_bytes=80 * GIB, node_size=8)
    assert sizes(layout) == (1, 32, 2)
    assert "activations" in layout.reason
    assert layout.data_world == 32


def test_auto_warns_if_no_layout_fits() -> None:
    layout = choose_layout(LlamaConfig.preset("llama-65b"), TrainConfig(), 2, memory_bytes=8 * GIB)
    assert sizes(layout) == (1, 2, 1)
    assert "may not fit" in layout.reason


def test_training_state_takes_16_bytes_per_parameter() -> None:
    assert state_bytes(LlamaConfig.preset("llama-7b"), TrainConfig()) == 16 * 6_738_415_616


@pytest.mark.parametrize(
    ("settings", "node", "expected"),
    [
        ({"parallelism": "ddp"}, 4, (8, 1, 1)),
        ({"parallelism": "fsdp"}, 4, (1, 8, 1)),
        ({"parallelism": "fsdp", "tensor_parallel": 2}, 4, (1, 4, 2)),
        ({"parallelism": "hsdp"}, 4, (2, 4, 1)),
        ({"parallelism": "hsdp", "fsdp_size": 2}, 4, (4, 2, 1)),
        ({"parallelism": "hsdp", "tensor_parallel": 2}, 4, (2, 2, 2)),
    ],
)
def test_a_requested_layout_is_used(settings: dict, node: int, expected: tuple[int, int, int]) -> None:
    layout = choose_layout(TINY, TrainConfig(**settings), 8, node_size=node)
    assert sizes(layout) == expected
    assert layout.world_size == 8


@pytest.mark.parametrize(
    ("settings", "workers", "message"),
    [
        ({"tensor_parallel": 4}, 4, "tensor_parallel is 4; it must divide num_kv_heads, which is 2"),
        ({"tensor_parallel": 2}, 3, "tensor_parallel is 2; it must divide world_size, which is 3"),
        (
            {"tensor_parallel": 2, "seq_len": 31},
            2,
            "tensor_parallel is 2; it must divide seq_len, which is 31",
        ),
        (
            {"tensor_parallel": 2, "parallelism": "ddp"},
            4,
            "parallelism is ddp; .* it must be fsdp or hsdp",
        ),
        (
            {"fsdp_size": 3, "parallelism": "hsdp"},
            4,
            "fsdp_size is 3; it must divide 4, the number of workers",
        ),
    ],
)
def test_sizes_that_do_not_divide_are_refused(settings: dict, workers: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose_layout(TINY, TrainConfig(**settings), workers)


def test_the_estimate_of_activations_is_near_what_autograd_saves() -> None:
    model = LlamaConfig.preset("llama-30m", num_layers=4, vocab_size=512, max_seq_len=256)
    config = TrainConfig(batch_size=2, precision="bf16")
    llama = Llama(model)
    weights = {p.untyped_storage().data_ptr() for p in llama.parameters()}
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    tokens = torch.zeros(2, 256, dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.autocast("cpu", torch.bfloat16):
        llama(tokens, targets=tokens)
    # The hooks also see the bf16 copies of the weights that autocast makes; these are not activations.
    seen = sum(saved.values()) - 2 * model.num_parameters()
    assert 0.6 * seen < activation_bytes(model, config) < 1.7 * seen
