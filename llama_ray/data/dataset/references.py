"""How probable the reference model finds each answer of the pairs of a dataset: a file beside the shards.

`reference.safetensors` has a tensor `SPLIT/SHARD` for each shard: float32, the log-probability of what is learned of
each of its documents, in their order. Its metadata say which weights and which data they belong to.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llama_ray.data.dataset.files import DatasetFiles
from llama_ray.data.dataset.shards import DatasetError
from llama_ray.storage import store

REFERENCE_FILE = "reference.safetensors"


@dataclass(frozen=True)
class References:
    """The log-probabilities that the model `model`, whose `weights_hash` is `weights`, gives the documents."""

    weights: str
    model: str
    logprobs: Mapping[str, NDArray[np.float32]]

    def of(self, split: str, shard: int) -> NDArray[np.float32]:
        """Return those of the documents of shard number `shard`."""
        return self.logprobs[_key(split, shard)]


def read_references(files: DatasetFiles) -> References | None:
    """Return what lies beside the shards of `files`; None without any. Raises DatasetError if it is of other data."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    size = files.size(REFERENCE_FILE)
    if size is None:
        return None
    content = files.read_file(REFERENCE_FILE, 0, size)
    place = f"{REFERENCE_FILE} of {files.location}"
    try:
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        metadata: dict[str, str] = header["__metadata__"]
        references = References(metadata["weights"], metadata["model"], load(content))
        data = metadata["data"]
    except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DatasetError(f"{place} is damaged; delete it, and it is computed again") from error
    if data != files.info.content_fingerprint:
        raise DatasetError(f"{place} belongs to other data; delete it, and it is computed again")
    return references


def write_references(
    files: DatasetFiles, weights: str, model: str, logprobs: Mapping[str, Sequence[Sequence[float]]]
) -> None:
    """Write the log-probabilities by split, shard and document."""
    from safetensors.numpy import save

    tensors = {
        _key(split, number): np.array(shard, np.float32)
        for split, shards in logprobs.items()
        for number, shard in enumerate(shards)
    }
    metadata = {"weights": weights, "model": model, "data": files.info.content_fingerprint}
    location = files.location
    with store.replacing(store.join(location, REFERENCE_FILE)) as stream:
        stream.write(save(tensors, metadata))


def _key(split: str, shard: int) -> str:
    return f"{split}/{shard}"
