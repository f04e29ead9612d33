from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from llama_ray.evaluation.results import Evaluation
from llama_ray.pretrained import save_pretrained
from tests.jobs.helpers import run_here
from tests.small_models import random_model, small_config, small_tokenizer

TEXT = "The quick brown fox jumps over the lazy dog. " * 30


@pytest.fixture
def model(tmp_path: Path) -> Path:
    tokenizer = small_tokenizer((TEXT,)).for_documents()
    save_pretrained(random_model(small_config(tokenizer.vocab_size)), tokenizer, tmp_path / "model")
    (tmp_path / "fox.txt").write_text(TEXT)
    return tmp_path / "model"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "there is nothing to measure"),
        (("--text", "nothing.txt"), "holds no text"),
        (("--text", "fox.txt", "--context", "300"), "context is 300; it must be from 1 to 256"),
        (("--text", "fox.txt", "--limit", "0"), "limit is 0; it must be at least 1"),
        (("--text", "fox.txt", "--dtype", "int8"), "dtype is int8; choose float32"),
        (
            ("--text", "fox.txt", "--promote_if", "acc < champion"),
            "promote_if needs one model, a registered version",
        ),
        (("--text", "fox.txt", "--promote_if", "acc"), "'acc' is no condition"),
        (("--text", "fox.txt", "--endpoint", "http://127.0.0.1:9/v1"), "endpoint needs --tokenizer"),
        (("--data", "fox.txt"), "fox.txt"),
        (("--text", "fox.txt", "./fox.txt"), "fox.txt names two of what is measured"),
        (("--text", "fox.txt", "--output", "fox.txt/found"), "fox.txt/found cannot be written"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(
    model: Path, monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...], message: str
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    done = run_here("evaluate.py", str(model), *flags, "--mlflow", "false", cwd=model.parent)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_models_are_measured_in_windows_that_all_of_them_read(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    tokenizer = small_tokenizer((TEXT,)).for_documents()
    shorter = random_model(small_config(tokenizer.vocab_size, max_seq_len=64), seed=2)
    save_pretrained(shorter, tokenizer, tmp_path / "shorter")
    flags = ("--text", "fox=fox.txt", "--mlflow", "false", "--output", "found")
    done = run_here("evaluate.py", "model", "shorter", *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "fox/bits_per_byte" in done.stdout
    results = json.loads((tmp_path / "found" / "results.json").read_text())
    first, second = (Evaluation.from_json(json.dumps(each)) for each in results)
    assert first.settings_fingerprint == second.settings_fingerprint
    assert first.settings["context"] == 64
    assert "fox/bits_per_byte" in (tmp_path / "found" / "results.md").read_text()
    limited = run_here("evaluate.py", "model", *flags, "--max_seq_len", "32", cwd=tmp_path)
    assert limited.returncode == 0, limited.stderr
    [only] = json.loads((tmp_path / "found" / "results.json").read_text())
    assert only["settings"]["context"] == only["settings"]["max_seq_len"] == 32
    twice = run_here("evaluate.py", "model", str(model), *flags, cwd=tmp_path)
    assert "is given twice" in twice.stderr


@contextmanager
def serving(served: dict[str, object]) -> Iterator[str]:
    """An endpoint whose model `tiny` is that of `served["root"]` and gives each token `served["logprob"]`."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._send({"data": [{"id": "tiny", "max_model_len": 100, "root": served["root"]}]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            logprobs = [None, *[served["logprob"]] * (len(body["prompt"]) - 1)]
            top = [value and {"a": value} for value in logprobs]
            choice = {"text": "", "logprobs": {"token_logprobs": logprobs, "top_logprobs": top}}
            self._send({"choices": [choice]})

        def _send(self, answer: object) -> None:
            body = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        yield f"http://127.0.0.1:{server.server_port}/v1"
        server.shutdown()


def test_answers_of_an_endpoint_are_kept_until_it_serves_another_version(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    served: dict[str, object] = {}
    values = []
    with serving(served) as url:
        flags = ("--endpoint", url, "--tokenizer", "model", "--text", "fox.txt", "--limit", "1")
        for root, logprob in (("models:/tiny/1", -1.0), ("models:/tiny/1", -4.0), ("models:/tiny/2", -2.0)):
            served |= {"root": root, "logprob": logprob}
            done = run_here(
                "evaluate.py", "tiny", *flags, "--output", "found", "--mlflow", "false", cwd=model.parent
            )
            assert done.returncode == 0, done.stderr
            [found] = json.loads((model.parent / "found" / "results.json").read_text())
            values.append(found["scores"][0]["value"])
    assert values[1] == values[0]
    assert values[2] == pytest.approx(2 * values[0])
