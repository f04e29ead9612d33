"""Turns at a registered model: whoever decides about its aliases does so alone, on any machine.

MLflow sets an alias whatever it was before, so of two processes that read, compare and set at once, the worse model may
set it last. It has no locks either, but it stores the tags of a model in order: that is enough for one.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from llama_ray.tracking.errors import TrackingError

_TAG = "turn."
"""Before the token of a process in the name of the tag that claims a turn."""


@contextmanager
def turn(
    client: MlflowClient, name: str, *, poll_s: float = 0.2, stale_s: float = 60.0, wait_s: float = 300.0
) -> Iterator[None]:
    """Wait until no other process has its turn at the registered model `name`, and have it until the exit.

    Each process writes its claim before it looks for others, so of two that come at once, one at least sees the other:
    the one with the larger token withdraws and tries again, and the other waits until it is alone. A claim that has
    stood for `stale_s` seconds belongs to a process that died. Raises TrackingError after `wait_s` seconds.
    """
    token = _wait(client, name, poll_s, stale_s, time.monotonic() + wait_s)
    try:
        yield
    finally:
        _withdraw(client, name, token)


def _wait(client: MlflowClient, name: str, poll_s: float, stale_s: float, deadline: float) -> str:
    """Return the token of a claim that stands alone."""
    pause = threading.Event()
    first_seen: dict[str, float] = {}
    while True:
        token = secrets.token_hex(8)
        client.set_registered_model_tag(name, _TAG + token, "deciding about an alias")
        try:
            while others := _claims(client, name) - {token}:
                for other in others:
                    if time.monotonic() - first_seen.setdefault(other, time.monotonic()) > stale_s:
                        _withdraw(client, name, other)
                if time.monotonic() > deadline:
                    raise TrackingError(
                        f"others decide about the aliases of {name!r} all the time; try again, or set the alias in "
                        "MLflow's UI"
                    )
                if min(others) < token:
                    break
                pause.wait(poll_s)
            else:
                return token
        except BaseException:
            _withdraw(client, name, token)
            raise
        _withdraw(client, name, token)
        pause.wait(poll_s * (1 + secrets.randbelow(100) / 100))


def _claims(client: MlflowClient, name: str) -> set[str]:
    tags = client.get_registered_model(name).tags
    return {key.removeprefix(_TAG) for key in tags if key.startswith(_TAG)}


def _withdraw(client: MlflowClient, name: str, token: str) -> None:
    # Another process may have taken it for stale.
    with suppress(MlflowException):
        client.delete_registered_model_tag(name, _TAG + token)
