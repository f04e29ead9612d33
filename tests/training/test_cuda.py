"""Training on a GPU beside training on a CPU: the same losses, checkpoints that both read, NCCL with one rank."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from llama_ray.data.dataset.batch import Batch
from llama_ray.model.config import LlamaConfig
from llama_ray.model.llama import Llama
from llama_ray.training.config import TrainConfig
from llama_ray.training.loop import train
from llama_ray.training.optimizers.build import build_optimizer
from llama_ray.training.parallel.float8 import MIN_CAPABILITY
from llama_ray.training.parallel.layout import SINGLE_WORKER, Layout
from llama_ray.training.parallel.parallelize import gather_model, parallelize
from llama_ray.training.reporting.metrics import peak_memory_bytes
from llama_ray.training.step import Stepper
from tests.model.attention.helpers import starts_of
from tests.training.helpers import CPU, TWELVE_STEPS, FinishedRun, Recorder, losses, losses_after

pytestmark = pytest.mark.cuda
CUDA = torch.device("cuda")

# Losses of a few steps; both devices round differently, and each step builds on the ones before.
TOLERANCE = {"fp32": 1e-3, "bf16": 2e-2, "fp16": 2e-2}


def run_on(
    device: torch.device, model: LlamaConfig, config: TrainConfig, data: Path, **options: Any
) -> Recorder:
    recorder = Recorder()
    train(model, config, data, device=device, observer=recorder, **options)
    return recorder


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_losses_are_those_of_a_cpu(
    precision: Any, tiny: LlamaConfig, dataset: Path, request: pytest.FixtureRequest
) -> None:
    """Both begin with a checkpoint, because each kind of device draws its own initial weights."""
    pytest.importorskip("pyarrow", reason="checkpoints need pyarrow")
    start = request.getfixturevalue("finished").checkpoint(5)
    config = replace(TWELVE_STEPS, precision=precision, compile=False)
    # fp16 is for GPUs only; its losses are near those of fp32.
    reference = replace(config, precision="fp32" if precision == "fp16" else precision)
    got = run_on(CUDA, tiny, config, dataset, resume_from=start)
    expected = run_on(CPU, tiny, reference, dataset, resume_from=start)
    assert losses(got) == pytest.approx(losses(expected), rel=TOLERANCE[precision])
    validation = {step: m["loss/validation"] for step, m in expected.validations.items()}
    assert {s: m["loss/validation"] for s, m in got.validations.items()} == pytest.approx(
        validation, rel=TOLERANCE[precision]
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"compile": True},
        {"compile": True, "gradient_accumulation_steps": 2, "batch_size": 4},
        {"compile": True, "activation_checkpointing": "selective"},
        {"compile": False, "activation_checkpointing": "full"},
    ],
    ids=str,
)
def test_compilation_accumulation_and_recomputation_change_losses_by_rounding_only(
    settings: dict[str, Any], tiny: LlamaConfig, dataset: Path
) -> None:
    plain = run_on(CUDA, tiny, replace(TWELVE_STEPS, compile=False), dataset)
    other = run_on(CUDA, tiny, replace(TWELVE_STEPS, **settings), dataset)
    assert losses(other) == pytest.approx(losses(plain), rel=2e-2)


def test_float8_learns_as_bf16_does(tiny: LlamaConfig, dataset: Path) -> None:
    if torch.cuda.get_device_capability() < MIN_CAPABILITY:
        pytest.skip("this GPU has no float8 units")
    expected = run_on(CUDA, tiny, replace(TWELVE_STEPS, compile=False), dataset)
    for compile_blocks in (False, True):
        config = replace(TWELVE_STEPS, precision="fp8", compile=compile_blocks)
        assert losses(run_on(CUDA, tiny, config, dataset)) == pytest.approx(losses(expected), rel=5e-2)


def test_muon_trains_as_on_a_cpu(tiny: LlamaConfig, dataset: Path) -> None:
    config = replace(TWELVE_STEPS, optimizer="muon", precision="fp32", compile=False)
    got, expected = run_on(CUDA, tiny, config, dataset), run_on(CPU, tiny, config, dataset)
    # Each kind of device draws its own initial weights.
    assert losses(got) == pytest.approx(losses(expected), rel=5e-2)


def test_a_run_resumes_on_the_other_device(
    tiny: LlamaConfig, dataset: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """A checkpoint of a CPU goes on on a GPU, and the GPU's checkpoint on a CPU."""
    pytest.importorskip("pyarrow", reason="checkpoints need pyarrow")
    finished: FinishedRun = request.getfixturevalue("finished")
    config = replace(TWELVE_STEPS, compile=False)
    on_gpu = run_on(CUDA, tiny, config, dataset, output_dir=str(tmp_path), resume_from=finished.checkpoint(5))
    expected = losses(finished.recorder)
    assert losses(on_gpu) == pytest.approx(losses_after(5, expected), rel=TOLERANCE["bf16"])
    on_cpu = run_on(CPU, tiny, config, dataset, resume_from=tmp_path / finished.checkpoint(10).name)
    assert losses(on_cpu) == pytest.approx(losses_after(10, expected), rel=TOLERANCE["bf16"])


