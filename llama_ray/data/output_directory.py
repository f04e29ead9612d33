"""The output directory of a preparation: whether it may be used, and how a finished dataset gets into it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llama_ray.data.shards import INFO_FILE, SPLITS, DatasetError, DatasetInfo, read_info, write_info
from llama_ray.data.tokenizer_files import CONFIG_FILE, TOKENIZER_FILE

_STAGING = ".partial"


def finished_dataset(output: Path, fingerprint: str, overwrite: bool) -> DatasetInfo | None:
    """Return the dataset in `output` if it has this `fingerprint`; None if `output` may be written.

    Removes what a killed run left. Raises DatasetError for a file, for a directory with other files, and, without
    `overwrite`, for one with another dataset.
    """
    if not output.exists():
        return None
    if not output.is_dir():
        raise DatasetError(f"output {output} is a file; give a directory")
    foreign = next((path.name for path in output.iterdir() if not _belongs_to_dataset(path.name)), None)
    if foreign is not None:
        raise DatasetError(f"output {output} holds other files ({foreign}); choose an empty or new directory")
    if not (output / INFO_FILE).exists():
        shutil.rmtree(output / _STAGING, ignore_errors=True)
        return None
    if not overwrite:
        info = read_info(output)
        if info.fingerprint == fingerprint:
            return info
        raise DatasetError(
            f"{output} holds a dataset made from other text or settings; choose another --output, or give "
            "--overwrite to replace it"
        )
    return None


@contextmanager
def staging_directory(output: Path) -> Iterator[Path]:
    """Create a directory inside `output` for unfinished files, and remove it at the end. Raises DatasetError."""
    staging = output / _STAGING
    try:
        staging.mkdir(parents=True)
    except OSError as error:
        raise DatasetError(f"cannot write to {output} ({error.strerror}); choose another output") from error
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def publish(staging: Path, output: Path, info: DatasetInfo) -> None:
    """Move the finished files from `staging` to `output`, remove shards of an older dataset, write `info` last."""
    (output / INFO_FILE).unlink(missing_ok=True)
    files = {path.name for path in staging.iterdir()}
    for old in output.glob("*.bin"):
        if old.name not in files:
            old.unlink()
    for name in sorted(files):
        (staging / name).replace(output / name)
    write_info(output, info)


def _belongs_to_dataset(name: str) -> bool:
    return name in (INFO_FILE, TOKENIZER_FILE, CONFIG_FILE, _STAGING) or (
        name.endswith(".bin") and name.startswith(tuple(f"{split}-" for split in SPLITS))
    )
