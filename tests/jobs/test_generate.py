from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from llama_ray.generation.engine import Engine
from llama_ray.generation.sampling.params import SamplingParams
from tests.jobs.helpers import run_here
from tests.small_models import save_small_model

JOB = Path(__file__).parents[2] / "jobs" / "generate.py"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_model(tmp_path_factory.mktemp("checkpoint"), max_seq_len=4096)


def run(
    checkpoint: Path, *flags: str, stdin: str = "", cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(JOB), "--checkpoint", str(checkpoint), *flags],
        cwd=cwd,
        env={**os.environ, "PYTHONUTF8": "1"},
        input=stdin,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_prints_prompt_continuation_and_speed(checkpoint: Path) -> None:
    done = run(
        checkpoint, "--prompt", "The quick 🙂", "--max-tokens=20", "--temperature", "0.9", "--top_k", "40",
        "--top_p", "0.95", "--seed", "7", "--repetition_penalty", "1.1", "--ignore_eos",
        "--hidden_size", "32", "--num_kv_heads", "2", "--max_seq_len", "4096", "--device", "cpu",
    )  # fmt: skip
    params = SamplingParams(
        max_tokens=20, temperature=0.9, top_k=40, top_p=0.95, seed=7, repetition_penalty=1.1, ignore_eos=True
    )
    expected = Engine.from_pretrained(checkpoint, device="cpu").generate("The quick 🙂", params)[0]
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"The quick 🙂{expected.text}\n"
    assert done.stderr.startswith("20 tokens in ")
    assert done.stderr.endswith(" tokens/s\n")
    assert done.stderr.count("\n") == 1


