"""The command that proves the GPU path, on a CPU with tiny models: its figures mean nothing, its code is the same."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
PARTS = {
    "train": ["1.1B, 8 x 2048, bf16, ours compiled"],
    "train-peer": ["1.1B, 8 x 2048, bf16, transformers compiled", "1.1B, 8 x 2048, ours / transformers"],
    "train-long": ["1.1B, 4 x 4096, bf16, ours compiled"],
    "train-small": ["134M, 16 x 1024, bf16, ours compiled"],
    "train-documents": [f"1.1B, 8 x 2048, bf16, ours compiled, documents of {n}" for n in (64, 512)],
    "decode": [f"{name} {kind}, 2 requests" for name in ("1.1B", "7B") for kind in ("bf16", "int8")],
    "decode-peer": ["1.1B bf16, transformers' generate", "7B bf16, transformers' generate"],
    "prefill": [f"{name} {kind}, 2 x 64" for name in ("1.1B", "7B") for kind in ("bf16", "int8")],
    "long-context": ["1.1B bf16, 1 request of 200", "7B bf16, 1 request of 200"],
}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=BENCHMARKS.parent)


def test_each_part_is_a_process_whose_figures_are_kept_and_end_in_a_table(tmp_path: Path) -> None:
    done = run("--device", "cpu", "--tiny", "--parts", "ceilings", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| ceilings | bf16 product | " in done.stdout
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 2


def test_what_cannot_run_is_refused_in_one_line(tmp_path: Path) -> None:
    assert "the parts are ceilings, tests," in run("--parts", "trian").stderr
    done = run("--device", "cpu", "--out", str(tmp_path / "out"))
    assert done.returncode == 2
    assert "the real shapes need a GPU; add --tiny" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gpu")


@pytest.mark.parametrize("part", PARTS)
def test_a_part_gives_its_figures(part: str, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import gpu
    from on_gpu.results import Results
    from on_gpu.setting import Setting

    gpu.run_here(part, Setting("cpu", tiny=True, out=out))
    figures = {result.case: result.value for result in Results(out).of(part)}
    assert set(PARTS[part]) <= figures.keys()
    if part == "train":
        assert "aten::" in (out / "train-profile.txt").read_text()
        assert (out / "train-profile.json.gz").stat().st_size


def test_a_part_for_which_no_time_is_left_is_named(tmp_path: Path) -> None:
    done = run("--device", "cpu", "--tiny", "--parts", "decode", "--minutes", "0", "--out", str(tmp_path))
    assert done.returncode == 1
    assert "decode: not begun, the time is over" in done.stdout
