"""What arrives from a real MLflow server is whole or not there, and stays usable while the server is away."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow import MlflowClient

from llama_ray.tracking.registry import TrackingError, Version, download, promote, register
from llama_ray.tracking.runs import Run
from tests.tracking.helpers import guarded

SHARD = "model-00002-of-00002.safetensors"


@pytest.fixture(scope="module")
def run(server: str) -> Run:
    return Run.create(experiment="fetch", name="r", params={}, tags={}, description="", uri=server)


@pytest.fixture(scope="module")
def add(run: Run, checkpoint: Path, echo_model: Path) -> Callable[[str], Version]:
    """Registers a version through the server."""

    def register_one(name: str) -> Version:
        return register(
            run,
            name=name,
            checkpoint=checkpoint,
            python_model=echo_model,
            validation_loss=1.5,
            data_fingerprint="books",
            tags={},
            description="",
        )

    return register_one


@pytest.fixture(scope="module")
def version(add: Callable[[str], Version]) -> Version:
    return add("whole")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("file", [SHARD, "tokenizer.json"])
def test_a_file_that_is_cut_short_or_gone_is_fetched_again(
    version: Version, server: str, checkpoint: Path, tmp_path: Path, file: str
) -> None:
    folder = download(version.uri, server, tmp_path)
    os.truncate(folder / file, 1)
    assert download(version.uri, server, tmp_path) == folder
    assert contents(folder) == contents(checkpoint)
    (folder / file).unlink()
    assert download(version.uri, server, tmp_path) == folder
    assert contents(folder) == contents(checkpoint)


def replace_stored(version: Version, server: str, file: Path, folder: Path) -> None:
    """Put `file` in the place of one that the registry's store has of `version`."""
    client = MlflowClient(server)
    model_id = str(client.get_model_version(version.name, str(version.version)).source).removeprefix(
        "models:/"
    )
    target = folder / "artifacts" / "checkpoint" / file.name
    target.parent.mkdir(parents=True)
    shutil.copy(file, target)
    client.log_model_artifacts(model_id, str(folder))


def test_content_that_is_not_what_was_registered_is_refused_and_removed(
    add: Callable[[str], Version], server: str, checkpoint: Path, tmp_path: Path
) -> None:
    version = add("corrupt")
    content = bytearray((checkpoint / SHARD).read_bytes())
    content[-1] ^= 1
    (tmp_path / SHARD).write_bytes(content)
    replace_stored(version, server, tmp_path / SHARD, tmp_path / "stored")
    with pytest.raises(TrackingError) as error:
        download(version.uri, server, tmp_path / "cache")
    assert str(error.value) == (
        f"models:/corrupt/1 is damaged ({SHARD} has another content than when it was registered); "
        "register it again, or serve another version"
    )
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_dir()] == [
        tmp_path / "cache" / "corrupt"
    ]


def test_a_full_disk_leaves_nothing_behind(version: Version, server: str, tmp_path: Path) -> None:
    code = (
        "import resource, sys; from pathlib import Path\n"
        "from llama_ray.tracking.registry import TrackingError, download\n"
        # Writing beyond a limit of the process fails as writing to a full disk does.
        "resource.setrlimit(resource.RLIMIT_FSIZE, (512, 512))\n"
        "try: download(sys.argv[1], sys.argv[2], Path(sys.argv[3]))\n"
        "except TrackingError as error: print(error)\n"
    )
    command = [sys.executable, "-c", code, version.uri, server, str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert re.fullmatch(
        r"models:/whole/1 cannot be downloaded from mlflow-artifacts:.*File too large.*; try again later\n",
        run.stdout,
    )
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size]


def test_a_version_that_is_here_is_found_while_the_registry_is_away(
    version: Version, server: str, tmp_path: Path
) -> None:
    promote(version.name, version.version, policy="always", uri=server)
    with guarded(server) as address:
        uri = f"http://{address}"
        folder = download(f"models:/{version.name}@champion", uri, tmp_path)
    assert download(version.uri, uri, tmp_path) == folder
    for ref in (f"models:/{version.name}@champion", f"models:/{version.name}/2"):
        with pytest.raises(TrackingError, match=f"no MLflow server answers at {uri}"):
            download(ref, uri, tmp_path)
    os.truncate(folder / SHARD, 100)
    with pytest.raises(TrackingError, match=f"no MLflow server answers at {uri}"):
        download(version.uri, uri, tmp_path)


def test_damaged_weights_in_a_local_store_are_named(
    new_run: Callable[..., Run], checkpoint: Path, echo_model: Path, store: str, tmp_path: Path
) -> None:
    version = register(
        new_run(),
        name="cut-short",
        checkpoint=checkpoint,
        python_model=echo_model,
        validation_loss=1.0,
        data_fingerprint="",
        tags={},
        description="",
    )
    folder = download(version.uri, store, tmp_path)
    os.truncate(folder / SHARD, 100)
    with pytest.raises(TrackingError, match=f"models:/cut-short/1 is damaged .*{SHARD} is damaged"):
        download(version.uri, store, tmp_path)
