"""The commands of docs/training.md that begin with a model that exists."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from llama_ray.exporting.export import ExportConfig, export
from llama_ray.model.llama import Llama
from llama_ray.pretrained import load_shape, load_tokenizer, save_pretrained
from llama_ray.tracking.registry import resolve_version
from llama_ray.training.config import TrainConfig
from llama_ray.training.loop import train
from tests.data.tokenizing.foreign.helpers import BYTE_LEVEL
from tests.jobs.helpers import JOBS, run_here
from tests.small_models import random_model, small_config
from tests.token_data import write_dataset
from tests.training.helpers import CPU, Recorder

GUIDE = Path(__file__).parents[2] / "docs" / "training.md"
NO_CLUSTER = "error: RAY_ADDRESS is 127.0.0.1:1, but no Ray cluster answers there"


def commands() -> Iterator[list[str]]:
    section = GUIDE.read_text(encoding="utf-8").partition("## Begin with a model that exists")[2]
    [block] = re.findall(r"```bash\n(.*?)```", section.partition("\n## ")[0], re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines():
        python, job, *flags = shlex.split(line)
        assert python == "python"
        yield [Path(job).name, *flags]


def run_apart(job: str, *flags: str) -> str:
    """Return what a job says in a process of its own: this one may be connected to the cluster of other tests."""
    command = [sys.executable, str(JOBS / job), *flags]
    return subprocess.run(command, capture_output=True, text=True, check=False).stderr


def test_the_commands_do_what_they_say(store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that need a cluster pass all checks and end at its door; what they make is made without one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    importing, preparing, beginning, branching = commands()
    save_pretrained(random_model(small_config(BYTE_LEVEL.vocab_size)), BYTE_LEVEL, tmp_path / "model")
    export(ExportConfig(ref="model", to=importing[1]))

    done = run_here(*importing)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].endswith("parameters in float32 to bfloat16")
    assert lines[1].startswith("logits as those of transformers, to ")
    version = resolve_version("models:/smollm2@champion")
    assert lines[2] == f"registered {version.uri}; version 1 is the champion, as asked"

    assert run_apart(*preparing).startswith(NO_CLUSTER)
    tokenizer = load_tokenizer(version.uri)
    assert tokenizer is not None
    shutil.rmtree(tmp_path / "data")
    write_dataset(tmp_path / "data" / "code", tokenizer=tokenizer.for_documents())
    assert run_apart(*beginning).startswith(NO_CLUSTER)

    config = TrainConfig(init_from=version.uri, max_steps=2, seq_len=64, batch_size=2, precision="fp32")
    run = tmp_path / "checkpoints" / "continued"
    shape, data = load_shape(version.uri), tmp_path / "data" / "code"
    train(shape, config, data, device=CPU, observer=Recorder(), output_dir=str(run))
    assert run_apart(*branching).startswith(NO_CLUSTER)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--hidden_size", "64"], r"error: hidden_size is 64; it must be 32 as in .*model; leave it out"),
        (["--preset", "llama-tiny"], r"error: hidden_size is 64; it must be 32 as in "),
        (
            ["--vocab_size", "800"],
            r"error: vocab_size is 800; it must be 700 as in .*; leave it out, or let .*--resize",
        ),
        (["--branch_from", "model", "--max_steps", "1"], "error: init_from and branch_from are both given"),
        (["--rope_theta", "5e5"], f"{NO_CLUSTER}"),
    ],
)
def test_flags_may_not_contradict_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    save_pretrained(Llama(small_config(BYTE_LEVEL.vocab_size)), BYTE_LEVEL, tmp_path / "model")
    data = write_dataset(tmp_path / "data", tokenizer=BYTE_LEVEL)
    done = run_here("train.py", "--init_from", "model", "--data", str(data), "--seq_len", "64", *flags)
    assert re.match(message, done.stderr), done.stderr
    assert done.stderr.count("\n") == 1
    assert ("rope_theta is 500000.0, and 10000.0 in " in done.stdout) == ("--rope_theta" in flags)
