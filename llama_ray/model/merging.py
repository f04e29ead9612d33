"""A stored model with an adapter added to it, tensor by tensor as it is read."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llama_ray.model.adapter_files import StoredAdapter
from llama_ray.model.lora import merge
from llama_ray.model.stored_model import StoredModel, UnreadTensor
from llama_ray.model.weight_files import CheckpointError
from llama_ray.model.weights_hash import weights_hash


def merged(base: StoredModel, adapter: StoredAdapter) -> StoredModel:
    """Return `base` with the weights of `adapter` added to it, in fp32, and rounded to the dtype of `base`.

    Nothing is read yet; a region of a tensor costs a region of the adapter's product. The result is tied as `base` is.
    Raises CheckpointError if the adapter is of a model of another shape; see `check_base` for its weights.
    """
    check_shapes(base, adapter)
    tensors: dict[str, UnreadTensor] = dict(base.tensors)
    for name, (a, b) in adapter.factors.items():
        tensors[name] = _MergedTensor(base.tensors[name], a, b, adapter.config.scale)
    return StoredModel(base.config, tensors)


def check_base(base: StoredModel, adapter: StoredAdapter) -> None:
    """Raise CheckpointError unless `adapter` was trained on the weights of `base`, as far as that is recorded.

    It reads all of `base`.
    """
    if adapter.base_weights is not None:
        check_base_hash(weights_hash(base), adapter)


def check_base_hash(base_weights: str, adapter: StoredAdapter) -> None:
    """Do what `check_base` does, for a base whose `weights_hash` is known."""
    if adapter.base_weights not in (None, base_weights):
        raise CheckpointError(
            f"the weights of {adapter.base} (hash {base_weights[:12]}) are not those that the adapter was trained on "
            f"({str(adapter.base_weights)[:12]}); give back the model that it was trained on, or write its place into "
            "base_model_name_or_path of adapter_config.json"
        )


def check_shapes(base: StoredModel, adapter: StoredAdapter) -> None:
    """Raise CheckpointError unless the factors of `adapter` have the sizes of the weights of `base`."""
    for name, (a, b) in adapter.factors.items():
        weight = base.tensors.get(name)
        sizes = (*b.shape[:1], *a.shape[1:])
        if weight is None or weight.shape != sizes:
            found = "no such weight" if weight is None else f"{list(weight.shape)}"
            raise CheckpointError(
                f"the adapter of {adapter.base} is for {name} of {list(sizes)}; the model has {found}; give the model "
                "that the adapter was trained on"
            )


@dataclass(frozen=True)
class _MergedTensor:
    """A tensor with the product of two factors added to it when it is read."""

    base: UnreadTensor
    a: UnreadTensor
    b: UnreadTensor
    scale: float

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.base.dtype

    def read(self, region: tuple[slice, ...] | None = None) -> Tensor:
        rows, columns = region or (slice(None), slice(None))
        a, b = self.a.read((slice(None), columns)), self.b.read((rows, slice(None)))
        return merge(self.base.read(region), a, b, self.scale)
