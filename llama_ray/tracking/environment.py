"""The environment variables that the clients of MLflow and of the Hugging Face hub need in another process."""

from __future__ import annotations

import os
import re

from llama_ray.tracking.uri import tracking_uri
from llama_ray.utils.redact import redact

_PREFIXES = ("MLFLOW_", "DATABRICKS_", "HF_TOKEN", "HF_ENDPOINT")
_SECRET = re.compile("TOKEN|PASSWORD|SECRET|CREDENTIAL|KEY")


def open_variables() -> dict[str, str]:
    """Return this process' variables that may be shown, as Ray's dashboard and logs show those of actors."""
    return {name: value for name, value in _variables().items() if not _is_secret(name, value)}


def secret_variables() -> dict[str, str]:
    """Return those that hold passwords and the like; they travel as data, and the other process sets them."""
    return {name: value for name, value in _variables().items() if _is_secret(name, value)}


def _variables() -> dict[str, str]:
    found = {name: value for name, value in os.environ.items() if name.startswith(_PREFIXES)}
    # Given in any case, and absolute: the other process has another directory.
    return found | {"MLFLOW_TRACKING_URI": tracking_uri()}


def _is_secret(name: str, value: str) -> bool:
    return bool(_SECRET.search(name)) or redact(value) != value
