"""Markdown for people: what stands at the top of a run and of a model version in the MLflow UI."""

from __future__ import annotations

import math

from llama_ray.data.shards import DatasetInfo
from llama_ray.model.config import LlamaConfig
from llama_ray.training.checkpointing.progress import Progress
from llama_ray.training.config import TrainConfig
from llama_ray.training.metrics import perplexity


def describe_run(model: LlamaConfig, config: TrainConfig, info: DatasetInfo, world_size: int) -> str:
    """What is trained, on what, with which batch."""
    seq_len = config.seq_len or model.max_seq_len
    sequences = config.batch_size * config.gradient_accumulation_steps * world_size
    return _table(
        {
            "Model": _shape(model),
            "Data": f"`{info.source}`: {info.tokens('train'):,} training and {info.tokens('validation'):,} "
            f"validation tokens, vocabulary {info.vocab_size:,}",
            "Global batch": f"{sequences} sequences of {seq_len} tokens = {sequences * seq_len:,} tokens "
            f"({config.batch_size} a worker x {config.gradient_accumulation_steps} micro-steps x {world_size} workers)",
            "Precision": config.precision,
            "MFU": "(6 N + 12 L d s) FLOPs a token, attention in full, over the dense bf16 peak of the GPU "
            "or, on a CPU, the matrix product rate measured at the start",
        }
    )


def describe_version(model: LlamaConfig, info: DatasetInfo, progress: Progress) -> str:
    """What the version is and how good it is."""
    loss = progress.validation_loss or math.nan
    return _table(
        {
            "Model": _shape(model),
            "Trained on": f"`{info.source}`, {progress.tokens:,} tokens in {progress.step:,} steps",
            "Validation": f"loss {loss:.4f} nats per token, perplexity {perplexity(loss):.2f}",
        }
    )


def short_count(n: int) -> str:
    """A count as people say it: 158k, 34m, 6.7b."""
    for unit, size in (("b", 10**9), ("m", 10**6)):
        if n >= size:
            return f"{n / size:.1f}{unit}" if n < 10 * size else f"{n / size:.0f}{unit}"
    return f"{n / 1000:.0f}k"


def _shape(model: LlamaConfig) -> str:
    return (
        f"LLaMA with {model.num_parameters():,} parameters: {model.num_layers} layers, hidden size "
        f"{model.hidden_size}, {model.num_heads} heads ({model.num_kv_heads} for keys and values), "
        f"{model.max_seq_len} tokens of context"
    )


def _table(rows: dict[str, str]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| **{key}** | {value} |" for key, value in rows.items())])
