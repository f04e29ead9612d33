"""What `--data` names: a directory, a URI of one, or files of Megatron."""

from __future__ import annotations

from llama_ray.data.dataset.files import DatasetFiles, LocalFiles
from llama_ray.data.dataset.info import DatasetInfo
from llama_ray.data.dataset.megatron import MegatronFiles, find_pairs
from llama_ray.data.dataset.remote import RemoteFiles
from llama_ray.data.tokenizing.tokenizer import Tokenizer
from llama_ray.storage import store
from llama_ray.storage.paths import is_uri

DEFAULT_CACHE_BYTES = 32 * 2**30
"""Of the shards of datasets in object stores, a machine keeps so many bytes."""


def open_files(location: str, cache_bytes: int = DEFAULT_CACHE_BYTES) -> DatasetFiles:
    """Open the dataset at `location`.

    That is a directory which jobs/prepare_data.py wrote, a URI to which it was copied, or files of Megatron, see
    `find_pairs`.

    `cache_bytes` bounds what this machine keeps of datasets in object stores. Raises DatasetError or StorageError for
    a location that holds no dataset or cannot be read.
    """
    if is_uri(location):
        if not location.startswith("file:"):
            return RemoteFiles(location, cache_bytes)
        location = store.open_storage(location)[1]
    pairs = find_pairs(location)
    return MegatronFiles(location, pairs) if pairs else LocalFiles(location)


def dataset_info(location: str) -> DatasetInfo:
    """Return what the dataset at `location` holds. Raises as `open_files` does."""
    return open_files(location).info


def load_tokenizer(location: str) -> Tokenizer:
    """Return the tokenizer of the dataset at `location`. Raises as `open_files` does, and TokenizerError."""
    return Tokenizer.load(open_files(location).tokenizer_directory())
