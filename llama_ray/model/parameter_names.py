"""What Hugging Face calls the parameters of `Llama`."""

from __future__ import annotations


def hf_name(name: str) -> str:
    """Return the Hugging Face name of a parameter of `Llama`."""
    return name if name.startswith("lm_head.") else f"model.{name}"
