from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from llama_ray.data.tokenizing.tokenizer import Tokenizer
from tests.jobs.helpers import JOBS, run_here


def test_a_tokenizer_is_trained_without_a_cluster(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some words of text 123 " * 200)
    (tmp_path / "config.yaml").write_text("vocab_size: 270\nspecial_tokens: [<|im_start|>]\n")
    script = (
        "import runpy, sys\n"
        f"sys.path.insert(0, {str(JOBS)!r})\n"
        "try:\n"
        f"    runpy.run_path({str(JOBS / 'train_tokenizer.py')!r}, run_name='__main__')\n"
        "except SystemExit as end:\n"
        "    assert end.code == 0\n"
        "assert not {'ray', 'torch', 'mlflow'} & sys.modules.keys()\n"
    )
    flags = ["--source", "one=a.txt", "--weights", "one=1", "--output", "out", "--config", "config.yaml"]
    more = ["--split-digits", "1", "--special-tokens", "<|im_end|>,<|x|>"]
    command = [sys.executable, "-c", script, *flags, *more]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    tokenizer = Tokenizer.load(tmp_path / "out")
    assert tokenizer.encode_prompt("<|im_end|>", parse_special=True) in ([0, 2], [0, 3])
    assert len(tokenizer.encode("123")) == 3


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--output", "out"], "source is empty; give 'builtin'"),
        (["--source", "nowhere.txt", "--output", "out"], "nowhere.txt"),
        (["--source", "builtin", "--output", "out", "--split", "words"], "--split is words; it must be"),
        (
            ["--source", "builtin", "--output", "out", "--weights", "b=1"],
            "weights is 'b=1'; it must be NAME=SHARE",
        ),
    ],
)
def test_mistakes_give_one_line(tmp_path: Path, flags: list[str], message: str) -> None:
    failed = run_here("train_tokenizer.py", *flags, cwd=tmp_path)
    assert failed.returncode == 2
    assert failed.stderr.startswith("error: ")
    assert message in failed.stderr
    assert failed.stderr.count("\n") == 1
