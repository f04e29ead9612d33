"""What happens to an endpoint while it answers: the alias moves, replicas are killed or stopped."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import time
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from benchmarks.serving.processes import command
from benchmarks.serving.registered import Registered
from benchmarks.serving.servers import OurApplication

_LOOK_S = 0.1
_PATIENCE_S = 180
_REPLICA = "ServeReplica:llama-ray:LlamaReplica"
"""In the title of a replica's process."""


class Disturbed(Protocol):
    """A way to disturb an endpoint."""

    def once(self) -> float:
        """Disturb it at a random instant; return, once it is over, the seconds that it took."""


class Moving:
    """Moves the alias from one version to the next; it is over when the new one serves."""

    def __init__(self, server: OurApplication, model: Registered, rng: random.Random) -> None:
        self._server, self._model, self._rng = server, model, rng
        self._next = itertools.cycle([*range(2, len(model.directories) + 1), 1])

    def once(self) -> float:
        """Move the alias, sometimes while streams that began before the last move still run."""
        time.sleep(self._rng.uniform(0, 2))
        number = next(self._next)
        began = time.monotonic()
        self._model.move(number)
        ref = self._model.version(number)
        _wait_until(lambda: _card(self._server, self._model.name)["root"] == ref, f"{ref} does not serve")
        return time.monotonic() - began


class Killing:
    """Sends a signal to a replica, or to `everyone` at once; it is over when as many as before are ready."""

    def __init__(
        self, server: OurApplication, rng: random.Random, number: signal.Signals, *, everyone: bool = False
    ) -> None:
        self._server, self._rng, self._signal, self._everyone = server, rng, number, everyone
        self._replicas = len(self._pids())

    def once(self) -> float:
        """Signal at a random instant."""
        time.sleep(self._rng.uniform(0, 2))
        pids = self._pids()
        victims = pids if self._everyone else [self._rng.choice(pids)]
        began = time.monotonic()
        for pid in victims:
            os.kill(pid, self._signal)
        _wait_until(lambda: self._restored(victims), f"the replicas {victims} were not replaced")
        return time.monotonic() - began

    def _pids(self) -> list[int]:
        return sorted(self._server.family.find(_REPLICA))

    def _restored(self, victims: list[int]) -> bool:
        """Return whether the victims have gone, and others are ready in their place."""
        # A process that has ended has no command line, even if its parent has not asked for its status.
        if any(command(pid) for pid in victims):
            return False
        ready: int = _card(self._server, self._server.model)["metadata"]["replicas"]
        return ready >= self._replicas and len(self._pids()) >= self._replicas


def _card(server: OurApplication, name: str) -> Mapping[str, Any]:
    url = f"http://127.0.0.1:{server.port}/v1/models/{name}"
    with urllib.request.urlopen(url, timeout=_PATIENCE_S) as answer:
        card: Mapping[str, Any] = json.load(answer)
    return card


def _wait_until(condition: Callable[[], bool], message: str) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while not condition():
        if time.monotonic() > deadline:
            raise RuntimeError(f"{message} after {_PATIENCE_S} s")
        time.sleep(_LOOK_S)
