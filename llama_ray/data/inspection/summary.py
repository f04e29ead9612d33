"""A dataset on a page: numbers, sources, lengths of documents, common tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from llama_ray.data.dataset.files import DatasetFiles, Place
from llama_ray.data.dataset.info import DatasetInfo
from llama_ray.data.inspection.lengths import Lengths
from llama_ray.data.inspection.terminal import WIDTH, Style, bar, shown, table
from llama_ray.data.report.numbers import share
from llama_ray.data.tokenizing.tokenizer import Tokenizer
from llama_ray.utils.errors import printable

_SPAN_TOKENS, _SPANS = 2**14, 256
_MOST_COMMON, _MOST_REASONS = 12, 12


@dataclass(frozen=True)
class TokenCounts:
    """How often each token id occurs in a sample of a split, and how many bytes its text has."""

    counts: npt.NDArray[np.int64]
    bytes_per_token: float

    @classmethod
    def of(cls, files: DatasetFiles, split: str, tokenizer: Tokenizer) -> TokenCounts:
        """Read up to four million tokens at even distances."""
        spans = files.read(split, list(_places(files, split)))
        ids = [span.tokens.astype(np.int64) for span in spans]
        counts = np.zeros(max(files.info.vocab_size, 1), np.int64)
        for part in ids:
            counts += np.bincount(part, minlength=len(counts))
        text = tokenizer.decode(ids[0].tolist()).encode() if ids else b""
        return cls(counts, len(text) / max(len(ids[0]) if ids else 0, 1))


def _places(files: DatasetFiles, split: str) -> Iterator[Place]:
    stride = max(files.info.tokens(split) // _SPANS, _SPAN_TOKENS)
    for number, shard in enumerate(files.info.splits[split]):
        for start in range(0, shard.tokens, stride):
            yield Place(number, start, min(start + _SPAN_TOKENS, shard.tokens))


def summary(files: DatasetFiles, tokenizer: Tokenizer, style: Style) -> Iterator[str]:
    """Yield the lines that describe a dataset."""
    info = files.info
    lengths = {split: Lengths.of(files, split) for split in info.splits}
    counts = TokenCounts.of(files, "train", tokenizer)
    total = sum(info.tokens(split) for split in info.splits)
    exact = info.text_bytes / total if total and info.text_bytes else None
    per_token = f"{exact or counts.bytes_per_token:.2f} bytes of text a token"
    if info.row_tokens is not None:
        rows = sum(info.tokens(split) for split in info.splits) // info.row_tokens
        per_token = f"{rows:,} rows of {info.row_tokens:,} tokens for {info.task}"
    yield style.title(printable(files.location, WIDTH))
    yield f"{info.vocab_size:,} entries in the vocabulary, {per_token}"
    yield f"fingerprint of the tokens {info.content_fingerprint[:12]}"
    yield ""
    yield from _splits(files, lengths)
    yield ""
    if len({shard.source for shards in info.splits.values() for shard in shards}) > 1:
        yield from _sources(files)
        yield ""
    if not_taken := list(_not_taken(info)):
        yield style.title("not taken from the sources")
        yield from not_taken
        yield ""
    yield from _histogram(lengths["train"], style)
    yield ""
    yield from _common(counts, tokenizer, style)


def _splits(files: DatasetFiles, lengths: dict[str, Lengths]) -> list[str]:
    info = files.info
    rows = [("", "documents", "tokens", "learned", "shards", "median", "mean", "longest")]
    for split, shards in info.splits.items():
        tokens, found = info.tokens(split), lengths[split]
        learned = sum(shard.trained for shard in shards)
        rows.append(
            (
                split,
                f"{found.documents:,}",
                f"{tokens:,}",
                share(learned, tokens),
                f"{len(shards):,}",
                f"{found.quantile(0.5):,}",
                f"{found.mean:,.0f}",
                f"{found.longest:,}",
            )
        )
    return table(rows)


def _sources(files: DatasetFiles) -> Iterator[str]:
    documents: Counter[str] = Counter()
    tokens: Counter[str] = Counter()
    for shard in (shard for shards in files.info.splits.values() for shard in shards):
        documents[shard.source] += shard.documents
        tokens[shard.source] += shard.tokens
    whole = sum(tokens.values())
    rows = [("source", "documents", "tokens", "share", "")]
    for name, count in tokens.most_common():
        name_shown, part = printable(name, 30), share(count, whole)
        rows.append((name_shown, f"{documents[name]:,}", f"{count:,}", part, bar(count / whole, 16)))
    yield from table(rows)


def _not_taken(info: DatasetInfo) -> Iterator[str]:
    """Yield what of the sources did not become documents, the most frequent reasons first."""
    found = [
        (counted.count, what, source.name, reason)
        for source in info.sources
        for what, reasons in (
            ("left out", source.left_out),
            ("bad", source.bad_records),
            ("dropped", source.dropped),
        )
        for reason, counted in reasons.items()
    ]
    for count, what, name, reason in sorted(found, key=lambda each: (-each[0], each))[:_MOST_REASONS]:
        yield f"{count:>12,}  {what:<8}  {printable(f'{name}: {reason}', WIDTH - 24)}"
    if len(found) > _MOST_REASONS:
        yield f"              and {len(found) - _MOST_REASONS} other reasons"


def _histogram(lengths: Lengths, style: Style) -> Iterator[str]:
    yield style.title("documents by their length in tokens (train)")
    bins = lengths.by_power()
    most = max((count for _, _, count in bins), default=1)
    ranges = [f"{low:,}-{high:,}" if high > low else f"{low:,}" for low, high, _ in bins]
    counts = [f"{count:,}" for _, _, count in bins]
    left, right = max(map(len, ranges), default=0), max(map(len, counts), default=0)
    width = WIDTH - left - right - 4
    for name, (_, _, count), number in zip(ranges, bins, counts, strict=True):
        yield f"{name:>{left}}  {bar(count / most, width)}  {number:>{right}}"
    if lengths.documents:
        quantiles = ", ".join(f"{100 * q:.0f} % up to {lengths.quantile(q):,}" for q in (0.1, 0.5, 0.9, 0.99))
        yield f"documents: {quantiles} tokens"


def _common(counts: TokenCounts, tokenizer: Tokenizer, style: Style) -> Iterator[str]:
    total = int(counts.counts.sum())
    used = int(np.count_nonzero(counts.counts))
    yield style.title(f"most common tokens of {total:,} (train)")
    ids = np.argsort(-counts.counts, kind="stable")[: min(_MOST_COMMON, used)]
    cells = [
        (
            share(int(counts.counts[id]), total),
            _quoted(tokenizer.decode([int(id)], skip_special=False)),
        )
        for id in ids
    ]
    yield from _in_columns(cells, 3)
    yield f"{used:,} of {len(counts.counts):,} entries of the vocabulary occur in them"


def _quoted(text: str) -> str:
    quoted = repr(shown(text))
    return quoted if len(quoted) <= 18 else f"{quoted[:17]}…"


def _in_columns(cells: Sequence[tuple[str, str]], columns: int) -> Iterator[str]:
    rows = -(-len(cells) // columns)
    for row in range(rows):
        line = [f"{share:>6}  {text:<18}" for share, text in cells[row::rows]]
        yield "".join(line).rstrip()
