"""The descriptions of a run and of a model version: Markdown that MLflow's UI shows on their pages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from llama_ray.data.dataset.info import Task
from llama_ray.data.mixtures.stages import Segment
from llama_ray.data.mixtures.weights import WHOLE
from llama_ray.model.config import LlamaConfig
from llama_ray.orchestration.run_data import RunData
from llama_ray.training.checkpointing.progress import Progress
from llama_ray.training.config import TrainConfig
from llama_ray.training.reporting.metrics import perplexity


def describe_run(model: LlamaConfig, config: TrainConfig, data: RunData, world_size: int) -> str:
    """Return what is trained, on which data and in which batches."""
    seq_len = config.seq_len or model.max_seq_len
    replicas = world_size // config.tensor_parallel
    workers = f"{replicas} workers" if config.tensor_parallel == 1 else f"{replicas} groups of workers"
    sequences = config.batch_size * config.gradient_accumulation_steps * replicas
    kind = {
        "pretrain": "Continued pre-training" if config.parent else "Pre-training",
        "sft": "Supervised fine-tuning",
        "dpo": "Preference tuning (DPO)",
    }
    adapters = f" by adapters of rank {config.lora_rank}" if config.lora_rank else ""
    # No gradients of frozen weights are computed.
    flops = "6 N + 12 L d s" if config.lora is None else "4 N + 12 L d s + 6 n, n weights of adapters"
    return _sentence_and_list(
        f"{kind[config.task]}{adapters} of a LLaMA with {model.num_parameters():,} "
        f"parameters on `{data.name}`.",
        {
            "Model": _shape(model),
            **_parent(config.parent, branched=config.branch_from is not None),
            **_adapters(model, config),
            "Data": f"{data.tokens('train'):,} training and {data.tokens('validation'):,} validation tokens, "
            f"vocabulary of {data.vocab_size:,}",
            **_sources(data),
            "Global batch": f"{sequences * seq_len:,} tokens: {config.batch_size} sequences of {seq_len} tokens × "
            f"{config.gradient_accumulation_steps} micro-steps × {workers}",
            **_stages([Segment(1, sequences, seq_len, data.segments[0].shares), *data.segments]),
            "Precision": config.precision,
            "MFU": f"({flops}) FLOPs per token with attention counted in full (PaLM's convention), as a share "
            "of the GPU's dense bf16 peak, or of the CPU's matrix product rate measured at the start",
        },
    )


def describe_version(model: LlamaConfig, data: RunData, progress: Progress, task: Task = "pretrain") -> str:
    """Return how good the version is, and what it was trained on.

    The registry's list shows the beginning of the first line, as plain text.
    """
    loss = math.nan if progress.validation_loss is None else progress.validation_loss
    # The loss of pairs is not that of tokens.
    text = "" if task == "dpo" else f" (perplexity {perplexity(loss):.2f})"
    held_out, mean = {
        "pretrain": ("text", "cross-entropy in nats per token"),
        "sft": ("conversations", "cross-entropy in nats per learned token"),
        "dpo": ("pairs of answers", "DPO loss in nats per pair"),
    }[task]
    return _sentence_and_list(
        f"Loss {loss:.4f} on held-out {held_out}{text} after {progress.tokens:,} tokens of `{data.name}`.",
        {
            "Model": _shape(model),
            **_parent(progress.parent, branched=progress.branched_at > 0),
            "Training": f"{progress.step:,} steps, {progress.tokens:,} tokens",
            **_sources(data),
            "Loss": f"mean {mean} on the validation split"
            + (" of all sources" if len(data.sources) > 1 else ""),
        },
    )


def describe_import(model: LlamaConfig, source: str, check: str, *, has_template: bool) -> str:
    """Return where an imported version came from, and what was checked."""
    return _sentence_and_list(
        f"Imported from `{source}`.",
        {
            "Model": _shape(model),
            "Check": check,
            "Chat template": "that of the model"
            if has_template
            else "none; a plain transcript takes its place",
        },
    )


def describe_average(model: LlamaConfig, parents: Sequence[str], shares: Sequence[float]) -> str:
    """Return which models an average is of."""
    parts = [f"{share:.4f} of `{ref}`" for ref, share in zip(parents, shares, strict=True)]
    return _sentence_and_list(
        "Average of models, weight by weight.", {"Model": _shape(model), "Parts": ", ".join(parts)}
    )


def short_count(n: int) -> str:
    """Return a count in short form: 158k, 34m, 6.7b."""
    for unit, size in (("b", 10**9), ("m", 10**6)):
        if n >= size:
            return f"{n / size:.1f}{unit}" if n < 10 * size else f"{n / size:.0f}{unit}"
    return f"{n / 1000:.0f}k"


def _parent(ref: str | None, *, branched: bool) -> dict[str, str]:
    """Return a line for what the run began with, if its weights were not random."""
    if ref is None:
        return {}
    return {"Branched from": f"`{ref}`"} if branched else {"Begun with": f"the weights of `{ref}`"}


def _adapters(model: LlamaConfig, config: TrainConfig) -> dict[str, str]:
    """Return a line for the adapters that are trained in place of the weights, if there are any."""
    lora = config.lora
    if lora is None:
        return {}
    return {
        "Adapters": f"LoRA of rank {lora.rank}, scale {lora.scale:.4g}, on {', '.join(lora.targets)}: "
        f"{lora.num_parameters(model):,} trained parameters"
    }


def _sources(data: RunData) -> dict[str, str]:
    """Return a line for each source of a mixture."""
    if len(data.sources) == 1:
        return {}
    return {
        f"Source {source.name}": f"{data.share(source.name):.4g} of the samples at first, "
        f"{data.tokens('train', source.name):,} training tokens of `{data.infos[source.name].source}`"
        for source in data.sources
    }


def _stages(segments: Sequence[Segment]) -> dict[str, str]:
    """Return a line for each stage that changes something; the first of `segments` are the settings without stages."""
    found, window = {}, segments[0].seq_len
    for before, now in pairwise(segments):
        changes = []
        if now.shares != before.shares:
            parts = (f"{name} {share / WHOLE:.4g}" for name, share in sorted(now.shares.items()))
            changes.append(f"samples of {', '.join(parts)}")
        if now.seq_len != before.seq_len:
            changes.append(f"sequences of {now.seq_len} tokens")
        if now.windows != before.windows:
            changes.append(f"global batch of {now.windows * window:,} tokens")
        if changes:
            found[f"From step {now.from_step:,}"] = ", ".join(changes)
    return found


def _shape(model: LlamaConfig) -> str:
    return (
        f"{model.num_parameters():,} parameters, {model.num_layers} layers, hidden size {model.hidden_size}, "
        f"{model.num_heads} heads ({model.num_kv_heads} for keys and values), context of {model.max_seq_len} tokens"
    )


def _sentence_and_list(sentence: str, items: dict[str, str]) -> str:
    return "\n".join([sentence, "", *(f"- **{key}**: {value}" for key, value in items.items())])
