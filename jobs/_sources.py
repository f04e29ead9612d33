"""Sources of text, and tokenizers, on the command line."""

from __future__ import annotations

from llama_ray.data.preparing.config import named_source
from llama_ray.data.sources.files import BUILTIN
from llama_ray.storage.paths import existing, is_model_ref, is_uri


def located(given: str) -> str:
    """Return NAME=WHERE with the absolute path of what is there."""
    name, where = named_source(given)
    return f"{name}={where if where == BUILTIN else existing(where)}"


def tokenizer_path(ref: str) -> str:
    """Return the path of a tokenizer's file or directory, or of a model whose tokenizer it is; see `resolve`."""
    if not (is_model_ref(ref) or is_uri(ref)):
        return existing(ref)
    # It takes seconds to import, with torch.
    from llama_ray.pretrained import resolve

    return str(resolve(ref, weights=False))