def test_with_deterministic_kernels_a_resumed_run_has_the_same_losses_to_the_bit(
    tiny: LlamaConfig, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By default the backward pass of flash attention adds in any order, and a repeated run differs by rounding."""
    pytest.importorskip("pyarrow", reason="checkpoints need pyarrow")
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    config = replace(TWELVE_STEPS, compile=False)
    torch.use_deterministic_algorithms(True)
    try:
        whole = run_on(CUDA, tiny, config, dataset, output_dir=str(tmp_path))
        checkpoint = next(c.directory for c in whole.checkpoints if c.step == 5)
        resumed = run_on(CUDA, tiny, config, dataset, resume_from=Path(checkpoint))
    finally:
        torch.use_deterministic_algorithms(False)
    assert losses(resumed) == losses_after(5, losses(whole))


def test_a_step_does_not_wait_for_the_device(tiny: LlamaConfig) -> None:
    stepper = _stepper(tiny, TrainConfig(), SINGLE_WORKER)
    batches = [_batch(tiny)]
    stepper.step(batches)
    torch.cuda.set_sync_debug_mode("error")
    try:
        results = [stepper.step(batches) for _ in range(3)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert results[-1].loss < results[0].loss
    assert 0 < peak_memory_bytes(CUDA) < torch.cuda.get_device_properties(CUDA).total_memory


@pytest.mark.parametrize(
    "settings", [{}, {"compile": True}, {"activation_checkpointing": "selective"}], ids=str
)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_packed_batches_train_as_on_a_cpu(
    precision: Any, settings: dict[str, Any], tiny: LlamaConfig
) -> None:
    """fp32 attends under a mask, the others by the kernel for documents laid end to end."""
    compiled = bool(settings.get("compile"))
    config = TrainConfig(precision=precision, learning_rate=1e-3, **settings)
    weights = Llama(tiny, seed=3).state_dict()
    steppers = [
        _stepper(tiny, replace(config, precision="fp32"), SINGLE_WORKER, device=CPU),
        _stepper(tiny, config, SINGLE_WORKER, compile_blocks=compiled),
    ]
    losses = []
    for stepper in steppers:
        stepper.model.load_state_dict(weights)
        batches = [_packed(tiny, rows) for rows in ([[], []], [[3, 1, 9], [20]], [[1] * 31, [16]])]
        losses.append([stepper.step([batch]).loss.item() for batch in batches])
    assert losses[1] == pytest.approx(losses[0], rel=TOLERANCE[precision])


def _packed(config: LlamaConfig, rows: list[list[int]]) -> Batch:
    tokens = torch.randint(config.vocab_size, (2, 33), generator=torch.Generator().manual_seed(0))
    return Batch(tokens[:, :-1], tokens[:, 1:], starts_of(rows, 32))


@pytest.fixture
def nccl(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    torch.cuda.set_device(0)
    dist.init_process_group(
        "nccl", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1, device_id=CUDA_0
    )
    yield
    dist.destroy_process_group()


CUDA_0 = torch.device("cuda", 0)


@pytest.mark.parametrize("compile_blocks", [False, True])
@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_sharded_and_replicated_steps_over_nccl_equal_plain_ones(
    way: str, compile_blocks: bool, tiny: LlamaConfig, nccl: None
) -> None:
    config = TrainConfig(learning_rate=1e-3)
    plain = _stepper(tiny, config, SINGLE_WORKER)
    if way == "fsdp":
        mesh = init_device_mesh("cuda", (1,), mesh_dim_names=("shard",))
        other = _stepper(tiny, config, Layout(1, 1, 1, "one shard", mesh), compile_blocks=compile_blocks)
    else:
        other = _stepper(tiny, config, SINGLE_WORKER, compile_blocks=compile_blocks, replicate=True)
    batches = [_batch(tiny, seed) for seed in range(2)]
    for _ in range(4):
        expected, got = plain.step(batches), other.step(batches)
        torch.testing.assert_close(got.loss, expected.loss, rtol=5e-3, atol=0)
        torch.testing.assert_close(got.grad_norm, expected.grad_norm, rtol=5e-2, atol=0)
    weights = gather_model(other.model)
    assert weights is not None
    for (name, p), q in zip(plain.model.named_parameters(), weights.parameters(), strict=True):
        torch.testing.assert_close(
            q.to(CUDA), p, atol=5e-3, rtol=0, msg=lambda text, name=name: f"{name}: {text}"
        )


def _stepper(
    model: LlamaConfig,
    config: TrainConfig,
    layout: Layout,
    *,
    device: torch.device = CUDA,
    compile_blocks: bool = False,
    replicate: bool = False,
) -> Stepper:
    llama = Llama(model, device="meta")
    spread = parallelize(llama, config, layout, device, compile_blocks=compile_blocks)
    if replicate:
        spread = DistributedDataParallel(
            spread, device_ids=[CUDA_0], broadcast_buffers=False, gradient_as_bucket_view=True
        )
    return Stepper(spread, build_optimizer(spread, config), config, device=device, layout=layout)


def _batch(model: LlamaConfig, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, model.vocab_size, (4, 33), generator=generator)
    return Batch(tokens[:, :-1].pin_memory(), tokens[:, 1:].pin_memory())
