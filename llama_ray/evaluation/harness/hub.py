"""Whether Hugging Face's libraries look for the hub: they would wait long for a network that is not there."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

_ANSWERS_WITHIN_S = 3.0
_VARIABLES = ("HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE", "HF_EVALUATE_OFFLINE")
_SWITCHES = {
    "datasets.config": "HF_HUB_OFFLINE",
    "evaluate.config": "HF_EVALUATE_OFFLINE",
    "huggingface_hub.constants": "HF_HUB_OFFLINE",
}
"""What the libraries made of the variables when they were imported."""


@contextmanager
def offline_unless_reached(*, needed: bool) -> Iterator[None]:
    """Keep the libraries off the network during the block, unless the hub is `needed` and answers.

    Afterwards the process is as it was: it may download a model next.
    """
    if needed and _hub_answers():
        yield
        return
    before = {name: os.environ.get(name) for name in _VARIABLES}
    switches = {module: getattr(sys.modules[module], name) for module, name in _loaded()}
    for name in _VARIABLES:
        os.environ.setdefault(name, "1")
    for module, name in _loaded():
        setattr(sys.modules[module], name, True)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
        was_offline = "1" in before.values()
        for module, name in _loaded():
            setattr(sys.modules[module], name, switches.get(module, was_offline))


def is_offline() -> bool:
    """Return whether the libraries keep off the network."""
    return os.environ.get("HF_DATASETS_OFFLINE") == "1"


def _loaded() -> list[tuple[str, str]]:
    return [(module, name) for module, name in _SWITCHES.items() if module in sys.modules]


def _hub_answers() -> bool:
    if os.environ.get("HF_HUB_OFFLINE") == "1":
        return False
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        # A proxy knows names that this machine cannot look up.
        return True
    host = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    port = host.port or (80 if host.scheme == "http" else 443)
    try:
        socket.create_connection((host.hostname or "", port), _ANSWERS_WITHIN_S).close()
    except OSError:
        return False
    return True
