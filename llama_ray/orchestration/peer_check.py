"""Whether a saved model computes what transformers computes, where that is installed."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama_ray.data.tokenizing.tokenizer import Tokenizer
from llama_ray.model.weight_files import CheckpointError
from llama_ray.pretrained import load_pretrained, load_shape
from llama_ray.utils.free_memory import free_memory

TOLERANCE = 1e-3
"""Largest difference of two logits, as a share of the largest logit. Float32 gives 1e-6 to 1e-4; another rotary base,
norm or order of rows gives more than 1e-2."""
_TEXT = "The 3 quick brown foxes (aged 2, 5 and 11) jumped over the lazy dog; then they wrote: def f(x): return x + 1"
# Weights in float32, and the copies that are made of the largest while they are read.
_BYTES_PER_PARAMETER = 5


@dataclass(frozen=True)
class PeerCheck:
    """What a comparison has found: `difference` is a share of the largest logit, None where nothing was compared."""

    difference: float | None
    text: str
    """In one line."""


def check_against_transformers(
    directory: Path, tokenizer: Tokenizer, source: Path | None = None
) -> PeerCheck:
    """Compare the logits of the Hugging Face model in `directory` with those of transformers, in float32.

    transformers reads `source`, the files that `directory` was made from, and rounds them to its dtype; by default
    `directory` itself. Nothing is compared where transformers is not installed, or the model does not fit into memory.
    Raises CheckpointError for a difference above TOLERANCE, and for files that transformers cannot read.
    """
    if importlib.util.find_spec("transformers") is None:
        return PeerCheck(None, "not compared with transformers, which is not installed")
    shape = load_shape(directory)
    needed, free = _BYTES_PER_PARAMETER * shape.num_parameters(), free_memory()
    if needed > free:
        room = f"{needed / 2**30:.3g} GiB, and {free / 2**30:.3g} GiB are free"
        return PeerCheck(None, f"not compared with transformers: that takes {room}")
    ids = torch.tensor([[id for id in tokenizer.encode_prompt(_TEXT) if id < shape.vocab_size]])
    ids = ids[:, : shape.max_seq_len]
    theirs = _peer_logits(source or directory, directory, ids)
    model, _ = load_pretrained(directory, torch.float32)
    with torch.inference_mode():
        ours = model(ids)
    difference = float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-30))
    if not difference <= TOLERANCE:
        raise CheckpointError(
            f"logits differ from those of transformers by {difference:.2g} of the largest; it must be at most "
            f"{TOLERANCE:g}; the model is of a kind that is read wrongly: please report it"
        )
    return PeerCheck(difference, f"logits as those of transformers, to {difference:.1e} of the largest")


def _peer_logits(source: Path, rounded_as: Path, ids: Tensor) -> Tensor:
    """Return the logits of transformers for the weights in `source`, rounded to the dtype of those in `rounded_as`."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        dtype = AutoConfig.from_pretrained(rounded_as).dtype
        model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"transformers cannot read {source} ({str(error).strip().splitlines()[0]}); give whole files, or leave "
            "the comparison out with --verify false"
        ) from error
    with torch.inference_mode():
        logits: Tensor = model.float().eval()(ids).logits
    return logits