def test_regex_and_schema_constrain_the_output(checkpoint: Path, tmp_path: Path) -> None:
    done = run(
        checkpoint, "--prompt", "The ", "--regex", "[0-9]{4}", "--min_tokens", "2", "--quantization", "int8",
        "--kv_cache_memory", "16MiB", "--dtype", "bfloat16",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert re.fullmatch("The [0-9]{4}\n", done.stdout)
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 2}')
    done = run(checkpoint, "--prompt", "", "--json-schema", schema.name, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [type(item) for item in json.loads(done.stdout)] == [bool, bool]


DRAFTED = ["--prompt", "The quick", "--max_tokens", "30", "--seed", "3", "--ignore_eos"]


@pytest.fixture(scope="module")
def plain(checkpoint: Path) -> str:
    """The text without drafts."""
    return run(checkpoint, *DRAFTED).stdout


@pytest.mark.parametrize("proposer", ["--prompt_lookup", "--draft_model"])
def test_drafts_never_change_the_text(checkpoint: Path, plain: str, proposer: str) -> None:
    flags = [proposer] if proposer == "--prompt_lookup" else [proposer, str(checkpoint)]
    done = run(checkpoint, *DRAFTED, *flags)
    assert done.returncode == 0, done.stderr
    assert done.stdout == plain


def test_prompt_from_standard_input_and_a_relative_checkpoint(checkpoint: Path) -> None:
    done = run(
        Path(checkpoint.name), "--prompt", "-", "--max_tokens", "4", "--temperature", "0", "--dtype", "bfloat16",
        stdin="two\nlines\n", cwd=checkpoint.parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("two\nlines")


@pytest.mark.parametrize("end", ["Ctrl-C", "the reader leaves"])
def test_ctrl_c_and_a_closed_pipe_end_the_job_cleanly(checkpoint: Path, end: str) -> None:
    flags = ["--checkpoint", str(checkpoint), "--prompt", "The quick", "--max_tokens", "4000", "--ignore_eos"]
    # The pipe is too short for the whole text, so the job cannot finish before it is interrupted.
    job = subprocess.Popen(
        [sys.executable, str(JOB), *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        pipesize=4096,
    )
    assert job.stdout is not None
    assert job.stderr is not None
    assert job.stdout.read(20).startswith("The quick")
    if end == "Ctrl-C":
        job.send_signal(signal.SIGINT)
        assert job.stdout.read().endswith("\n")
    job.stdout.close()
    assert job.wait(60) == (130 if end == "Ctrl-C" else 0)
    assert "Traceback" not in job.stderr.read()
    job.stderr.close()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--hidden_size", "64"], "--hidden_size is 64 but the checkpoint's is 32"),
        (["--num_kv_heads", "0"], "--num_kv_heads is 4 but the checkpoint's is 2"),
        (["--max-seq-len", "128"], "--max_seq_len is 128 but the checkpoint's is 4096"),
        (["--temperature", "-1"], "temperature is -1.0; it must be at least 0"),
        (["--max_tokens", "5000"], "set max_tokens to at most"),
        (["--dtype", "int8"], "--dtype is int8; it must be float32 or bfloat16 or float16"),
        (["--quantization", "int2"], "--quantization is int2; it must be int8 or int4"),
        (["--kv_cache_memory", "much"], "kv_cache_memory is 'much'; write a number and a unit"),
        (
            ["--json_schema", "nowhere.json"],
            "--json_schema is 'nowhere.json'; give a JSON object, or a file that holds one",
        ),
        (["--json_schema", "{"], "--json_schema is '{'; give a JSON object"),
        (["--regex", "("], "regex"),
        (["--tensor_parallel", "2"], "tensor_parallel is 2; it must divide the model's vocab_size"),
        (["--draft_model", "nowhere"], "nowhere"),
        (["--draft_model", ".", "--prompt_lookup"], "prompt_lookup is on; choose one of them"),
        (["--min_tokens", "200"], "min_tokens is 200; it must be at most max_tokens, 100"),
    ],
)
def test_user_errors_are_one_line_and_exit_code_2(checkpoint: Path, flags: list[str], message: str) -> None:
    done = run_here("generate.py", f"--checkpoint={checkpoint}", "--prompt", "x", *flags)
    assert done.returncode == 2
    assert done.stdout == ""
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.ray
def test_a_file_of_prompts_is_answered_once_and_then_needs_no_cluster(
    checkpoint: Path, tmp_path: Path, ray_cluster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", ray_cluster)
    prompts = [f"The {i}" for i in range(40)]
    (tmp_path / "in.jsonl").write_text("".join(f"{json.dumps({'text': p})}\n" for p in prompts))
    flags = [
        "--input", "in.jsonl", "--output", "out.jsonl", "--prompt-field", "text", "--max_tokens", "8",
        "--ignore_eos", "--replicas", "1", "--max_num_seqs=4",
    ]  # fmt: skip
    done = run(checkpoint, *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"40 rows in {tmp_path}/in.jsonl\n")
    assert "40 rows, 0 of them errors" in done.stdout.splitlines()[-1]
    content = (tmp_path / "out.jsonl").read_text()
    assert [json.loads(line)["text"] for line in content.splitlines()] == prompts

    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    again = run(checkpoint, *flags, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert again.stdout.endswith("out.jsonl is complete already (40 rows): nothing to do\n")
    assert (tmp_path / "out.jsonl").read_text() == content


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "give either --prompt, or --input and --output"),
        (["--prompt", "x", "--input", "y"], "give either --prompt, or --input and --output"),
        (["--input", "x"], "--input needs --output"),
        (["--prompt", "x", "--replicas", "2"], "--replicas belongs to --input"),
        (["--input", "nowhere.jsonl", "--output", "o.jsonl"], "no rows found in"),
    ],
)
def test_wrong_flags_of_a_batch_are_refused_before_ray_starts(
    checkpoint: Path, tmp_path: Path, flags: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    done = run_here("generate.py", f"--checkpoint={checkpoint}", *flags, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_missing_checkpoint_is_refused(tmp_path: Path) -> None:
    done = run(tmp_path / "nowhere", "--prompt", "x")
    assert done.returncode == 2
    assert "nowhere is not a directory" in done.stderr
