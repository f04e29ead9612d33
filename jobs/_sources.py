"""Sources of text on the command line."""

from __future__ import annotations

from llama_ray.data.preparing.config import named_source
from llama_ray.data.sources.files import BUILTIN
from llama_ray.storage.paths import existing


def located(given: str) -> str:
    """Return NAME=WHERE with the absolute path of what is there."""
    name, where = named_source(given)
    return f"{name}={where if where == BUILTIN else existing(where)}"
