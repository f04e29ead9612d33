"""The adapters of one engine, by name, with what belongs to each beside its weights."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from llama_ray.data.tokenizing.files import has_tokenizer
from llama_ray.data.tokenizing.tokenizer import Tokenizer
from llama_ray.generation.adapters.active import Adapter, AdapterKernels
from llama_ray.generation.adapters.weights import AdapterWeights
from llama_ray.generation.end_of_text import all_eos_ids
from llama_ray.model.adapter_files import is_adapter
from llama_ray.model.config import LlamaConfig
from llama_ray.model.end_of_text import stored_eos_ids
from llama_ray.model.weights_hash import weights_hash
from llama_ray.pretrained import open_pretrained, resolve
from llama_ray.utils.errors import printable

_log = logging.getLogger(__name__)


class UnknownAdapterError(ValueError):
    """No adapter has this name; the message lists those that there are."""


@dataclass(frozen=True, eq=False)
class LoadedAdapter:
    """An adapter that requests can use, also after its name has been removed."""

    name: str
    adapter: Adapter
    tokenizer: Tokenizer | None
    """The engine's own, or one with the same ids and the chat template that the adapter was trained with."""
    eos_ids: frozenset[int]


@dataclass(frozen=True)
class Base:
    """What adapters are held against: the model that an engine runs, and the files that it comes from, if any."""

    config: LlamaConfig
    tokenizer: Tokenizer | None
    eos_ids: frozenset[int]
    files: Path | None

    @cached_property
    def weights_hash(self) -> str | None:
        """The digest of the model's files, for which all of them are read once; None without files."""
        if self.files is None:
            return None
        with ExitStack() as stack:
            return weights_hash(open_pretrained(self.files, stack, check_weights=False))


class Adapters:
    """Reads adapters and keeps them in host memory under names. Safe to call from any thread."""

    def __init__(self, base: Base, kernels: Callable[[], AdapterKernels], max_rank: int) -> None:
        self._base, self._kernels, self._max_rank = base, kernels, max_rank
        self._loaded: dict[str, LoadedAdapter] = {}
        self._lock, self._hashing = threading.Lock(), threading.Lock()

    @property
    def names(self) -> list[str]:
        """The names of all adapters, in the order in which they were added."""
        with self._lock:
            return list(self._loaded)

    def find(self, name: str) -> LoadedAdapter:
        """Return the adapter of a name. Raises UnknownAdapterError."""
        with self._lock:
            found = self._loaded.get(name)
            names = ", ".join(map(printable, self._loaded)) or "none"
        if found is None:
            raise UnknownAdapterError(
                f"there is no adapter {printable(str(name))}; there are: {names}; add it with add_adapter"
            )
        return found

    def add(self, name: str, ref: str | Path) -> LoadedAdapter:
        """Read an adapter; see `Engine.add_adapter`."""
        self._check_new(name)
        try:
            loaded = self._load(name, resolve(ref))
        except ValueError as error:
            raise type(error)(f"adapter {printable(name)}: {error}") from error
        with self._lock:
            self._check_new(name)
            self._loaded[name] = loaded
        return loaded

    def remove(self, name: str) -> None:
        """Forget a name; requests that use the adapter go on. Raises UnknownAdapterError."""
        self.find(name)
        with self._lock:
            self._loaded.pop(name, None)

    def _check_new(self, name: str) -> None:
        if not isinstance(name, str) or not name:
            raise ValueError(f"the name of an adapter is {name!r}; it must be text; give it a name")
        if name in self._loaded:
            raise ValueError(
                f"there is an adapter {printable(name)} already; remove it first, or give another name"
            )

    def _load(self, name: str, directory: Path) -> LoadedAdapter:
        if not is_adapter(directory):
            raise ValueError(
                f"{directory} holds no adapter_config.json: it is no adapter; give an adapter in PEFT's layout"
            )
        weights = AdapterWeights.read(directory)
        weights.check(self._base.config, self._max_rank)
        self._check_base(weights)
        tokenizer = self._tokenizer(directory)
        stored = stored_eos_ids(directory, self._base.config.vocab_size)
        eos_ids = self._base.eos_ids | all_eos_ids(tokenizer, stored, self._base.config.vocab_size)
        return LoadedAdapter(name, self._kernels().pack(weights), tokenizer, eos_ids)

    def _check_base(self, weights: AdapterWeights) -> None:
        if weights.base_weights is None:
            return
        # Two threads would read all files twice.
        with self._hashing:
            own = self._base.weights_hash
        if own is not None and own != weights.base_weights:
            raise ValueError(
                f"it was trained on the weights {weights.base_weights[:12]}, and this model's are {own[:12]}; give an "
                "adapter of this base model, or load its base"
            )

    def _tokenizer(self, directory: Path) -> Tokenizer | None:
        base = self._base.tokenizer
        if base is None or not has_tokenizer(directory):
            return base
        own = Tokenizer.load(directory)
        if own.fingerprint == base.fingerprint:
            return own
        _log.warning("%s: its tokenizer differs from the base model's, which is used instead", directory)
        return base
