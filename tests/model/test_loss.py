from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llama_ray.model import loss
from llama_ray.model.config import LlamaConfig
from llama_ray.model.llama import Llama
from llama_ray.model.loss import cross_entropy_sum, head_loss
from llama_ray.utils.targets import IGNORE_INDEX
from llama_ray.utils.torch_private import TorchDispatchMode, tree_leaves

VOCAB, HIDDEN = 307, 24


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    # 30 tokens a chunk, which does not divide the number of tokens in the tests.
    monkeypatch.setattr(loss, "CHUNK_BYTES", 4 * VOCAB * 30)


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 50, HIDDEN, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(VOCAB, HIDDEN, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(0, VOCAB, (3, 50), generator=generator)
    targets[1, 10:40] = IGNORE_INDEX
    return hidden, weight, targets


def plain(hidden: Tensor, weight: Tensor, targets: Tensor, z_loss: float) -> Tensor:
    logits = F.linear(hidden, weight)
    log_z = logits.float().logsumexp(-1)[targets != IGNORE_INDEX]
    return cross_entropy_sum(logits, targets) + z_loss * log_z.square().sum()


@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
def test_values_and_gradients_are_those_of_the_plain_loss(z_loss: float) -> None:
    hidden, weight, targets = inputs()
    expected = plain(hidden, weight, targets, z_loss)
    grads = torch.autograd.grad(expected * 0.01, (hidden, weight))
    objective, cross_entropy = head_loss(hidden, weight, targets, scale=0.01, z_loss=z_loss).unbind()
    torch.testing.assert_close(objective, expected)
    torch.testing.assert_close(cross_entropy, cross_entropy_sum(F.linear(hidden, weight), targets))
    for ours, theirs in zip(torch.autograd.grad(objective * 0.01, (hidden, weight)), grads, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


def test_gradients_are_right_when_the_objective_is_scaled_differently_than_announced() -> None:
    hidden, weight, targets = inputs()
    expected = torch.autograd.grad(plain(hidden, weight, targets, 0.0) * 7, (hidden, weight))
    ours = torch.autograd.grad(head_loss(hidden, weight, targets, scale=2.0)[0] * 7, (hidden, weight))
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_it_is_as_accurate_as_the_plain_loss(dtype: torch.dtype) -> None:
    hidden, weight, targets = inputs()
    truth = torch.autograd.grad(plain(hidden, weight, targets, 1e-3), (hidden, weight))
    with torch.autocast("cpu", dtype):
        objective = head_loss(hidden, weight, targets, z_loss=1e-3)[0]
        expected = plain(hidden, weight, targets, 1e-3)
    torch.testing.assert_close(objective, expected, rtol=1e-5, atol=0)
    ours = torch.autograd.grad(objective, (hidden, weight))
    theirs = torch.autograd.grad(expected, (hidden, weight))
    for a, b, exact in zip(ours, theirs, truth, strict=True):
        assert a.dtype == torch.float32
        assert (a - exact).norm() <= 1.1 * (b - exact).norm()


def test_small_fp16_gradients_do_not_underflow_if_the_scale_is_announced() -> None:
    hidden, weight, targets = inputs()
    down, up = 1e-7, 1e6
    with torch.autocast("cpu", torch.float16):
        lost = head_loss(hidden, weight, targets, scale=down)[0] * down
        kept = head_loss(hidden, weight, targets, scale=down * up)[0] * (down * up)
    truth = torch.autograd.grad(plain(hidden, weight, targets, 0.0) * down, hidden)[0]
    assert (torch.autograd.grad(lost, hidden)[0] - truth).norm() > 0.05 * truth.norm()
    assert (torch.autograd.grad(kept, hidden)[0] / up - truth).norm() < 0.01 * truth.norm()


@pytest.mark.parametrize("tied", [False, True])
def test_the_model_computes_its_loss_from_targets(tied: bool) -> None:
    model = Llama(LlamaConfig.preset("llama-tiny", tie_embeddings=tied))
    tokens = torch.randint(0, 512, (2, 41))
    cross_entropy_sum(model(tokens[:, :-1]), tokens[:, 1:]).backward()
    expected = {n: p.grad for n, p in model.named_parameters()}
    model.zero_grad()
    model(tokens[:, :-1], targets=tokens[:, 1:])[0].backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], atol=1e-5, rtol=1e-4)


class Largest(TorchDispatchMode):
    """Records the number of elements of the largest tensor that is created."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_of_all_tokens_never_exist(dtype: torch.dtype) -> None:
    hidden, weight, targets = inputs()
    everything = targets.numel() * VOCAB
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        with Largest() as largest:
            head_loss(hidden, weight, targets)[0].backward()
        assert largest.elements <= max(30 * VOCAB, weight.numel()) < everything / 4
        with Largest() as largest:
            plain(hidden, weight, targets, 0.0).backward()
        assert largest.elements >= everything  # The mode does see such logits.


def test_without_gradients_the_loss_needs_no_graph() -> None:
    hidden, weight, targets = inputs()
    with torch.no_grad():
        both = head_loss(hidden, weight, targets)
        torch.testing.assert_close(both[1], cross_entropy_sum(F.linear(hidden, weight), targets))
    assert not both.requires_grad


def test_groups_of_rows_get_the_summed_loss_of_their_rows() -> None:
    hidden, weight, targets = inputs()
    groups = torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    result = head_loss(hidden, weight, targets, z_loss=1e-2, groups=groups)
    assert torch.equal(result[:2], head_loss(hidden, weight, targets, z_loss=1e-2))
    logits = F.linear(hidden, weight)
    of_group = [cross_entropy_sum(logits[rows], targets[rows]) for rows in ([1], [0, 2])]
    torch.testing.assert_close(result[2:], torch.stack([*of_group, torch.zeros(())]))
    ours = torch.autograd.grad(result[0], (hidden, weight))
    expected = torch.autograd.grad(plain(hidden, weight, targets, 1e-2), (hidden, weight))
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
