"""The datasets of a mixture, opened, and what they must have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from llama_ray.data.dataset.info import DatasetInfo
from llama_ray.data.dataset.locations import DEFAULT_CACHE_BYTES, dataset_info, load_tokenizer
from llama_ray.data.dataset.shards import DatasetError
from llama_ray.data.dataset.token_dataset import TokenDataset
from llama_ray.data.mixtures.mixture import Mixture
from llama_ray.data.mixtures.sources import DataSource, weights
from llama_ray.data.tokenizing.tokenizer import Tokenizer


def open_mixture(
    sources: Sequence[DataSource],
    split: str,
    *,
    documents: bool = False,
    cache_bytes: int = DEFAULT_CACHE_BYTES,
) -> Mixture:
    """Open the split of all sources; for `documents` see `TokenDataset.windows`, for `cache_bytes` see `open_files`.

    Raises DatasetError or StorageError for one that is missing or damaged, or has no shard of its label.
    """
    datasets = {
        source.name: TokenDataset(source.location, split, source.label, cache_bytes=cache_bytes)
        for source in sources
    }
    return Mixture(datasets, weights(sources), documents=documents)


def read_infos(sources: Sequence[DataSource]) -> dict[str, DatasetInfo]:
    """Return what the dataset of each source holds, by the name of the source. Raises as `open_files` does."""
    return {source.name: dataset_info(source.location) for source in sources}


def common_tokenizer(sources: Sequence[DataSource], infos: Mapping[str, DatasetInfo]) -> Tokenizer:
    """Return the tokenizer of all sources.

    Raises DatasetError if two have different ones, or one has another than its tokens were made with.
    """
    first = sources[0]
    for source in sources:
        ours, theirs = infos[source.name].tokenizer.fingerprint, infos[first.name].tokenizer.fingerprint
        if ours != theirs:
            raise DatasetError(
                f"source {source.name} ({source}) has another tokenizer ({ours[:12]}) than source {first.name} "
                f"({first}, {theirs[:12]}); prepare the one with the tokenizer of the other: --tokenizer DIR"
            )
        if load_tokenizer(source.location).fingerprint != ours:
            raise DatasetError(
                f"{source.location} was tokenised with another tokenizer than the tokenizer.json in it; prepare the "
                "data again"
            )
    return load_tokenizer(first.location)
