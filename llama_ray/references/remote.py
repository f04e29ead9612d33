"""Models in object stores: fetched once to this machine, whole."""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from llama_ray.model.weight_files import CheckpointError
from llama_ray.storage import run_directory, store
from llama_ray.storage.paths import MODEL_CACHE
from llama_ray.utils.errors import first_line, printable

if TYPE_CHECKING:
    from pyarrow import fs

_CHUNK_BYTES = 1 << 22
_AT_ONCE = 8
_GGUF = ".gguf"
# Twice the weights, and of no use without the run that they belong to.
_OPTIMIZER = "optimizer-rank"
_WEIGHTS = (".safetensors", _GGUF)


def fetch(location: str, *, weights: bool = True) -> Path:
    """Return the local copy of the model at the URI `location`: a directory, or a file that ends in `.gguf`.

    Of a training checkpoint the optimizer's state stays where it is. With `weights` False only what describes the model
    and its tokenizer is fetched. The copy is made once, also if several processes ask at the same time, and again when
    the files there change. Raises CheckpointError.
    """
    try:
        filesystem, path = store.open_storage(store.with_short_retries(location))
        single = path.endswith(_GGUF)
        found = _files(filesystem, path, single)
        if not single and "config.json" not in found:
            _refuse_run(location)
        if not found:
            raise CheckpointError(f"{printable(location)} holds no files; correct the URI")
        wanted = {name: info for name, info in found.items() if _is_wanted(name, weights or single)}
        target = _target(location, wanted)
        with _locked(target):
            if not target.is_dir():
                _copy(filesystem, path, location, wanted, target)
    except OSError as error:
        raise CheckpointError(
            f"{printable(location)} cannot be fetched ({first_line(error)}); check the URI, the credentials, and the "
            f"room in {MODEL_CACHE}"
        ) from error
    return target / Path(path).name if single else target


def _files(filesystem: fs.FileSystem, path: str, single: bool) -> dict[str, fs.FileInfo]:
    from pyarrow import fs

    if single:
        return {info.base_name: info for info in filesystem.get_file_info([path]) if info.is_file}
    found = filesystem.get_file_info(fs.FileSelector(path, allow_not_found=True))
    return {info.base_name: info for info in found if info.is_file}


def _refuse_run(location: str) -> None:
    """Raise CheckpointError for the directory of a run, which has checkpoints in it."""
    if newest := next(iter(run_directory.list_checkpoints(location)), None):
        raise CheckpointError(
            f"{printable(location)} is the directory of a run; give one of its checkpoints, such as {printable(newest)}"
        )


def _is_wanted(name: str, weights: bool) -> bool:
    return not name.startswith(_OPTIMIZER) and (weights or not name.endswith(_WEIGHTS))


def _target(location: str, files: Mapping[str, fs.FileInfo]) -> Path:
    """Return the place of the copy, which is another one when a file there is replaced."""
    state = [[name, info.size, info.mtime_ns] for name, info in sorted(files.items())]
    key = hashlib.sha256(json.dumps([location, state]).encode()).hexdigest()[:16]
    return MODEL_CACHE.expanduser() / "fetched" / f"{store.name_of(location)}-{key}"


@contextmanager
def _locked(target: Path) -> Iterator[None]:
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.with_name(f".{target.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _copy(
    filesystem: fs.FileSystem, path: str, location: str, files: Mapping[str, fs.FileInfo], target: Path
) -> None:
    """Make the directory `target`, which appears when all files are there and are what was written."""
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    marker = run_directory.read_marker(location) or {"files": {}}

    def copy(name: str) -> None:
        digest, size = hashlib.sha256(), 0
        with (
            filesystem.open_input_stream(files[name].path, compression=None) as source,
            (partial / name).open("wb") as file,
        ):
            while chunk := source.read(_CHUNK_BYTES):
                digest.update(chunk)
                size += file.write(chunk)
        noted = marker["files"].get(name, {}).get("sha256", digest.hexdigest())
        if size != files[name].size or digest.hexdigest() != noted:
            raise CheckpointError(
                f"{name} of {printable(location)} is not what was written; give another checkpoint"
            )

    try:
        with ThreadPoolExecutor(_AT_ONCE) as threads:
            list(threads.map(copy, files))
        now = _files(filesystem, path, path.endswith(_GGUF))
        if _target(location, {name: now[name] for name in files if name in now}) != target:
            raise CheckpointError(f"{printable(location)} was replaced while it was fetched; try again")
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
