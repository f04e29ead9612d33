"""What an engine and its grammars' processes send each other. Imported by both: standard library only."""

from __future__ import annotations

import json
from multiprocessing.connection import Connection
from typing import Any, Literal, NamedTuple

Kind = Literal["json_schema", "regex"]


class Job(NamedTuple):
    """The first message about a grammar's process, to the template that forks it.

    Its text is at the beginning of the memory that the process and the engine share, `length` bytes. It may
    take `cpu_s` to compile, `nice` below the priority of the engine.
    """

    number: int
    kind: Kind
    length: int
    cpu_s: float
    nice: int


class Question(NamedTuple):
    """One candidate whose masks are wanted: for the position after its tokens, and after each token of `draft`.

    `tokens` are those that the process does not know yet.
    """

    candidate: int
    tokens: list[int]
    draft: list[int]


class Answer(NamedTuple):
    """Masks `first` to `first + masks - 1` of the shared memory, for the first positions that were asked for.

    There are fewer than positions if a draft token is not allowed; if the output is complete at a position, which is
    `finished`, 0 for the first; and if no mask can be computed for the position after the last, for the reason `error`.
    """

    first: int
    masks: int
    finished: int | None
    error: str | None


def send(connection: Connection, message: object) -> None:
    """Send a message of lists, numbers and strings."""
    connection.send_bytes(json.dumps(message).encode())


def receive(connection: Connection) -> Any:
    """Wait for a message; raise EOFError or OSError if the other side has gone."""
    return json.loads(connection.recv_bytes())
