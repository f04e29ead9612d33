"""Rows, configurations and reference answers for the tests of batch inference."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

from llama_ray.batch_inference.config import BatchConfig
from llama_ray.batch_inference.job import BatchJob
from llama_ray.batch_inference.partition_file import Counts
from llama_ray.batch_inference.rows import row_seed
from llama_ray.generation.engine import Engine
from llama_ray.generation.options import EngineOptions
from llama_ray.generation.sampling.params import SamplingParams

SEED = 1
PARAMS = SamplingParams(max_tokens=6, ignore_eos=True)


def write_rows(file: Path, rows: list[Any]) -> Path:
    """Write one line per row; a string is written as it is."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = (row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows)
    file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return file


def read_rows(file: Path | str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(file).read_text(encoding="utf-8").splitlines()]


def config(
    checkpoint: Path, source: Path | str, output: Path | str, max_num_seqs: int = 64, **options: Any
) -> BatchConfig:
    defaults = {"params": PARAMS, "seed": SEED, "engine": EngineOptions(max_num_seqs=max_num_seqs)}
    return BatchConfig(str(checkpoint), str(source), str(output), **(defaults | options))


def run(job: BatchJob) -> Counts:
    """Run a job and drop what it logs."""
    return job.run(lambda line: None, lambda line: None)


def answers_of_one_engine(checkpoint: Path, texts: list[str], params: SamplingParams) -> list[list[int]]:
    """Return the token ids of each row from an undisturbed engine in this process."""
    engine = Engine.from_pretrained(checkpoint, device="cpu")
    ids = [engine.submit(text, replace(params, seed=row_seed(SEED, row))) for row, text in enumerate(texts)]
    tokens: dict[int, list[int]] = defaultdict(list)
    while engine.has_work:
        for delta in engine.step():
            tokens[delta.request_id] += delta.token_ids
    return [tokens[request_id] for request_id in ids]


def answers(rows: list[dict[str, Any]]) -> list[list[int]]:
    """Return the token ids of each row's first completion."""
    return [row["completions"][0]["token_ids"] for row in rows]
