from __future__ import annotations

import gc
import os
from pathlib import Path

import numpy as np
import pytest

from llama_ray.utils.mapped_file import MappedFile

BYTES = np.dtype(np.uint8)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "file").write_bytes(bytes(range(200)) * 100)
    return tmp_path / "file"


def mappings(path: Path) -> int:
    return Path("/proc/self/maps").read_text().count(str(path))


def test_parts_of_the_file_are_arrays_at_any_offset(path: Path) -> None:
    file = MappedFile(path, 20_000)
    assert file.array(BYTES, 3, 7).tolist() == [7, 8, 9]
    assert file.array(np.dtype("<u2"), 1, 1).tolist() == [1 + 256 * 2]
    file.will_need(5000, 9000)
    with pytest.raises(ValueError, match="read-only"):
        file.array(BYTES, 3, 7)[0] = 1
    with pytest.raises(ValueError, match="buffer"):
        file.array(BYTES, 2, 19_999)


def test_no_descriptor_is_kept_and_the_memory_goes_with_the_last_array(path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    arrays = [MappedFile(path, 20_000).array(BYTES, 100, 0)[50:] for _ in range(5)]
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208
    assert mappings(path) == 5
    assert [array[0] for array in arrays] == [50] * 5
    arrays.clear()
    gc.collect()
    assert mappings(path) == 0


def test_what_cannot_be_mapped_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    with pytest.raises(OSError, match=r"Invalid argument.*empty"):
        MappedFile(tmp_path / "empty", 0)
    with pytest.raises(FileNotFoundError):
        MappedFile(tmp_path / "none", 1)
