"""The sections of the report about where a dataset comes from."""

from __future__ import annotations

from llama_ray.data.dataset.info import DatasetInfo
from llama_ray.data.report.html import Html, definitions, element, join, table
from llama_ray.data.report.numbers import size


def left_out(info: DatasetInfo) -> Html:
    """Return what was not read, and what should have been text and was damaged."""
    rows = [
        (source.name, kind, reason, f"{counted.count:,}", "\n".join(counted.examples))
        for source in info.sources
        for kind, reasons in (("bad record", source.bad_records), ("left out", source.left_out))
        for reason, counted in reasons.items()
    ]
    if not rows:
        return Html()
    return join(
        [
            element("h2", "Not read"),
            table(
                ("source", "what", "reason", "count", "for example"),
                ((*row[:4], _lines(row[4])) for row in rows),
                ("count",),
            ),
        ]
    )


def settings(info: DatasetInfo) -> Html:
    """Return the flags of the preparation."""
    rows = [(name, "" if value is None else str(value)) for name, value in info.settings.items()]
    return join([element("h2", "Settings"), definitions(rows)]) if rows else Html()


def files(info: DatasetInfo) -> Html:
    """Return the shards with their checksums."""
    rows = [
        (shard.file, f"{shard.documents:,}", f"{shard.tokens:,}", element("code", shard.sha256))
        for shards in info.splits.values()
        for shard in shards
    ]
    numbers = ("documents", "tokens")
    shards = table(("shard", *numbers, "SHA-256"), rows, numbers)
    total = size(sum(shard.bytes for shards in info.splits.values() for shard in shards))
    return element("details", element("summary", element("b", f"{len(rows):,} shards"), f", {total}"), shards)


def _lines(text: str) -> Html:
    return join(element("div", line) for line in text.split("\n") if line)
