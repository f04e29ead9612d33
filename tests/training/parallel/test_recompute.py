from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from llama_ray.model.attention.documents import DocumentAttention
from llama_ray.model.config import LlamaConfig
from llama_ray.model.llama import Llama
from llama_ray.training.parallel.recompute import checkpoint_block
from llama_ray.utils.torch_private import TorchDispatchMode
from tests.model.attention.helpers import starts_of

CONFIG = LlamaConfig.preset("llama-tiny", num_layers=3)
TOKENS = torch.randint(0, 512, (2, 65), generator=torch.Generator().manual_seed(0))


STARTS = starts_of([[3, 1, 30], [40]], 64)


class Calls(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.name()] += 1
        return func(*args, **(kwargs or {}))


def backward(mode: Any, *, documents: bool = False) -> tuple[dict[str, torch.Tensor], int]:
    """Return gradients by name, and the number of floating point operations that they took."""
    model = Llama(CONFIG)
    for block in model.layers:
        checkpoint_block(block, mode)
    attend = DocumentAttention(STARTS) if documents else None
    with FlopCounterMode(display=False) as counter:
        model(TOKENS[:, :-1], attend=attend, targets=TOKENS[:, 1:])[0].backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, counter.get_total_flops()


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("mode", ["selective", "full"])
def test_gradients_are_the_same_to_the_bit(mode: str, documents: bool) -> None:
    expected, _ = backward("none", documents=documents)
    torch.testing.assert_close(backward(mode, documents=documents)[0], expected, atol=0, rtol=0)


@pytest.mark.parametrize(("mode", "times"), [("none", 1), ("selective", 1), ("full", 2)])
def test_selective_does_not_attend_within_documents_again(mode: Any, times: int) -> None:
    with Calls() as calls:
        backward(mode, documents=True)
    assert calls.counts["llama_ray::document_attention"] == times * CONFIG.num_layers
    assert calls.counts["llama_ray::document_attention_backward"] == CONFIG.num_layers


def test_selective_recomputes_less_than_full() -> None:
    none, selective, full = (backward(mode)[1] for mode in ("none", "selective", "full"))
    # One forward pass through all blocks.
    blocks = full - none
    assert blocks > 0.2 * none
    # Selective recomputes half of the matrix products and no attention.
    assert 0.2 * blocks < selective - none < 0.6 * blocks


def test_names_of_parameters_and_evaluation_do_not_change() -> None:
    model = Llama(CONFIG)
    names = list(model.state_dict())
    with torch.no_grad():
        expected = model(TOKENS)
        for block in model.layers:
            checkpoint_block(block, "full")
        torch.testing.assert_close(model(TOKENS), expected, atol=0, rtol=0)
    assert list(model.state_dict()) == names
