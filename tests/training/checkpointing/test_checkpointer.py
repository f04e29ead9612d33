"""Checkpoints of real workers: what each one writes, what other workers make of it, and what a full disk leaves."""

from __future__ import annotations

import resource
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llama_ray.data.tokenizing.tokenizer import Tokenizer
from llama_ray.model.config import LlamaConfig
from llama_ray.model.llama import Llama
from llama_ray.pretrained import load_pretrained
from llama_ray.storage import run_directory
from llama_ray.storage.attempts import current
from llama_ray.training.checkpointing.catalog import latest_valid_checkpoint
from llama_ray.training.checkpointing.checkpointer import Checkpointer
from llama_ray.training.checkpointing.progress import Progress, load_progress
from llama_ray.training.config import TrainConfig
from llama_ray.training.errors import TrainingError
from llama_ray.training.loop import train
from llama_ray.training.optimizers.build import build_optimizer
from llama_ray.training.reporting.observer import Metrics
from tests.training.helpers import CPU, EIGHT_STEPS, Recorder, growth, in_processes, losses, losses_after


def _train(config: TrainConfig, model: LlamaConfig, data: Path, run: Path, resume: bool) -> dict[int, float]:
    recorder = Recorder()
    source = latest_valid_checkpoint(str(run), 60) if resume else None
    train(
        model, config, data, device=CPU, observer=recorder, output_dir=str(run),
        resume_from=Path(source) if source else None,
    )  # fmt: skip
    return losses(recorder)


def train_on(
    workers: int, config: TrainConfig, model: LlamaConfig, data: Path, run: Path, resume: bool = False
) -> dict[int, float]:
    """Train in `run` on real worker processes; return the losses."""
    return in_processes(workers, _train, config, model, data, run, resume)[0]


@pytest.fixture(scope="module")
def sharded(
    tiny: LlamaConfig, dataset: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[int, float]]:
    """(directory, losses) of a run of two workers that hold half of everything each."""
    run = tmp_path_factory.mktemp("fsdp")
    return run, train_on(2, replace(EIGHT_STEPS, parallelism="fsdp"), tiny, dataset, run)


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    return load_pretrained(checkpoint)[0].state_dict()


def test_each_worker_writes_its_share_and_no_more(sharded: tuple[Path, dict[int, float]]) -> None:
    files = sorted((sharded[0] / "step_00000008").glob("*-rank*.safetensors"))
    assert len(files) == 4
    sizes = [sum(t.nbytes for t in load_file(f).values()) for f in files]
    for kind in (sizes[:2], sizes[2:]):
        assert abs(kind[0] - kind[1]) < 0.05 * sum(kind)


def test_a_sharded_model_opens_as_the_whole_one(
    sharded: tuple[Path, dict[int, float]], tiny: LlamaConfig, dataset: Path, tmp_path: Path
) -> None:
    train_on(1, replace(EIGHT_STEPS, batch_size=8), tiny, dataset, tmp_path)
    alone, together = weights(tmp_path / "step_00000008"), weights(sharded[0] / "step_00000008")
    for name in alone:
        torch.testing.assert_close(together[name], alone[name], atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize(("workers", "parallelism"), [(2, "fsdp"), (2, "ddp"), (1, "auto")])
def test_a_run_continues_with_other_workers_and_another_layout(
    sharded: tuple[Path, dict[int, float]],
    tiny: LlamaConfig,
    dataset: Path,
    tmp_path: Path,
    workers: int,
    parallelism: str,
) -> None:
    run = tmp_path / "run"
    shutil.copytree(sharded[0] / "step_00000004", run / "step_00000004")
    config = replace(EIGHT_STEPS, parallelism=parallelism, batch_size=8 // workers)
    resumed = train_on(workers, config, tiny, dataset, run, resume=True)
    expected = losses_after(4, sharded[1])
    if (workers, parallelism) == (2, "fsdp"):
        assert resumed == expected
        ours, theirs = weights(run / "step_00000008"), weights(sharded[0] / "step_00000008")
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert resumed == pytest.approx(expected, rel=1e-4)
    assert load_progress(run / "step_00000008").loader == load_progress(sharded[0] / "step_00000008").loader


def _train_until_the_disk_is_full(
    config: TrainConfig, model: LlamaConfig, data: Path, run: Path
) -> list[str | None]:
    class FillsTheDisk(Recorder):
        def logged(self, step: int, metrics: Metrics) -> None:
            super().logged(step, metrics)
            if step == 5:
                while run_directory.read_marker(str(run / "step_00000004")) is None:
                    time.sleep(0.01)
                # After the first checkpoint, no file may grow beyond a few bytes.
                resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))

    recorder = FillsTheDisk()
    with pytest.raises(TrainingError, match=r"checkpoints? .* could not be stored"):
        train(model, config, data, device=CPU, observer=recorder, output_dir=str(run))
    return [result.error for result in recorder.checkpoints]


def test_a_full_disk_costs_checkpoints_but_not_the_last_good_one(
    tiny: LlamaConfig, dataset: Path, tmp_path: Path
) -> None:
    config = replace(EIGHT_STEPS, max_steps=60)
    [errors] = in_processes(1, _train_until_the_disk_is_full, config, tiny, dataset, tmp_path)
    assert errors[0] is None
    assert len(errors) >= 3
    assert all("File too large" in error for error in errors[1:])
    assert [Path(c).name for c in run_directory.list_checkpoints(str(tmp_path))] == ["step_00000004"]
    assert run_directory.latest_checkpoint(str(tmp_path)) == str(tmp_path / "step_00000004")


def _save_twice(run: Path, data: Path, copies_mib: int) -> tuple[int, int]:
    """(bytes of state, growth of memory)."""
    config = TrainConfig(checkpoint_copies_mib=copies_mib)
    model = Llama(LlamaConfig.preset("llama-30m"))
    optimizer = build_optimizer(model, config)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    checkpointer = Checkpointer(current(str(run)), model, optimizer, Tokenizer.load(data), config)

    def save() -> None:
        for step in (1, 2):
            checkpointer.save(Progress(step=step))
        checkpointer.wait()

    grown = growth(save)
    assert [result.error for result in checkpointer.take_results()] == [None, None]
    checkpointer.close()
    return 12 * sum(p.numel() for p in model.parameters()), grown


def test_a_checkpoint_takes_no_more_memory_than_it_may(dataset: Path, tmp_path: Path) -> None:
    [(state, grown)] = in_processes(1, _save_twice, tmp_path, dataset, 64)
    assert state > 400e6
    # The second part is what the code itself needs to write files.
    assert grown < 64 * 2**20 + 48 * 2**20
