"""Models of the Hugging Face hub: `hf://ORG/NAME`, `hf://ORG/NAME@REVISION`, `hf://ORG/NAME/FILE.gguf`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from llama_ray.data.sources.hub_file import HUB, MISSING, hub_endpoint, hub_errors
from llama_ray.model.weight_files import CheckpointError
from llama_ray.utils.errors import first_line, printable

# Small files that describe a model and its tokenizer.
_DESCRIPTION = ["*.json", "*.jinja", "*.model"]
_WEIGHTS = ["*.safetensors"]
# The same weights in other layouts; in these patterns * reaches into folders.
_LEFT_OUT = ["*/*.safetensors", "*/*.json", "*/*.model", "consolidated*"]


class HubModel(NamedTuple):
    """What `hf://ORG/NAME[/FILE.gguf][@REVISION]` names; `file` is '' for the model's own directory."""

    name: str
    file: str
    revision: str | None

    def at(self, commit: str) -> str:
        """Return the reference that always means this commit."""
        return f"{HUB}{self.name}{'/' if self.file else ''}{self.file}@{commit}"


def is_hub_ref(ref: str) -> bool:
    """Whether `ref` names a model of the hub."""
    return ref.startswith(HUB)


def parse(ref: str) -> HubModel:
    """Take a reference apart. Raises CheckpointError for anything that names no model."""
    path, _, revision = ref.removeprefix(HUB).removeprefix("models/").partition("@")
    parts = path.strip("/").split("/")
    named = 1 if len(parts) == 1 else 2
    file = "/".join(parts[named:])
    if not all(re.fullmatch(r"[\w.-]+", part) for part in parts[:named]) or (
        file and not file.endswith(".gguf")
    ):
        raise CheckpointError(
            f"{printable(ref)!r} names no model of the hub; give {HUB}ORG/NAME, {HUB}ORG/NAME@REVISION, or "
            f"{HUB}ORG/NAME/FILE.gguf"
        )
    return HubModel("/".join(parts[:named]), file, revision or None)


def fetch(ref: str, *, weights: bool = True) -> Path:
    """Return the local directory or `.gguf` file of a model of the hub, downloaded once into the hub's own cache.

    With `weights` False only what describes the model and its tokenizer is fetched. A model that was fetched before is
    found while the hub is out of reach. Needs the package huggingface_hub; the environment variables HF_TOKEN and
    HF_ENDPOINT hold. Raises CheckpointError.
    """
    model = parse(ref)
    try:
        with hub_errors():
            from huggingface_hub import hf_hub_download, snapshot_download

            endpoint = hub_endpoint()
            if model.file:
                return Path(
                    hf_hub_download(model.name, model.file, revision=model.revision, endpoint=endpoint)
                )
            return Path(
                snapshot_download(
                    model.name,
                    revision=model.revision,
                    endpoint=endpoint,
                    allow_patterns=[*_DESCRIPTION, *(_WEIGHTS if weights else ())],
                    ignore_patterns=_LEFT_OUT,
                )
            )
    except (OSError, ValueError) as error:
        raise _unreadable(ref, error) from error


def fixed(ref: str) -> str:
    """Return the reference to the commit that `ref` means now. Raises CheckpointError."""
    model = parse(ref)
    if model.revision and re.fullmatch("[0-9a-f]{40}", model.revision):
        return ref
    try:
        with hub_errors():
            from huggingface_hub import snapshot_download

            # Like the model itself, its commit is found in the cache while the hub is out of reach.
            found = snapshot_download(
                model.name,
                revision=model.revision,
                endpoint=hub_endpoint(),
                allow_patterns=["config.json"],
            )
    except (OSError, ValueError) as error:
        raise _unreadable(ref, error) from error
    return model.at(Path(found).name)


def _unreadable(ref: str, error: Exception) -> CheckpointError:
    if str(error) == MISSING:
        return CheckpointError(MISSING)
    return CheckpointError(
        f"cannot read {printable(ref)!r} ({first_line(error)}); check its name, the network and the access to it "
        "(HF_TOKEN, `hf auth login`), or give a directory"
    )
