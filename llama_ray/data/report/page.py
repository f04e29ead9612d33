"""The page `report.html`: what is in a dataset and what was left out, for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from llama_ray.data.cleaning.drops import Drops
from llama_ray.data.report.statistics import Statistics
from llama_ray.storage.atomic import write_text

REPORT_FILE = "report.html"


@dataclass(frozen=True)
class Contents:
    """What a report tells.

    `splits` gives (documents, tokens) by split; `tokenizer` and `settings` are names and values to show as they are;
    `left_out` holds a line for each reason why files and records were not taken.
    """

    title: str
    splits: Mapping[str, tuple[int, int]]
    statistics: Statistics
    drops: Drops
    tokenizer: Mapping[str, str]
    settings: Mapping[str, str]
    left_out: Sequence[str] = ()


def write_report(directory: Path, contents: Contents) -> Path:
    """Write `report.html` into `directory` and return its path. The page needs no other file and no network."""
    path = directory / REPORT_FILE
    write_text(path, f"<!doctype html><title>{escape(contents.title)}</title>")
    return path
