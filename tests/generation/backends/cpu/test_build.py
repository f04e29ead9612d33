from __future__ import annotations

import ctypes
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from llama_ray.generation.backends.cpu import build

BUILD = "from llama_ray.generation.backends.cpu import build; print(build.build(), build.load())"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    build.load.cache_clear()
    yield tmp_path / "llama_ray"
    build.load.cache_clear()


def test_processes_that_build_at_the_same_time_share_one_complete_library(cache: Path) -> None:
    running = [
        subprocess.Popen([sys.executable, "-c", BUILD], stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    outputs = [process.communicate()[0] for process in running]
    assert [process.returncode for process in running] == [0, 0]
    # No temporary file is left behind.
    (library,) = cache.iterdir()
    for output in outputs:
        assert str(library) in output
        assert "CDLL" in output
    assert build.build() == library


def test_other_flags_make_another_library(cache: Path) -> None:
    fast = ("-O0", *build.FLAGS[1:])
    assert build.build(fast) != build.build(("-DOTHER", *fast))


def test_without_a_compiler_load_warns_once_and_returns_none(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with caplog.at_level(logging.WARNING):
        assert build.load() is None
        assert build.load() is None
    (record,) = caplog.records
    assert "no C++ compiler was found; the engine runs on plain torch" in record.getMessage()


@pytest.mark.parametrize(("compiler", "cause"), [("false", "does not run"), ("nowhere", "is not installed")])
def test_the_error_names_a_compiler_that_does_not_run(
    cache: Path, monkeypatch: pytest.MonkeyPatch, compiler: str, cause: str
) -> None:
    monkeypatch.setenv("CXX", compiler)
    with pytest.raises(build.BuildError, match=f"{compiler}.*{cause}"):
        build.build()


def test_the_error_contains_the_message_of_the_compiler(cache: Path) -> None:
    with pytest.raises(build.BuildError, match=r"do not compile with .*error: .*-march"):
        build.build((*build.FLAGS, "-march=abacus"))
    assert not list(cache.iterdir())


def test_the_error_names_a_library_that_cannot_be_loaded(tmp_path: Path) -> None:
    broken = tmp_path / "kernels.so"
    broken.write_bytes(b"not a library")
    with pytest.raises(build.BuildError, match=r"kernels\.so cannot be loaded"):
        build.open_library(broken)


def test_a_cache_that_cannot_be_written_is_replaced_by_a_private_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))
    path = build.build(("-O0", *build.FLAGS[1:]))
    assert path.exists()
    assert tmp_path not in path.parents


def test_threads_are_shared_with_torch(native: ctypes.CDLL) -> None:
    """With two OpenMP runtimes in a process, the threads of each would spin while the other works."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("this system does not list what a process has loaded")
    # sentencepiece, which transformers imports, brings one that it does not use.
    lines = [line for line in maps.read_text().splitlines() if "sentencepiece" not in line]
    assert len({line.split()[-1] for line in lines if "libgomp" in line}) == 1
