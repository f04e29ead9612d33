"""Checkpoints on an object store: a real S3 server, real crashes."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pyarrow import fs

from llama_ray.model.config import LlamaConfig
from llama_ray.pretrained import load_pretrained
from llama_ray.storage import run_directory, store
from llama_ray.training.checkpointing.catalog import latest_valid_checkpoint
from llama_ray.training.checkpointing.files import local_copy
from llama_ray.training.config import TrainConfig
from llama_ray.training.loop import train
from tests.object_store import Wire, s3_server, uri
from tests.training.helpers import Recorder, growth, in_processes, losses

CPU = torch.device("cpu")
CONFIG = TrainConfig(
    max_steps=8, batch_size=4, learning_rate=3e-3, log_every=1, checkpoint_every=4, precision="fp32"
)


@pytest.fixture(scope="module")
def server() -> Iterator[int]:
    with s3_server() as port:
        yield port


def _train(config: TrainConfig, model: LlamaConfig, data: Path, run: str) -> dict[int, float]:
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


def names(run: str) -> list[str]:
    return [store.name_of(c) for c in run_directory.list_checkpoints(run)]


def test_a_crash_in_the_middle_of_an_upload_costs_nothing(
    server: int, tiny: LlamaConfig, dataset: Path, tmp_path: Path
) -> None:
    undisturbed = _train(CONFIG, tiny, dataset, str(tmp_path))

    wire = Wire(server, b"crash/step_00000008/optimizer-")
    process = multiprocessing.get_context("spawn").Process(
        target=_train, args=(CONFIG, tiny, dataset, uri(wire.port, "crash"))
    )
    process.start()
    assert wire.reached.wait(120)
    process.kill()
    process.join()

    run = uri(server, "crash")
    filesystem, path = store.open_storage(run)
    left = [f.base_name for f in filesystem.get_file_info(fs.FileSelector(f"{path}/step_00000008"))]
    assert "model-rank00000.safetensors" in left
    assert names(run) == ["step_00000004"]
    assert _train(CONFIG, tiny, dataset, run) == {s: loss for s, loss in undisturbed.items() if s > 4}
    assert names(run) == ["step_00000008", "step_00000004"]
    ours = weights(store.join(run, "step_00000008"))
    theirs = weights(str(tmp_path / "step_00000008"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)

    victim = store.join(store.join(run, "step_00000008"), "optimizer-rank00000.safetensors")
    opened, object_path = store.open_storage(victim)
    content = bytearray(opened.open_input_stream(object_path).read())
    content[-100] ^= 1
    with opened.open_output_stream(object_path) as stream:
        stream.write(bytes(content))
    with pytest.warns(UserWarning, match="damaged and passed over: the content of optimizer-rank00000"):
        assert latest_valid_checkpoint(run, 60) == store.join(run, "step_00000004")
    assert names(run) == ["step_00000004"]


def test_checkpoints_of_several_workers_are_kept_to_the_newest(
    server: int, tiny: LlamaConfig, dataset: Path
) -> None:
    run = uri(server, "kept")
    config = replace(CONFIG, checkpoint_every=2, keep_checkpoints=2, parallelism="fsdp")
    in_processes(2, _train, config, tiny, dataset, run)
    filesystem, path = store.open_storage(run)
    assert sorted(f.base_name for f in filesystem.get_file_info(fs.FileSelector(path))) == [
        "step_00000006", "step_00000008"
    ]  # fmt: skip
    assert run_directory.latest_run(uri(server, "")) == "kept"


def test_a_bucket_that_is_not_there_is_refused_in_one_line(server: int) -> None:
    missing = uri(server, "x").replace("s3://runs", "s3://none")
    with pytest.raises(store.StorageError, match=r"s3://none/x.* cannot be written .*bucket") as refused:
        store.check_writable(missing)
    assert "\n" not in str(refused.value)


def _upload(source: Path, target: str) -> int:
    return growth(lambda: store.upload(source, target))


def test_an_upload_is_never_in_memory_as_a_whole(server: int, tmp_path: Path) -> None:
    large = tmp_path / "large"
    with large.open("wb") as file:
        for _ in range(12):
            file.write(os.urandom(1 << 24))
    target = uri(server, "large/file")
    [grown] = in_processes(1, _upload, large, target)
    assert store.sha256(target) == store.sha256(str(large))
    assert grown < 150 * 2**20


def test_google_is_reached_by_its_own_client_and_says_at_once_that_it_is_not() -> None:
    filesystem, path = store.open_storage("gs://bucket/runs")
    assert isinstance(filesystem, fs.GcsFileSystem)
    assert path == "bucket/runs"
    assert not store.is_local("gs://bucket/runs")
    unreachable = "gs://anonymous@bucket/runs?scheme=http&endpoint_override=127.0.0.1:1"
    with pytest.raises(store.StorageError, match="cannot be written") as refused:
        store.check_writable(unreachable)
    assert "\n" not in str(refused.value)
