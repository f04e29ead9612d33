"""The descriptions of a run and of a model version: Markdown that MLflow's UI shows on their pages."""

from __future__ import annotations

import math

from llama_ray.data.dataset.info import DatasetInfo
from llama_ray.model.config import LlamaConfig
from llama_ray.training.checkpointing.progress import Progress
from llama_ray.training.config import TrainConfig
from llama_ray.training.reporting.metrics import perplexity


def describe_run(model: LlamaConfig, config: TrainConfig, info: DatasetInfo, world_size: int) -> str:
    """Return what is trained, on which data and in which batches."""
    seq_len = config.seq_len or model.max_seq_len
    replicas = world_size // config.tensor_parallel
    workers = f"{replicas} workers" if config.tensor_parallel == 1 else f"{replicas} groups of workers"
    sequences = config.batch_size * config.gradient_accumulation_steps * replicas
    return _sentence_and_list(
        f"Pre-training of a LLaMA with {model.num_parameters():,} parameters on `{info.source}`.",
        {
            "Model": _shape(model),
            "Data": f"{info.tokens('train'):,} training and {info.tokens('validation'):,} validation tokens, "
            f"vocabulary of {info.vocab_size:,}",
            "Global batch": f"{sequences * seq_len:,} tokens: {config.batch_size} sequences of {seq_len} tokens × "
            f"{config.gradient_accumulation_steps} micro-steps × {workers}",
            "Precision": config.precision,
            "MFU": "(6 N + 12 L d s) FLOPs per token with attention counted in full (PaLM's convention), as a share "
            "of the GPU's dense bf16 peak, or of the CPU's matrix product rate measured at the start",
        },
    )


def describe_version(model: LlamaConfig, info: DatasetInfo, progress: Progress) -> str:
    """Return how good the version is, and what it was trained on.

    The registry's list shows the beginning of the first line, as plain text.
    """
    loss = math.nan if progress.validation_loss is None else progress.validation_loss
    return _sentence_and_list(
        f"Loss {loss:.4f} on held-out text (perplexity {perplexity(loss):.2f}) after {progress.tokens:,} tokens "
        f"of `{info.source}`.",
        {
            "Model": _shape(model),
            "Training": f"{progress.step:,} steps, {progress.tokens:,} tokens",
            "Loss": "mean cross-entropy in nats per token on the validation split",
        },
    )


def short_count(n: int) -> str:
    """Return a count in short form: 158k, 34m, 6.7b."""
    for unit, size in (("b", 10**9), ("m", 10**6)):
        if n >= size:
            return f"{n / size:.1f}{unit}" if n < 10 * size else f"{n / size:.0f}{unit}"
    return f"{n / 1000:.0f}k"


def _shape(model: LlamaConfig) -> str:
    return (
        f"{model.num_parameters():,} parameters, {model.num_layers} layers, hidden size {model.hidden_size}, "
        f"{model.num_heads} heads ({model.num_kv_heads} for keys and values), context of {model.max_seq_len} tokens"
    )


def _sentence_and_list(sentence: str, items: dict[str, str]) -> str:
    return "\n".join([sentence, "", *(f"- **{key}**: {value}" for key, value in items.items())])
