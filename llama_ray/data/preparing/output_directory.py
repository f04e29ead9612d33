"""The output directory of a preparation: whether it may be used, and how a finished dataset gets into it.

Until a dataset is complete its files are in a staging directory inside the output. Its name holds the fingerprint of
the preparation, so that a preparation that was killed goes on, and another one begins anew.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from llama_ray.data.dataset.info import INFO_FILE, SPLITS, DatasetInfo, read_info, write_info
from llama_ray.data.dataset.shards import DatasetError
from llama_ray.data.preparing.bad_records import BAD_RECORDS_FILE, report_beside
from llama_ray.data.report.page import REPORT_FILE
from llama_ray.data.tokenizing.files import CONFIG_FILE, TOKENIZER_FILE
from llama_ray.utils.errors import printable

WORK = "work"
"""Folder in the staging directory for what the dataset itself does not hold."""

_STAGING = ".partial"
_LOCK = ".lock"
_BESIDE_SHARDS = (TOKENIZER_FILE, CONFIG_FILE, BAD_RECORDS_FILE, REPORT_FILE)
_OWN_FILES = (*_BESIDE_SHARDS, INFO_FILE, _LOCK)


def check_output(output: Path) -> None:
    """Raise DatasetError for a file, and for a directory with other files or without access."""
    try:
        foreign = [path.name for path in output.iterdir() if not _belongs_to_dataset(path.name)]
    except FileNotFoundError:
        return
    except NotADirectoryError as error:
        if output.exists():
            raise DatasetError(f"output {output} is a file; give a directory") from error
        raise _cannot_write(output, error) from error
    except OSError as error:
        raise DatasetError(
            f"cannot read output {output} ({error.strerror}); choose another output"
        ) from error
    if foreign:
        raise DatasetError(
            f"output {output} holds other files ({printable(foreign[0])}); choose an empty or new directory"
        )


def finished_dataset(output: Path, fingerprint: str, overwrite: bool) -> DatasetInfo | None:
    """Return the dataset in `output` if it has this `fingerprint`; None if `output` may be written.

    Raises DatasetError as `check_output` does and, without `overwrite`, for another dataset.
    """
    check_output(output)
    if overwrite or not (output / INFO_FILE).exists():
        return None
    info = read_info(output)
    if info.fingerprint == fingerprint:
        return info
    raise DatasetError(
        f"{output} holds a dataset made from other text or settings; choose another --output, or give --overwrite to "
        "replace it (or delete it, where these flags are not offered)"
    )


@contextmanager
def exclusive(output: Path, log: Callable[[str], None]) -> Iterator[None]:
    """Let one process at a time write to `output`, and others wait; one that is killed holds nobody up.

    Raises DatasetError if `output` cannot be written to.
    """
    lock = output / _LOCK
    while True:
        with _open(lock) as file:
            _wait(file, output, log)
            if not _has_name(file, lock):
                continue  # The process that held it has removed it; another one may hold its successor.
            try:
                yield
            finally:
                lock.unlink(missing_ok=True)
            return


@contextmanager
def staging_directory(output: Path, fingerprint: str, log: Callable[[str], None]) -> Iterator[Path]:
    """Give a directory inside `output` for unfinished files, with what a preparation of this `fingerprint` left there.

    What other preparations left is removed. Raises DatasetError for an OSError, also of the block.
    """
    staging = output / f"{_STAGING}-{fingerprint[:16]}"
    try:
        for path in sorted(output.iterdir()):
            if _is_unfinished(path.name) and path != staging:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
                log(f"removed {printable(str(path))}, which another preparation left unfinished")
        (staging / WORK).mkdir(parents=True, exist_ok=True)
        # Half a file of a worker that was killed.
        for path in [*staging.glob(".*"), *(staging / WORK).glob(".*")]:
            path.unlink()
        yield staging
    except OSError as error:
        raise _cannot_write(output, error) from error


def remove(staging: Path) -> None:
    """Remove a staging directory that holds nothing worth keeping."""
    shutil.rmtree(staging, ignore_errors=True)


def publish(staging: Path, output: Path, info: DatasetInfo) -> DatasetInfo:
    """Move the dataset from `staging` to `output`, `dataset.json` last, and remove an older one there."""
    (output / INFO_FILE).unlink(missing_ok=True)
    for path in output.iterdir():
        if _is_shard(path.name) or path.name in _BESIDE_SHARDS:
            path.unlink()
    write_info(staging, info)
    return finish_publishing(staging, output)


def is_complete(staging: Path) -> bool:
    """Whether `staging` holds what a process that was killed in `publish` has not moved."""
    return (staging / INFO_FILE).exists()


def finish_publishing(staging: Path, output: Path) -> DatasetInfo:
    """Move what `publish` has not moved yet."""
    info = read_info(staging)
    shards = {shard.file for split in info.splits.values() for shard in split}
    for name in sorted({*shards, *_BESIDE_SHARDS}):
        if (staging / name).exists():
            (staging / name).replace(output / name)
    # Once `dataset.json` is there, a process that is killed is not started again: nothing large may be left by then.
    for path in staging.iterdir():
        if path.name != INFO_FILE:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    report_beside(output).unlink(missing_ok=True)
    info = write_info(output, info)
    remove(staging)
    return info


def _open(lock: Path) -> BinaryIO:
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        # For writing, without which NFS gives no lock.
        return lock.open("ab")
    except OSError as error:
        raise _cannot_write(lock.parent, error) from error


def _wait(file: BinaryIO, output: Path, log: Callable[[str], None]) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        log(f"another process is writing to {printable(str(output))}; waiting for it to end")
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:
        log(f"{printable(str(output))} cannot be locked ({error.strerror}): let no other process write to it")


def _has_name(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _cannot_write(output: Path, error: OSError) -> DatasetError:
    return DatasetError(f"cannot write to {output} ({error.strerror}); choose another output")


def _is_unfinished(name: str) -> bool:
    return name.startswith((_STAGING, f".{INFO_FILE}."))


def _is_shard(name: str) -> bool:
    return name.endswith(".bin") and name.startswith(tuple(f"{split}-" for split in SPLITS))


def _belongs_to_dataset(name: str) -> bool:
    return name in _OWN_FILES or _is_unfinished(name) or _is_shard(name)
