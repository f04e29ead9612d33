from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from llama_ray.data.loader import Loader, TokenDataset
from llama_ray.model.config import LlamaConfig
from llama_ray.model.llama import Llama
from llama_ray.model.loss import IGNORE, cross_entropy_sum
from llama_ray.training.config import TrainConfig
from llama_ray.training.optimizer import build_optimizer
from llama_ray.training.parallel import parallelize, rank, unwrap, world_size
from llama_ray.training.step import Stepper
from tests.training.processes import in_processes

CPU = torch.device("cpu")


def take_steps(config: LlamaConfig, data: Path, accumulation: int, steps: int = 3) -> dict[str, Any]:
    """A few steps of two sequences per worker and micro-step; uneven targets, as a masked data set has."""
    model = Llama(config, seed=1)
    optimizer = build_optimizer(model, TrainConfig(learning_rate=1e-3))
    replica = parallelize(model, CPU, compile_blocks=False)
    exchanges = 0

    def count(state: object, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        nonlocal exchanges
        exchanges += bucket.is_last()
        summed = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
        return summed.then(lambda f: f.value()[0] / world_size())

    if world_size() > 1:
        replica.register_comm_hook(None, count)
    stepper = Stepper(replica, optimizer, device=CPU, precision="fp32", max_grad_norm=0.5)
    loader = Loader(
        TokenDataset(data, "train"),
        seq_len=32,
        batch_size=2,
        rank=rank(),
        world_size=world_size(),
        seed=0,
        gradient_accumulation_steps=accumulation,
    )
    losses, norms = [], []
    for _ in range(steps):
        batches = loader.next_global_batch()
        for inputs, targets in batches:
            targets[inputs % 3 == 0] = IGNORE
        result = stepper.step(batches)
        losses.append(result.mean_loss())
        norms.append(result.grad_norm.item())
    weights = {n: p.detach().numpy() for n, p in unwrap(replica).named_parameters()}
    return {"losses": losses, "norms": norms, "weights": weights, "exchanges": exchanges}


def test_a_global_batch_can_be_split_any_way(tiny: LlamaConfig, dataset: Path) -> None:
    alone = take_steps(tiny, dataset, 4)
    assert alone["losses"][-1] < alone["losses"][0]
    for workers in (2, 4):
        for result in in_processes(workers, take_steps, tiny, dataset, 4 // workers):
            assert result["losses"] == pytest.approx(alone["losses"], abs=1e-5)
            assert result["norms"] == pytest.approx(alone["norms"], rel=1e-4)
            for name, weight in result["weights"].items():
                torch.testing.assert_close(
                    torch.from_numpy(weight), torch.from_numpy(alone["weights"][name]), atol=2e-5, rtol=0
                )
            # Three steps, one exchange each, however many micro-steps a step has.
            assert result["exchanges"] == 3


def test_an_accumulated_gradient_is_that_of_the_whole_batch(tiny: LlamaConfig) -> None:
    tokens = torch.randint(0, tiny.vocab_size, (4, 33), generator=torch.Generator().manual_seed(0))
    inputs, targets = tokens[:, :-1], tokens[:, 1:].clone()
    targets[1] = IGNORE
    reference = Llama(tiny)
    (cross_entropy_sum(reference(inputs), targets) / (targets != IGNORE).sum()).backward()
    expected = torch.nn.utils.get_total_norm([p.grad for p in reference.parameters()])

    model = Llama(tiny)
    stepper = Stepper(
        model, build_optimizer(model, TrainConfig()), device=CPU, precision="fp32", max_grad_norm=0
    )
    result = stepper.step([(inputs[i : i + 1], targets[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(result.grad_norm, expected)


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_every_precision_learns_and_keeps_fp32_weights(tiny: LlamaConfig, precision: Any) -> None:
    tokens = torch.randint(0, tiny.vocab_size, (4, 33), generator=torch.Generator().manual_seed(0))
    batch = (tokens[:, :-1], tokens[:, 1:])
    model = Llama(tiny)
    optimizer = build_optimizer(model, TrainConfig(learning_rate=3e-3))
    stepper = Stepper(model, optimizer, device=CPU, precision=precision, max_grad_norm=1.0)
    seen: list[torch.dtype] = []
    model.layers[0].mlp.register_forward_hook(lambda *a: seen.append(a[2].dtype))
    losses = [stepper.step([batch]).mean_loss() for _ in range(25)]
    assert losses[-1] < losses[0] - 1
    assert seen[0] == {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert stepper.scaler.is_enabled() == (precision == "fp16")


def test_an_overflow_in_fp16_skips_the_step_and_lowers_the_scale(tiny: LlamaConfig) -> None:
    tokens = torch.randint(0, tiny.vocab_size, (2, 33))
    model = Llama(tiny)
    stepper = Stepper(
        model, build_optimizer(model, TrainConfig()), device=CPU, precision="fp16", max_grad_norm=1.0
    )
    stepper.scaler.load_state_dict(stepper.scaler.state_dict() | {"scale": 2.0**40})
    before = model.lm_head.weight.detach().clone()
    result = stepper.step([(tokens[:, :-1], tokens[:, 1:])])
    assert not torch.isfinite(result.grad_norm)
    assert torch.equal(model.lm_head.weight, before)
    assert stepper.scaler.get_scale() == 2.0**39


def test_validation_weighs_by_tokens(tiny: LlamaConfig) -> None:
    model = Llama(tiny)
    stepper = Stepper(
        model, build_optimizer(model, TrainConfig()), device=CPU, precision="fp32", max_grad_norm=0
    )
    tokens = torch.randint(0, tiny.vocab_size, (5, 33))
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    whole = stepper.validate([(inputs, targets)])
    assert stepper.validate([(inputs[:1], targets[:1]), (inputs[1:], targets[1:])]) == pytest.approx(whole)
    with torch.no_grad():
        assert whole == pytest.approx((cross_entropy_sum(model(inputs), targets) / 160).item())
