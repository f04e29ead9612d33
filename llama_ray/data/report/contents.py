"""The sections of the report about what a dataset holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from llama_ray.data.dataset.info import SPLITS, DatasetInfo, TokenizerInfo
from llama_ray.data.report.charts import bars, grid, histogram, legend, share_bars
from llama_ray.data.report.html import Html, definitions, element, join, table
from llama_ray.data.report.numbers import share, short, size
from llama_ray.data.report.statistics import SourceStatistics

_MOST_LANGUAGES = 12
Sources = Mapping[str, SourceStatistics]
"""The statistics of each source, in the order of `dataset.json`."""
BORDERS = 2
"""Tokens of a document that are not of its text: bos and eos."""


def summary(title: str, info: DatasetInfo, found: Sources) -> Html:
    """Return the heading and the numbers that people ask for first."""
    kind = _of_texts(info, found) if info.row_tokens is None else _of_rows(info, info.row_tokens, found)
    tiles = [
        (short(info.tokens("train")), "training tokens"),
        (short(info.tokens("validation")), "validation tokens"),
        *kind,
        (short(info.vocab_size), "entries of the vocabulary"),
    ]
    boxes = [element("div", element("b", number), name, class_="tile") for number, name in tiles]
    fingerprint = element("p", "Fingerprint ", element("code", info.fingerprint), class_="soft")
    return join([element("h1", title), fingerprint, element("div", *boxes, class_="tiles")])


def sources(info: DatasetInfo, found: Sources) -> Html:
    """Return what each source gave."""
    whole = sum(each.tokens for each in found.values())
    rows = [
        (
            source.name,
            source.location,
            f"{source.files:,}",
            f"{source.texts:,}",
            f"{found[source.name].documents:,}",
            size(found[source.name].bytes),
            short(found[source.name].tokens),
            share(found[source.name].tokens, whole),
        )
        for source in info.sources
    ]
    numbers = ("files", "texts read", "documents", "text", "tokens", "share")
    parts = [
        element("h2", "Sources"),
        table(("source", "found at", *numbers), rows, numbers),
    ]
    if len(rows) > 1:
        shares = [
            (name, each.tokens, f"{share(each.tokens, whole)} of tokens") for name, each in found.items()
        ]
        parts.append(bars(shares, whole))
    splits = ", ".join(
        f"{short(info.tokens(split))} tokens of {info.documents(split):,} documents for {split}"
        for split in SPLITS
        if split in info.splits
    )
    return join([*parts, element("p", splits, class_="soft")])


def lengths(found: Sources) -> Html:
    """Return a histogram of the lengths of documents for each source."""
    pictures = []
    for name, source in found.items():
        if source.documents:
            mean = short(source.tokens / source.documents)
            caption = f"{name}: {source.documents:,} documents, {mean} tokens in the mean one"
            pictures.append((caption, histogram(source.lengths, source.length_tokens)))
    if not pictures:
        return Html()
    return join([element("h2", "Lengths of documents"), legend(), grid(pictures)])


def languages(found: Sources) -> Html:
    """Return how many documents are in which language, as far as that was asked for."""
    counts = sum((source.languages for source in found.values()), Counter[str]())
    documents = sum(source.documents for source in found.values())
    if not counts:
        return Html()
    told = sum(counts.values())
    of = "all" if told == documents else f"a sample of {told:,} of the {documents:,}"
    return join(
        [
            element("h2", "Languages"),
            element(
                "p",
                f"As py3langid recognises them, in {of} documents; zxx is text without language.",
                class_="soft",
            ),
            share_bars(counts, _MOST_LANGUAGES),
        ]
    )


def tokenizer(info: DatasetInfo, found: Sources) -> Html:
    """Return what the tokenizer is and how much text its tokens hold."""
    known = info.tokenizer
    facts = [
        ("origin", known.origin),
        ("vocabulary", f"{known.vocab_size:,} entries"),
        ("bos, eos", f"{known.bos_id}, {known.eos_id}"),
        ("encoded by", known.encoder),
        ("compared", _compared(known)),
        ("fingerprint", known.fingerprint),
    ]
    measured = [
        (name, _ratio([source]), f"{_bytes_a_token([source])} bytes a token")
        for name, source in found.items()
    ]
    if info.row_tokens is not None:
        # Not all tokens are those of a text.
        facts.append(("ends an answer", ", ".join(map(str, info.end_of_turn_ids))))
        measured = []
    return join([element("h2", "Tokenizer"), definitions(facts), bars(measured)])


def samples(found: Sources) -> Html:
    """Return the beginnings of some documents of each source."""
    parts = [element("h2", "Samples")]
    for name, source in found.items():
        parts.append(element("h3", name))
        for sample in source.samples:
            parts.append(
                element("div", element("code", sample.id), element("pre", sample.text), class_="example")
            )
    return join(parts)


def _of_texts(info: DatasetInfo, found: Sources) -> list[tuple[str, str]]:
    documents = sum(info.documents(split) for split in info.splits)
    return [
        (short(documents), "documents"),
        (size(info.text_bytes), "of text"),
        (_bytes_a_token(list(found.values())), "bytes a token"),
    ]


def _of_rows(info: DatasetInfo, row_tokens: int, found: Sources) -> list[tuple[str, str]]:
    tokens = sum(each.tokens for each in found.values())
    room = sum(info.tokens(split) for split in info.splits)
    return [
        (short(sum(each.documents for each in found.values())), "conversations"),
        (share(sum(info.trained(split) for split in info.splits), tokens), "of their tokens are learned"),
        (short(room // row_tokens), f"rows of {row_tokens:,} tokens"),
        (share(tokens, room), "of the rows are filled"),
    ]


def _compared(known: TokenizerInfo) -> str:
    """Return the bytes a token on the validation split, beside those of a second tokenizer."""
    if known.bytes_per_token is None or known.compared_bytes_per_token is None:
        return ""
    mine, other = known.bytes_per_token, known.compared_bytes_per_token
    return f"{mine:.2f} bytes a token in the validation split, {other:.2f} with {known.compared}"


def _ratio(sources: list[SourceStatistics]) -> float:
    tokens = sum(source.tokens - BORDERS * source.documents for source in sources)
    return sum(source.bytes for source in sources) / tokens if tokens > 0 else 0.0


def _bytes_a_token(sources: list[SourceStatistics]) -> str:
    return f"{_ratio(sources):.2f}"
