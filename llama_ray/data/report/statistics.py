"""What a dataset holds, counted by source while it is written, and merged in any order with the same result."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import NamedTuple

from llama_ray.data.cleaning.excerpts import excerpt, rank

MAX_SAMPLES = 3
_SAMPLE_CHARACTERS = 600


class Document(NamedTuple):
    """A text that a dataset takes: its id, its number of tokens with bos and eos, its language or an empty text."""

    id: str
    text: str
    tokens: int
    language: str = ""


@dataclass(frozen=True)
class Sample:
    """The beginning of a text, in its lines."""

    id: str
    text: str


@dataclass
class SourceStatistics:
    """Sums over the documents of a source.

    `lengths` counts documents by the bit length of their number of tokens: entry 10 is for 512 to 1023 tokens.
    `length_tokens` sums their tokens in the same way.
    """

    documents: int = 0
    characters: int = 0
    bytes: int = 0
    tokens: int = 0
    lengths: Counter[int] = field(default_factory=Counter)
    length_tokens: Counter[int] = field(default_factory=Counter)
    languages: Counter[str] = field(default_factory=Counter)
    samples: tuple[Sample, ...] = ()

    def add(self, documents: Iterable[Document]) -> None:
        """Count documents."""
        for document in documents:
            self.documents += 1
            self.characters += len(document.text)
            self.bytes += _utf8_bytes(document.text)
            self.tokens += document.tokens
            bits = document.tokens.bit_length()
            self.lengths[bits] += 1
            self.length_tokens[bits] += document.tokens
            if document.language:
                self.languages[document.language] += 1
            if len(self.samples) < MAX_SAMPLES or rank(document.id) <= rank(self.samples[-1].id):
                self._sample([Sample(document.id, excerpt(document.text, _SAMPLE_CHARACTERS))])

    def merge(self, other: SourceStatistics) -> None:
        """Count what `other` counted."""
        self.documents += other.documents
        self.characters += other.characters
        self.bytes += other.bytes
        self.tokens += other.tokens
        self.lengths.update(other.lengths)
        self.length_tokens.update(other.length_tokens)
        self.languages.update(other.languages)
        self._sample(other.samples)

    def _sample(self, more: Sequence[Sample]) -> None:
        samples = sorted({*self.samples, *more}, key=lambda sample: (rank(sample.id), sample.id, sample.text))
        self.samples = tuple(samples[:MAX_SAMPLES])


class Statistics:
    """The statistics of each source."""

    def __init__(self) -> None:
        self.sources: dict[str, SourceStatistics] = {}

    def add(self, source: str, documents: Iterable[Document]) -> None:
        """Count documents of a source."""
        self.sources.setdefault(source, SourceStatistics()).add(documents)

    def merge(self, other: Statistics) -> None:
        """Count what `other` counted."""
        for source, statistics in other.sources.items():
            self.sources.setdefault(source, SourceStatistics()).merge(statistics)

    def to_json(self) -> dict[str, dict[str, object]]:
        """Return the content as values of JSON, by source."""
        return {source: _plain(self.sources[source]) for source in sorted(self.sources)}

    @classmethod
    def from_json(cls, sources: Mapping[str, Mapping[str, object]]) -> Statistics:
        """Rebuild what `to_json` returned."""
        statistics = cls()
        for source, values in sources.items():
            statistics.sources[source] = _read(**values)  # type: ignore[arg-type]
        return statistics


def _plain(statistics: SourceStatistics) -> dict[str, object]:
    """Return the content as values of JSON, the counters in order."""
    return {
        key: {str(name): value[name] for name in sorted(value)} if isinstance(value, Counter) else value
        for key, value in vars(statistics).items()
    } | {"samples": [asdict(sample) for sample in statistics.samples]}


def _read(
    lengths: Mapping[str, int],
    length_tokens: Mapping[str, int],
    languages: Mapping[str, int],
    samples: Sequence[Mapping[str, str]],
    **sums: int,
) -> SourceStatistics:
    return SourceStatistics(
        lengths=_by_bits(lengths),
        length_tokens=_by_bits(length_tokens),
        languages=Counter(languages),
        samples=tuple(Sample(**sample) for sample in samples),
        **sums,
    )


def _by_bits(counts: Mapping[str, int]) -> Counter[int]:
    return Counter({int(bits): count for bits, count in counts.items()})


def _utf8_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))
