"""Evaluations by our engine beside lm-evaluation-harness's own `hf` model: the same weights, tasks and call.

    python benchmarks/evaluate.py --model models:/demo@champion        # or any other REF; 10 minutes on 2 cores
    python benchmarks/evaluate.py --limit 10 --rounds 1                # random weights in SmolLM2-135M's shape

Both are given to `lm_eval.simple_evaluate`, in one process and in alternating rounds; loading is not timed. Before
anything is timed, the scores of both are compared: a difference of more than 1e-3 of a score stops the run.
`--batch_size` is that of `hf`, whose best one for a task should be given.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

os.environ |= {"HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import torch
from jsonargparse import auto_cli

from llama_ray.data.tokenizing.tokenizer import Tokenizer
from llama_ray.evaluation.engine_scorer import EngineScorer
from llama_ray.evaluation.harness.run import BUNDLED
from llama_ray.generation.backends.prepare import prepare
from llama_ray.generation.engine import Engine
from llama_ray.model.config import LlamaConfig
from llama_ray.model.llama import Llama
from llama_ray.pretrained import load_pretrained, save_pretrained

CASES: dict[str, tuple[str, int | None]] = {
    "four choices": ("verse_next_line", 0),
    "five examples": ("verse_next_line", 5),
    "code": ("python_next_line", 0),
    "last word": ("verse_last_word", 0),
    "rolling": ("sonnets", None),
    "generate until": ("verse_copy", None),
}
"""Name -> task and number of examples in each prompt."""
TOLERANCE = 1e-3

Evaluate = Callable[[str, int | None], dict[str, float]]


def main(
    model: str | None = None,
    limit: int = 20,
    rounds: int = 3,
    threads: int = 2,
    batch_size: int = 8,
    cases: str = "",
) -> None:
    """Print the seconds of both for each case.

    Args:
        model: Any reference; None makes random weights.
        limit: Documents of each task.
        rounds: How often each contestant runs each case, after a first one that compares the scores.
        threads: Of torch and of the engine.
        batch_size: Of lm_eval's `hf` model.
        cases: Names of cases, separated by commas; all by default.
    """
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        directory = _save(model, Path(folder))
        from lm_eval.models.huggingface import HFLM

        from llama_ray.evaluation.harness.model import HarnessModel

        theirs = HFLM(str(directory), dtype="float32", device="cpu", batch_size=batch_size)
        llama, tokenizer = load_pretrained(directory, torch.float32)
        backend = prepare(llama)
        names = [name for name in CASES if not cases or name in cases.split(",")]
        seconds: dict[tuple[str, str], list[float]] = {}
        for name in names:
            task, shots = CASES[name]
            for number in range(rounds + 1):
                scores = {}
                for who in ("ours", "hf"):
                    # A new engine has nothing in its cache from the round before.
                    with Engine(backend, tokenizer, kv_cache_memory_bytes=2**30) as engine:
                        lm = HarnessModel(EngineScorer("ours", engine)) if who == "ours" else theirs
                        started = time.perf_counter()
                        scores[who] = _evaluate(lm, task, shots, limit)
                        if number:
                            seconds.setdefault((name, who), []).append(time.perf_counter() - started)
                _check_equal(name, scores["ours"], scores["hf"])
            ours, hf = (statistics.median(seconds[name, who]) for who in ("ours", "hf"))
            print(f"{name}: ours {ours:.2f} s, hf {hf:.2f} s, {hf / ours:.1f} times as fast", flush=True)
        totals = {who: sum(statistics.median(seconds[name, who]) for name in names) for who in ("ours", "hf")}
        print(
            f"all: ours {totals['ours']:.1f} s, hf {totals['hf']:.1f} s, {totals['hf'] / totals['ours']:.1f} times"
        )


def _evaluate(lm: Any, task: str, shots: int | None, limit: int) -> dict[str, float]:
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        found = simple_evaluate(
            model=lm,
            tasks=[task],
            num_fewshot=shots,
            limit=limit,
            bootstrap_iters=0,
            log_samples=False,
            task_manager=TaskManager(include_path=str(BUNDLED), include_defaults=False),
        )
    return {key: value for key, value in found["results"][task].items() if key.endswith(",none")}


def _check_equal(name: str, ours: dict[str, float], hf: dict[str, float]) -> None:
    for metric, value in hf.items():
        if isinstance(value, float) and abs(ours[metric] - value) > TOLERANCE * max(1.0, abs(value)):
            raise SystemExit(f"{name}: {metric} is {ours[metric]} by our engine and {value} by hf")


def _save(model: str | None, folder: Path) -> Path:
    """Write what both load: the Hugging Face layout in fp32."""
    if model is not None:
        llama, tokenizer = load_pretrained(model, torch.float32)
    else:
        text = (BUNDLED / "data" / "sonnets.jsonl").read_text("utf-8")
        tokenizer = Tokenizer.train(iter([text]), 4096)
        llama = Llama(
            LlamaConfig(
                vocab_size=49152,
                hidden_size=576,
                num_layers=30,
                num_heads=9,
                num_kv_heads=3,
                intermediate_size=1536,
                max_seq_len=2048,
                tie_embeddings=True,
            ),
            dtype=torch.float32,
        )
    save_pretrained(llama, tokenizer, folder / "model")
    return folder / "model"


if __name__ == "__main__":
    auto_cli(main)
