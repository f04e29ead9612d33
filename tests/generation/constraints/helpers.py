"""Grammars that cost too much, and the processes that follow grammars."""

from __future__ import annotations

import json

import psutil

_START = "constraints.template"


def costly_schema(number: int = 0) -> str:
    """Return a schema that takes seconds to compile, another one for each number."""
    return json.dumps({"type": "integer", "multipleOf": 1_000_003 + number})


COSTLY_MASK = "[b-y]{30}(a{1000}){1000}"
"""Compiles quickly; masks near its thirtieth character take longer than they may, or grow too complex."""


class Processes:
    """The processes that this one starts for grammars from now on."""

    def __init__(self) -> None:
        self._before: set[psutil.Process] = set()
        self._before = set(self.all())

    def all(self) -> list[psutil.Process]:
        """Return those that run now."""
        children = psutil.Process().children(recursive=True)
        return [p for p in children if p not in self._before and _follows_grammars(p)]

    def template(self) -> psutil.Process:
        """Return the process that all others are forked from."""
        (template,) = [p for p in self.all() if p.ppid() == psutil.Process().pid]
        return template

    def forks(self) -> list[psutil.Process]:
        """Return the processes of single grammars."""
        return [p for p in self.all() if p.ppid() != psutil.Process().pid]


def _follows_grammars(process: psutil.Process) -> bool:
    try:
        return _START in " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return False
