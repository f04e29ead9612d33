"""The output directory of a preparation: whether it may be used, and how a finished dataset gets into it."""

from __future__ import annotations

import fcntl
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from llama_ray.data.dataset.info import INFO_FILE, SPLITS, DatasetInfo, read_info, write_info
from llama_ray.data.dataset.shards import DatasetError
from llama_ray.data.tokenizing.files import CONFIG_FILE, TOKENIZER_FILE
from llama_ray.utils.errors import printable

_STAGING = ".partial"
_LOCK = ".lock"


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
def staging_directory(output: Path) -> Iterator[Path]:
    """Create a directory inside `output` for unfinished files, and remove it at the end, and what killed runs left.

    Its name is new each time: tasks of a killed run may still write to theirs. Raises DatasetError, also for an OSError
    of the block.
    """
    for path in [path for path in output.iterdir() if _is_unfinished(path.name)]:
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
    staging = output / f"{_STAGING}-{uuid.uuid4().hex[:8]}"
    try:
        staging.mkdir()
        yield staging
    except OSError as error:
        raise _cannot_write(output, error) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def publish(staging: Path, output: Path, info: DatasetInfo) -> DatasetInfo:
    """Move the finished files from `staging` to `output`, remove shards of an older dataset, write `info` last.

    Returns what was written, with the checksums of the other files.
    """
    (output / INFO_FILE).unlink(missing_ok=True)
    files = {path.name for path in staging.iterdir()}
    for old in output.glob("*.bin"):
        if old.name not in files:
            old.unlink()
    for name in sorted(files):
        (staging / name).replace(output / name)
    return write_info(output, info)


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


def _belongs_to_dataset(name: str) -> bool:
    return (
        name in (INFO_FILE, TOKENIZER_FILE, CONFIG_FILE, _LOCK)
        or _is_unfinished(name)
        or (name.endswith(".bin") and name.startswith(tuple(f"{split}-" for split in SPLITS)))
    )
