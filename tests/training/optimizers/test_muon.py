import pytest
import torch

from llama_ray.model.config import LlamaConfig
from llama_ray.model.llama import Llama
from llama_ray.training.config import TrainConfig
from llama_ray.training.optimizers.build import build_optimizer
from llama_ray.training.optimizers.muon import orthogonalize


@pytest.mark.parametrize("shape", [(64, 64), (40, 120), (120, 40)])
def test_orthogonalised_matrices_have_singular_values_near_one(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalize(matrix).float())
    assert values.max() < 1.3
    assert values.median() > 0.6
    # The exact result is U V^T of the singular value decomposition.
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    exact = u @ vh
    found = orthogonalize(matrix).float()
    assert (exact * found).sum() / (exact.norm() * found.norm()) > 0.95


def test_updates_are_those_of_torch_and_of_adamw() -> None:
    config = LlamaConfig.preset("llama-tiny")
    ours, theirs = Llama(config, seed=1), Llama(config, seed=1)
    optimizer = build_optimizer(ours, TrainConfig(optimizer="muon", learning_rate=1e-2, weight_decay=0.1))
    named = dict(theirs.named_parameters())
    inside = {n: p for n, p in named.items() if n.startswith("layers.") and p.dim() == 2}
    rest = {n: p for n, p in named.items() if n not in inside}
    peers = [
        torch.optim.Muon(inside.values(), lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(
            [
                {"params": [p for p in rest.values() if p.dim() == 2], "weight_decay": 0.1},
                {"params": [p for p in rest.values() if p.dim() == 1], "weight_decay": 0.0},
            ],
            lr=1e-2,
            betas=(0.9, 0.95),
        ),
    ]
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        optimizer.step()
        for peer in peers:
            peer.step()
    before = dict(Llama(config, seed=1).named_parameters())
    for name, parameter in ours.named_parameters():
        moved, expected = parameter - before[name], named[name] - before[name]
        # torch iterates in bf16 too, but in another order, so the two round differently.
        assert (moved - expected).norm() < 0.02 * expected.norm(), name
