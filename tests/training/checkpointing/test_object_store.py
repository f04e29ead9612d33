"""Checkpoints in an object store: a real S3 server, a real crash in the middle of an upload."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from pyarrow import fs

from llama_ray.data.mixtures.sources import parse_sources
from llama_ray.model.config import LlamaConfig
from llama_ray.model.weight_files import CheckpointError
from llama_ray.pretrained import load_pretrained, resolve
from llama_ray.storage import run_directory, store
from llama_ray.training.checkpointing.catalog import latest_valid_checkpoint
from llama_ray.training.checkpointing.files import local_copy, local_description
from llama_ray.training.config import TrainConfig
from llama_ray.training.loop import train
from llama_ray.training.preflight import check_run
from llama_ray.training.starting_point import StartingPoint
from tests.object_store import StallingProxy, s3_server, uri
from tests.processes import fresh_processes
from tests.training.helpers import CPU, EIGHT_STEPS, Recorder, in_processes, losses, losses_after


@pytest.fixture(scope="module")
def server() -> Iterator[int]:
    with s3_server() as port:
        yield port


def train_or_resume(config: TrainConfig, model: LlamaConfig, data: Path, run: str) -> dict[int, float]:
    """Train in `run`, from its latest valid checkpoint if it has one; return the losses."""
    recorder = Recorder()
    checkpoint = latest_valid_checkpoint(run, 60)
    if checkpoint is None:
        train(model, config, data, device=CPU, observer=recorder, output_dir=run)
    else:
        with local_copy(checkpoint) as local:
            train(model, config, data, device=CPU, observer=recorder, output_dir=run, resume_from=local)
    return losses(recorder)


def weights(checkpoint: str) -> dict[str, torch.Tensor]:
    with local_copy(checkpoint) as local:
        return load_pretrained(local)[0].state_dict()


def checkpoint_names(run: str) -> list[str]:
    return [store.name_of(c) for c in run_directory.list_checkpoints(run)]


def files_in(location: str) -> list[str]:
    filesystem, path = store.open_storage(location)
    return sorted(f.base_name for f in filesystem.get_file_info(fs.FileSelector(path)))


@dataclass
class CrashedRun:
    """A run that was killed while it uploaded the checkpoint of step 8, then resumed."""

    run: str
    files_after_crash: list[str]
    checkpoints_after_crash: list[str]
    resumed: dict[int, float]


@pytest.fixture(scope="module")
def crashed(server: int, tiny: LlamaConfig, dataset: Path) -> CrashedRun:
    with closing(StallingProxy(server, b"crash/step_00000008/optimizer-")) as proxy:
        process = fresh_processes().Process(
            target=train_or_resume, args=(EIGHT_STEPS, tiny, dataset, uri(proxy.port, "crash"))
        )
        process.start()
        assert proxy.stalled.wait(120)
        process.kill()
        process.join()
    run = uri(server, "crash")
    files = files_in(store.join(run, "step_00000008"))
    checkpoints = checkpoint_names(run)
    return CrashedRun(run, files, checkpoints, train_or_resume(EIGHT_STEPS, tiny, dataset, run))


def test_a_checkpoint_whose_upload_was_cut_does_not_count(crashed: CrashedRun) -> None:
    assert "model-rank00000.safetensors" in crashed.files_after_crash
    assert crashed.checkpoints_after_crash == ["step_00000004"]


def test_a_run_that_crashed_in_an_upload_resumes_to_the_bit(
    crashed: CrashedRun, tiny: LlamaConfig, dataset: Path, tmp_path: Path
) -> None:
    undisturbed = train_or_resume(EIGHT_STEPS, tiny, dataset, str(tmp_path))
    assert crashed.resumed == losses_after(4, undisturbed)
    assert checkpoint_names(crashed.run) == ["step_00000008", "step_00000004"]
    ours = weights(store.join(crashed.run, "step_00000008"))
    theirs = weights(str(tmp_path / "step_00000008"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_flipped_bit_in_an_object_is_found(server: int, tiny: LlamaConfig, dataset: Path) -> None:
    run = uri(server, "flipped")
    train_or_resume(EIGHT_STEPS, tiny, dataset, run)
    victim = store.join(store.join(run, "step_00000008"), "optimizer-rank00000.safetensors")
    filesystem, path = store.open_storage(victim)
    content = bytearray(filesystem.open_input_stream(path).read())
    content[-100] ^= 1
    with filesystem.open_output_stream(path) as stream:
        stream.write(bytes(content))
    with pytest.warns(UserWarning, match="damaged and .*: the content of optimizer-rank00000"):
        assert latest_valid_checkpoint(run, 60) == store.join(run, "step_00000004")
    assert checkpoint_names(run) == ["step_00000004"]


def test_only_the_newest_checkpoints_of_several_workers_are_kept(
    server: int, tiny: LlamaConfig, dataset: Path
) -> None:
    run = uri(server, "kept")
    config = replace(EIGHT_STEPS, checkpoint_every=2, keep_checkpoints=2, parallelism="fsdp")
    in_processes(2, train_or_resume, config, tiny, dataset, run)
    assert files_in(run) == ["step_00000006", "step_00000008"]


def test_the_checks_of_a_resume_fetch_no_tensors(server: int, tiny: LlamaConfig, dataset: Path) -> None:
    run = uri(server, "described")
    train_or_resume(EIGHT_STEPS, tiny, dataset, run)
    with local_description(store.join(run, "step_00000008")) as description:
        assert not [path for path in description.iterdir() if path.suffix != ".json"]
        check_run(
            tiny, replace(EIGHT_STEPS, max_steps=9), parse_sources(dataset), 1, StartingPoint(description)
        )
        with pytest.raises(ValueError, match="was trained with seed 0; this run has 1"):
            check_run(
                tiny, replace(EIGHT_STEPS, seed=1), parse_sources(dataset), 1, StartingPoint(description)
            )


def test_a_checkpoint_there_is_a_model_to_begin_with_and_to_branch_from(
    server: int,
    crashed: CrashedRun,
    tiny: LlamaConfig,
    dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(
        CheckpointError, match=r"crash\S* is the directory of a run; give one of its checkpoints"
    ):
        resolve(uri(server, "crash"))
    checkpoint = uri(server, "crash/step_00000008")
    expected = weights(checkpoint)
    assert all(torch.equal(w, expected[n]) for n, w in load_pretrained(checkpoint)[0].state_dict().items())
    assert not list(resolve(checkpoint).glob("optimizer*"))

    begun, branch = Recorder(), Recorder()
    config = replace(EIGHT_STEPS, max_steps=1)
    first = train(tiny, replace(config, init_from=checkpoint), dataset, device=CPU, observer=begun)
    assert (first.step, first.parent) == (1, checkpoint)
    later = train(tiny, replace(config, branch_from=checkpoint), dataset, device=CPU, observer=branch)
    assert (later.step, later.branched_at) == (9, 8)
