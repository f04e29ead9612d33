"""Average models of any references into a Hugging Face directory."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from llama_ray.data.tokenizing.tokenizer import Tokenizer
from llama_ray.exporting.averaging import average, shares_of
from llama_ray.exporting.hugging_face import check_apart, write_directory
from llama_ray.model.config import LlamaConfig
from llama_ray.model.weight_files import CheckpointError
from llama_ray.pretrained import fixed, load_tokenizer, open_pretrained, resolve
from llama_ray.storage import run_directory, store
from llama_ray.utils.errors import printable
from llama_ray.utils.fields import check_fields, limits

_DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
Log = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class AverageConfig:
    """What to average.

    Args:
        refs: The models: directories, training checkpoints, .gguf files, models:/NAME/VERSION, hf://ORG/NAME.
        run: Directory of a run, of which the last checkpoints are averaged.
        last: How many checkpoints of the run.
        weights: The weight of each model; by default all have the same. They need not have the sum 1.
        dtype: Of the average; auto is that of the first model. Sums are computed in float32.
    """

    refs: tuple[str, ...] = ()
    run: str | None = None
    last: int = field(default=5, metadata=limits(2))
    weights: tuple[float, ...] | None = None
    dtype: Literal["auto", "f32", "f16", "bf16"] = "auto"

    def __post_init__(self) -> None:
        check_fields(self)
        if (self.run is None) == (not self.refs):
            raise ValueError("it must be said what is averaged; give either models or --run DIR")
        if len(self.refs) == 1:
            raise ValueError(f"{printable(self.refs[0])} is one model; give at least two")


@dataclass(frozen=True)
class Average:
    """What was averaged: a model's shape, and its parents with their shares, which have the sum 1."""

    model: LlamaConfig
    parents: list[str]
    shares: list[float]


def write_average(config: AverageConfig, directory: Path, log: Log) -> Average:
    """Write the average of the models of `config` to `directory`, and report each parent to `log`.

    A part of a tensor of each model is in memory. Raises ValueError with one line for models that cannot be read, of
    different shapes, or with different tokenizers.
    """
    refs = [fixed(ref) for ref in config.refs or _last_checkpoints(str(config.run), config.last)]
    shares = shares_of(config.weights, len(refs))
    paths = [resolve(ref) for ref in refs]
    check_apart(directory, paths)
    with ExitStack() as stack:
        averaged = average([open_pretrained(path, stack) for path in paths], refs, shares)
        tokenizer = _common_tokenizer(refs, paths, averaged.config.vocab_size)
        for ref, share in zip(refs, shares, strict=True):
            log(f"{share:.4f} of {printable(ref)}")
        dtype = _DTYPES.get(config.dtype, averaged.dtype)
        write_directory(averaged, tokenizer, paths[0], directory, dtype=dtype)
    return Average(averaged.config, refs, shares)


def _last_checkpoints(run: str, count: int) -> list[str]:
    """Return the newest complete checkpoint of each of the last steps of a run, oldest first."""
    by_step: dict[int | None, str] = {}
    for checkpoint in run_directory.list_checkpoints(run):
        if not run_directory.missing_or_truncated(checkpoint):
            by_step.setdefault(run_directory.checkpoint_step(store.name_of(checkpoint)), checkpoint)
    found = list(by_step.values())[:count][::-1]
    if len(found) < count:
        raise CheckpointError(
            f"{printable(run)} has {len(found)} complete checkpoints; it must have {count}; keep more of them, or give "
            "a smaller --last"
        )
    return found


def _common_tokenizer(refs: list[str], paths: list[Path], vocab_size: int) -> Tokenizer | None:
    """Return the tokenizer of all models. Raises CheckpointError where they have different ones."""
    first, *others = (load_tokenizer(path, vocab_size) for path in paths)
    for ref, other in zip(refs[1:], others, strict=True):
        if (first and first.fingerprint) != (other and other.fingerprint):
            raise CheckpointError(
                f"{printable(ref)} has another tokenizer than {printable(refs[0])}, so that their weights belong to "
                "different tokens; give models with one tokenizer"
            )
    return first
