import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from llama_ray.data.dataset.batch import Batch
from llama_ray.data.dataset.token_dataset import TokenDataset
from llama_ray.data.mixtures.loader import Loader
from llama_ray.data.mixtures.mixture import Mixture
from llama_ray.model.config import LlamaConfig
from llama_ray.model.llama import Llama
from llama_ray.model.loss import cross_entropy_sum
from llama_ray.training.config import TrainConfig
from llama_ray.training.optimizers.build import build_optimizer
from llama_ray.training.parallel.layout import choose_layout
from llama_ray.training.parallel.parallelize import gather_model, parallelize
from llama_ray.training.parallel.process_group import rank, world_size
from llama_ray.training.step import Stepper
from llama_ray.utils.targets import IGNORE_INDEX
from tests.model.attention.helpers import documents_of, starts_of
from tests.training.helpers import CPU, in_processes


def take_steps(config: LlamaConfig, data: Path, accumulation: int, steps: int = 3) -> dict[str, Any]:
    """Take a few steps of two sequences per worker and micro-step, with unequal numbers of targets."""
    settings = TrainConfig(learning_rate=1e-3, precision="fp32", max_grad_norm=0.5, seed=1, parallelism="ddp")
    layout = choose_layout(config, settings, world_size()).with_mesh(CPU)
    replica = parallelize(Llama(config, device="meta"), settings, layout, CPU, compile_blocks=False)
    optimizer = build_optimizer(replica, settings)
    exchanges = 0

    def count(state: object, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        nonlocal exchanges
        exchanges += bucket.is_last()
        summed = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
        return summed.then(lambda f: f.value()[0] / world_size())

    if world_size() > 1:
        replica.register_comm_hook(None, count)
    stepper = Stepper(replica, optimizer, settings, device=CPU, layout=layout)
    loader = Loader(
        Mixture.of(TokenDataset(data, "train")),
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
        for batch in batches:
            batch.targets[batch.inputs % 3 == 0] = IGNORE_INDEX
        result = stepper.step(batches)
        losses.append(result.loss.item())
        norms.append(result.grad_norm.item())
    plain = gather_model(replica)
    assert plain is not None
    weights = {n: p.numpy() for n, p in plain.named_parameters()}
    return {"losses": losses, "norms": norms, "weights": weights, "exchanges": exchanges}


def alone(config: LlamaConfig, **settings: Any) -> Stepper:
    """A stepper on one worker, in fp32 by default."""
    training = TrainConfig(**{"precision": "fp32", **settings})
    model = Llama(config)
    return Stepper(model, build_optimizer(model, training), training, device=CPU)


def batch_of(config: LlamaConfig, sequences: int) -> Batch:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, config.vocab_size, (sequences, 33), generator=generator)
    return Batch(tokens[:, :-1], tokens[:, 1:])


@pytest.fixture(scope="module")
def one_worker(tiny: LlamaConfig, dataset: Path) -> dict[str, Any]:
    """Steps of eight sequences in four micro-steps."""
    return take_steps(tiny, dataset, 4)


@pytest.fixture(scope="module", params=[2, 4], ids="{} workers".format)
def by_rank(request: pytest.FixtureRequest, tiny: LlamaConfig, dataset: Path) -> list[dict[str, Any]]:
    """The same steps, split over several workers with fewer micro-steps each."""
    return in_processes(request.param, take_steps, tiny, dataset, 4 // request.param)


def test_steps_on_one_worker_learn(one_worker: dict[str, Any]) -> None:
    assert one_worker["losses"][-1] < one_worker["losses"][0]


def test_losses_do_not_depend_on_how_the_global_batch_is_split(
    one_worker: dict[str, Any], by_rank: list[dict[str, Any]]
) -> None:
    for result in by_rank:
        assert result["losses"] == pytest.approx(one_worker["losses"], abs=1e-5)
        assert result["norms"] == pytest.approx(one_worker["norms"], rel=1e-4)


def test_weights_do_not_depend_on_how_the_global_batch_is_split(
    one_worker: dict[str, Any], by_rank: list[dict[str, Any]]
) -> None:
    for result in by_rank:
        for name, weight in result["weights"].items():
            expected = torch.from_numpy(one_worker["weights"][name])
            torch.testing.assert_close(torch.from_numpy(weight), expected, atol=2e-5, rtol=0)


def test_gradients_are_exchanged_once_per_step_not_once_per_micro_step(by_rank: list[dict[str, Any]]) -> None:
    assert [result["exchanges"] for result in by_rank] == [3] * len(by_rank)


def test_an_accumulated_gradient_is_that_of_the_whole_batch(tiny: LlamaConfig) -> None:
    batch = batch_of(tiny, 4)
    inputs, targets = batch.inputs, batch.targets.clone()
    targets[1] = IGNORE_INDEX
    reference = Llama(tiny)
    (cross_entropy_sum(reference(inputs), targets) / (targets != IGNORE_INDEX).sum()).backward()
    expected = torch.nn.utils.get_total_norm([p.grad for p in reference.parameters()])

    stepper = alone(tiny, max_grad_norm=0)
    result = stepper.step([Batch(inputs[i : i + 1], targets[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(result.grad_norm, expected)


def packed_batch(config: LlamaConfig) -> Batch:
    """Two rows of 32 tokens, of documents of 1 to 20; the last token of a document has no target."""
    plain, starts = batch_of(config, 2), starts_of([[5, 1, 20], [12, 7]], 32)
    targets = plain.targets.clone()
    targets[:, :-1][starts[:, 1:] != starts[:, :-1]] = IGNORE_INDEX
    return Batch(plain.inputs, targets, starts)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_packed_batch_is_a_step_on_its_documents_alone(tiny: LlamaConfig, precision: Any) -> None:
    batch = packed_batch(tiny)
    assert batch.starts is not None
    alone_each = [
        Batch(batch.inputs[row : row + 1, begin:end], batch.targets[row : row + 1, begin:end])
        for row, begin, end in documents_of(batch.starts)
    ]
    assert len(alone_each) == 7
    packed, apart = (alone(tiny, max_grad_norm=0, precision=precision) for _ in range(2))
    tolerance = 1e-5 if precision == "fp32" else 2e-2
    assert packed.validate([batch]).loss == pytest.approx(apart.validate(alone_each).loss, rel=tolerance)
    result, expected = packed.step([batch]), apart.step(alone_each)
    assert result.loss.item() == pytest.approx(expected.loss.item(), rel=tolerance)
    assert result.grad_norm.item() == pytest.approx(expected.grad_norm.item(), rel=tolerance)
    if precision == "fp32":
        # Documents that see each other have other losses.
        leaky = alone(tiny).validate([Batch(batch.inputs, batch.targets)]).loss
        assert leaky != pytest.approx(expected.loss.item(), rel=10 * tolerance)


@pytest.mark.parametrize("masked", [False, True])
def test_a_micro_batch_without_targets_changes_nothing(tiny: LlamaConfig, masked: bool) -> None:
    batch = packed_batch(tiny) if masked else batch_of(tiny, 2)
    empty = Batch(batch.inputs, torch.full_like(batch.targets, IGNORE_INDEX), batch.starts)
    with_it, without = (alone(tiny).step(batches) for batches in ([empty, batch, empty], [batch]))
    for name in ("loss", "tokens", "grad_norm", "skipped"):
        torch.testing.assert_close(getattr(with_it, name), getattr(without, name))
    nothing = alone(tiny).step([empty])
    assert (nothing.loss, nothing.tokens, nothing.grad_norm) == (0, 0, 0)
    assert not nothing.skipped


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_every_precision_learns_and_keeps_fp32_weights(tiny: LlamaConfig, precision: Any) -> None:
    batch = batch_of(tiny, 4)
    stepper = alone(tiny, learning_rate=3e-3, precision=precision)
    model = stepper.model
    seen: list[torch.dtype] = []
    model.layers[0].mlp.register_forward_hook(lambda *a: seen.append(a[2].dtype))
    losses = [stepper.step([batch]).loss.item() for _ in range(25)]
    assert losses[-1] < losses[0] - 1
    assert seen[0] == {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert stepper.scaler.enabled == (precision == "fp16")


def test_an_overflow_in_fp16_skips_the_step_and_lowers_the_scale(tiny: LlamaConfig) -> None:
    stepper = alone(tiny, precision="fp16")
    stepper.scaler.load_state_dict(stepper.scaler.state_dict() | {"scale": 2.0**40})
    before = copy.deepcopy(stepper.model.state_dict())
    result = stepper.step([batch_of(tiny, 2)])
    assert result.skipped
    torch.testing.assert_close(stepper.model.state_dict(), before, atol=0, rtol=0)
    assert stepper.scaler.state_dict()["scale"] == 2.0**39


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_whose_loss_is_not_finite_changes_nothing(tiny: LlamaConfig, optimizer: Any) -> None:
    stepper = alone(tiny, optimizer=optimizer, learning_rate=1e-3)
    good = batch_of(tiny, 4)
    assert not stepper.step([good]).skipped
    before = copy.deepcopy((stepper.model.state_dict(), stepper.optimizer.state_dict()))

    poison = stepper.model.norm.register_forward_hook(lambda module, args, out: out * float("nan"))
    result = stepper.step([good])
    poison.remove()
    assert result.skipped
    assert not result.loss.isfinite()
    after = stepper.model.state_dict(), stepper.optimizer.state_dict()
    torch.testing.assert_close(after, before, atol=0, rtol=0)

    result = stepper.step([good])
    assert not result.skipped
    assert result.loss.isfinite()
    assert not torch.equal(stepper.model.lm_head.weight, before[0]["lm_head.weight"])


def test_z_loss_pulls_the_normaliser_to_one_and_is_not_reported(tiny: LlamaConfig) -> None:
    batch = batch_of(tiny, 4)

    def log_z(stepper: Stepper) -> float:
        with torch.no_grad():
            return stepper.model(batch.inputs).logsumexp(-1).square().mean().item()

    plain, pulled = (alone(tiny, z_loss=z, learning_rate=3e-3) for z in (0.0, 1.0))
    torch.testing.assert_close(plain.step([batch]).loss, pulled.step([batch]).loss)
    for _ in range(15):
        plain.step([batch])
        pulled.step([batch])
    assert log_z(pulled) < 0.8 * log_z(plain)


def test_validation_weighs_batches_by_their_tokens(tiny: LlamaConfig) -> None:
    # z-loss is part of training only.
    stepper = alone(tiny, z_loss=0.1)
    tokens = torch.randint(0, tiny.vocab_size, (5, 33))
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    whole = stepper.validate([Batch(inputs, targets)])
    halves = [Batch(inputs[:1], targets[:1]), Batch(inputs[1:], targets[1:])]
    assert stepper.validate(halves).loss == pytest.approx(whole.loss)
    assert whole.source_losses == ()
    with torch.no_grad():
        assert whole.loss == pytest.approx((cross_entropy_sum(stepper.model(inputs), targets) / 160).item())


def test_the_loss_of_a_source_is_that_of_its_rows_alone(tiny: LlamaConfig) -> None:
    """Also if its rows are in several micro-batches; a source without a target has none."""
    model = Llama(tiny)
    config = TrainConfig(precision="fp32", z_loss=0.1, learning_rate=1e-3)
    stepper = Stepper(model, build_optimizer(model, config), config, device=CPU, num_sources=3)
    whole = batch_of(tiny, 4)
    inputs, targets, sources = whole.inputs, whole.targets.clone(), torch.tensor([2, 0, 2, 0])
    targets[2, 5:] = IGNORE_INDEX
    with torch.no_grad():
        logits = model(inputs)
        expected = [
            (cross_entropy_sum(logits[rows], targets[rows]) / (targets[rows] != IGNORE_INDEX).sum()).item()
            for rows in (sources == 0, sources == 2)
        ]
    halves = [Batch(inputs[rows], targets[rows], sources=sources[rows]) for rows in ([0, 1], [2, 3])]
    validation = stepper.validate(halves)
    result = stepper.step(halves)
    for found in (list(validation.source_losses), result.source_losses.tolist()):
        assert found[1] != found[1]
        assert [found[0], found[2]] == pytest.approx(expected, abs=1e-5)
    assert result.loss.item() == pytest.approx(validation.loss, abs=1e-5)
