"""Numbered attempts at a run: the newest one fences the older ones off, wherever those may still be at work.

Each launch writes a file `attempts/NUMBER-TOKEN.json` to the run's directory, with a number above all others. Whoever
changes the run looks first whether there is a larger number than its own. A writer that was suspended between that
look and its write may still write late, and no storage can refuse it. Therefore an attempt writes its checkpoints
under names of its own, unless all attempts before it are known to have ended: what comes late cannot touch them.
"""

from __future__ import annotations

import json
import random
import secrets
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from llama_ray.storage import store
from llama_ray.utils.redact import RedactedRepr

_DIRECTORY = "attempts"
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_LONGEST_PAUSE_S = 0.2


class Superseded(Exception):
    """A newer attempt goes on with the run, so this one must change nothing any more; the message says so in a line."""


@dataclass(frozen=True, repr=False)
class Attempt(RedactedRepr):
    """One launch of the run in the directory `run`.

    `apart` says whether an earlier attempt may still be writing, so that this one must write under other names.
    """

    run: str
    number: int
    apart: bool = False

    def is_newest(self) -> bool:
        """Return whether no newer attempt has begun. Raises OSError where the storage does not answer."""
        return max(_numbers(self.run), default=0) <= self.number

    def check(self) -> None:
        """Raise Superseded if a newer attempt has begun; OSError where the storage does not answer."""
        if not self.is_newest():
            newest = max(_records(self.run), key=lambda record: record.number)
            raise Superseded(
                f"attempt {self.number} at run {store.name_of(self.run)} ends, because attempt {newest.number} on "
                f"{newest.host} goes on with it"
            )


class _Content(TypedDict):
    """What the file of an attempt says."""

    host: str
    boot: str
    ended: bool


@dataclass(frozen=True)
class _Record:
    """An attempt that has begun, and what its file says."""

    number: int
    host: str
    boot: str
    ended: bool


@contextmanager
def attempt(run: str) -> Iterator[Attempt]:
    """Begin the next attempt at `run`, and note at the exit that it has ended and writes nothing any more.

    An interrupt leaves that open, because workers may be at work for a moment longer.
    """
    number, file = _begin(run)
    apart = any(not record.ended for record in _records(run) if record.number < number)
    try:
        yield Attempt(run, number, apart)
    except Exception:
        _note_end(file)
        raise
    _note_end(file)


def current(run: str) -> Attempt:
    """Return the newest attempt at `run`, for a writer that is part of none: it takes a run as it finds it."""
    return Attempt(run, max(_numbers(run), default=1))


def lives_here(run: str) -> bool:
    """Return whether the newest attempt at `run` began on this machine and is not known to have ended."""
    records = _records(run)
    newest = max(records, key=lambda record: record.number, default=None)
    return newest is not None and not newest.ended and (newest.host, newest.boot) == _machine()


def _begin(run: str) -> tuple[int, str]:
    """Write the file of a new attempt; return its number, which no other attempt has, and the file.

    Not all storage can create a file only if it is new. Of two attempts that choose the same number, the one that
    looks last sees the other, and so takes a larger number.
    """
    token = secrets.token_hex(8)
    while True:
        number = max(_numbers(run), default=0) + 1
        file = store.join(_directory(run), f"{number:08d}-{token}.json")
        store.write_text(file, _content(ended=False))
        if sum(other >= number for other in _numbers(run)) == 1:
            return number, file
        _note_end(file)
        time.sleep(random.uniform(0, _LONGEST_PAUSE_S))


def _note_end(file: str) -> None:
    # Otherwise the next attempt writes under names of its own, which is no harm.
    with suppress(OSError):
        store.write_text(file, _content(ended=True))


def _content(*, ended: bool) -> str:
    host, boot = _machine()
    content: _Content = {"host": host, "boot": boot, "ended": ended}
    return json.dumps(content)


def _machine() -> tuple[str, str]:
    """Return the host's name, which is also that of a container, and the boot of its kernel."""
    boot = _BOOT_ID.read_text().strip() if _BOOT_ID.is_file() else ""
    return socket.gethostname(), boot


def _numbers(run: str) -> list[int]:
    names = (name.partition("-")[0] for name in store.list_files(_directory(run)))
    return [int(name) for name in names if name.isdecimal()]


def _records(run: str) -> list[_Record]:
    found = []
    for name in store.list_files(_directory(run)):
        number = name.partition("-")[0]
        text = store.read_text(store.join(_directory(run), name))
        if number.isdecimal() and text is not None:
            found.append(_Record(int(number), **_parsed(text)))
    return found


def _parsed(text: str) -> _Content:
    """Return the content of an attempt's file; of one that a power cut has damaged, that nothing is known."""
    try:
        content: _Content = json.loads(text)
    except ValueError:
        return {"host": "an unknown machine", "boot": "", "ended": False}
    return content


def _directory(run: str) -> str:
    return store.join(run, _DIRECTORY)
