"""The page `report.html`: what is in a dataset and what was left out of it, for people."""

from __future__ import annotations

from pathlib import Path

from llama_ray.data.cleaning.drops import Drops
from llama_ray.data.dataset.info import DatasetInfo
from llama_ray.data.report.cleaning import cleaning
from llama_ray.data.report.contents import languages, lengths, samples, sources, summary, tokenizer
from llama_ray.data.report.html import Html, element, join
from llama_ray.data.report.provenance import files, left_out, settings
from llama_ray.data.report.statistics import SourceStatistics, Statistics
from llama_ray.data.report.style import STYLE
from llama_ray.storage.atomic import write_text

REPORT_FILE = "report.html"


def write_report(directory: Path, info: DatasetInfo, statistics: Statistics, drops: Drops) -> Path:
    """Write `report.html` into `directory` and return its path.

    `statistics` are of the documents of all splits. The page needs no other file, no network and no scripts.
    """
    path = directory / REPORT_FILE
    write_text(path, page(info, statistics, drops))
    return path


def page(info: DatasetInfo, statistics: Statistics, drops: Drops) -> str:
    """Return the content of `report.html`."""
    found = {source.name: statistics.sources.get(source.name, SourceStatistics()) for source in info.sources}
    title = f"Dataset {', '.join(source.name for source in info.sources)}"
    sections = [
        summary(title, info, found),
        sources(info, found),
        lengths(found),
        languages(found),
        cleaning(info, drops),
        left_out(info),
        tokenizer(info, found),
        samples(found),
        settings(info),
        files(info),
    ]
    head = (
        Html('<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'),
        element("title", title),
        element("style", STYLE),
    )
    body = element("body", element("main", join(sections)))
    return f'<!doctype html>\n<html lang="en">{element("head", *head)}{body}</html>\n'
