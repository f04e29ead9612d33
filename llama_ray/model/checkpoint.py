"""Read a stored model into memory. Nothing is ever unpickled."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch

from llama_ray.model.llama import Llama
from llama_ray.model.parameter_names import hf_name
from llama_ray.model.stored_model import StoredModel, open_model

WeightSlicer = Callable[[str, tuple[int, ...]], tuple[slice, ...]]
"""The name and shape of a parameter -> the slice of it, in each dimension, that this process keeps."""


def load_model(
    directory: str | Path,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    slicer: WeightSlicer | None = None,
) -> Llama:
    """Read a model that `open_model` can open: in the Hugging Face layout, of a training run, or in a GGUF file.

    `dtype` None keeps the dtype of the stored embedding. With `slicer` only the chosen slice of each tensor is read,
    and the model's weights have the size of their slices. All names, shapes and file lengths are checked before the
    weights are allocated; tensors are then copied one at a time, so that the model is never in memory twice.
    Raises CheckpointError for a missing, truncated or unsafe file, and for missing, surplus or misshapen tensors.
    """
    with ExitStack() as stack:
        return read_model(open_model(directory, stack), dtype, device, slicer)


def read_model(
    stored: StoredModel,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    slicer: WeightSlicer | None = None,
) -> Llama:
    """Do what `load_model` does, with a model that is open."""
    # The memory that is given, not the device that new tensors happen to be made on.
    with torch.device("cpu"):
        model = Llama(stored.config, device="meta")
        slices: dict[str, tuple[slice, ...]] = {}
        if slicer is not None:
            slices = {n: slicer(n, tuple(p.shape)) for n, p in model.named_parameters()}
            for name, kept in slices.items():
                _slice_parameter(model, name, kept)
            model.tie_weights()
        model.to(dtype or stored.dtype)
        model.materialize(device)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(stored.tensors[hf_name(name)].read(slices.get(name)))
    return model


def _slice_parameter(model: Llama, name: str, kept: tuple[slice, ...]) -> None:
    """Replace a parameter on the meta device by one of the slice's shape."""
    owner, _, attribute = name.rpartition(".")
    module = model.get_submodule(owner)
    weight = module.get_parameter(attribute)[kept]
    module.register_parameter(attribute, torch.nn.Parameter(weight.detach().clone()))
    if isinstance(module, torch.nn.Linear):
        module.out_features, module.in_features = weight.shape
