"""Write an adapter as it is, in the layout of PEFT."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from llama_ray.data.tokenizing.files import has_tokenizer
from llama_ray.data.tokenizing.tokenizer import Tokenizer
from llama_ray.exporting.hugging_face import eos_ids_of, generation_text
from llama_ray.model.adapter_files import StoredAdapter, open_adapter, save_adapter
from llama_ray.model.config_files import GENERATION_FILE
from llama_ray.model.parts import cast


def write_adapter(directory: Path, source: Path, vocab_size: int, dtype: torch.dtype | None) -> None:
    """Write the adapter in `source` to `directory`, in `dtype` or as it is, with its tokenizer where it has its own.

    `vocab_size` is that of its base. Raises CheckpointError.
    """
    with ExitStack() as stack:
        adapter = open_adapter(source, stack)
        beside = {}
        if has_tokenizer(source):
            tokenizer = Tokenizer.load(source)
            beside = tokenizer.files()
            eos_ids = eos_ids_of(source, tokenizer, vocab_size)
            beside[GENERATION_FILE] = generation_text(source, tokenizer.bos_id, eos_ids)
        save_adapter(
            directory,
            adapter.config,
            _factors(adapter, dtype),
            base=adapter.base,
            base_weights=adapter.base_weights,
            beside=beside,
        )


def _factors(adapter: StoredAdapter, dtype: torch.dtype | None) -> dict[str, tuple[Tensor, Tensor]]:
    return {
        name: (cast(name, a.read(), dtype or a.dtype), cast(name, b.read(), dtype or b.dtype))
        for name, (a, b) in adapter.factors.items()
    }
