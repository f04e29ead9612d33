"""What a preparation found, summed over its parts: for `dataset.json`, the report and the last lines of the log."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata

from llama_ray.data.cleaning.drops import Drops
from llama_ray.data.dataset.info import SPLITS, Counted, DatasetInfo, Setting, SourceInfo, TokenizerInfo
from llama_ray.data.dataset.shards import Shard
from llama_ray.data.preparing.bad_records import is_bad
from llama_ray.data.preparing.config import CLEANS_TEXT, FOR_TEXT, PrepareConfig
from llama_ray.data.preparing.corpus import Corpus, SourcePieces
from llama_ray.data.preparing.part_record import PartRecord
from llama_ray.data.preparing.parts import Part
from llama_ray.data.preparing.split_writer import BORDERS
from llama_ray.data.preparing.splits import Range
from llama_ray.data.report.statistics import SourceStatistics, Statistics
from llama_ray.data.sources.left_out import LeftOut, Tally
from llama_ray.data.tokenizing.encoder import EncoderChoice
from llama_ray.data.tokenizing.tokenizer import Tokenizer
from llama_ray.utils.errors import printable


@dataclass
class SourceSummary:
    """Sums over the parts of one source."""

    texts: int = 0
    left_out: Tally = field(default_factory=Tally)


class Summary:
    """Sums over the parts of a corpus, added in the order of their numbers."""

    def __init__(self, corpus: Corpus) -> None:
        self.numbers = Range()
        self.bad_records = self.compared_tokens = 0
        self.drops = Drops()
        self.shards: dict[str, list[Shard]] = {split: [] for split in SPLITS}
        self.by_split = {split: Statistics() for split in SPLITS}
        self._corpus = corpus
        self._sources = {source.source.name: SourceSummary() for source in corpus.sources}
        for source in corpus.sources:
            self._sources[source.source.name].left_out.merge(source.left_out)

    def add(self, part: Part, record: PartRecord) -> None:
        """Count a part."""
        self.numbers |= record.numbers or Range()
        self.bad_records += record.bad_records
        self.compared_tokens += record.compared_tokens
        self.drops.merge(record.drops)
        source = self._sources[part.source]
        source.texts += record.texts
        source.left_out.merge(record.left_out)
        for split in SPLITS:
            self.by_split[split].merge(record.statistics[split])
            if split in record.shards:
                self.shards[split].append(record.shards[split])

    @property
    def statistics(self) -> Statistics:
        """Those of all documents."""
        both = Statistics()
        for split in SPLITS:
            both.merge(self.by_split[split])
        return both

    @property
    def left_out(self) -> Tally:
        """What was left out of all sources."""
        whole = Tally()
        for source in self._sources.values():
            whole.merge(source.left_out)
        return whole

    def documents(self, split: str) -> int:
        """Return the number of documents of a split."""
        return self._sums(split).documents

    def tokenizer(self, config: PrepareConfig, tokenizer: Tokenizer, encoder: EncoderChoice) -> TokenizerInfo:
        """Return what `dataset.json` tells of the tokenizer."""
        validation = self._sums("validation")
        # Those of conversations are not only text.
        tokens = validation.tokens - BORDERS * validation.documents if config.row_tokens is None else 0
        return TokenizerInfo(
            fingerprint=tokenizer.fingerprint,
            vocab_size=tokenizer.vocab_size,
            bos_id=tokenizer.bos_id,
            eos_id=tokenizer.eos_id,
            origin=printable(config.tokenizer) if config.tokenizer else "trained on this text",
            encoder=encoder.name,
            bytes_per_token=validation.bytes / tokens if tokens else None,
            compared=printable(config.compare_tokenizer or ""),
            compared_bytes_per_token=(
                validation.bytes / self.compared_tokens if self.compared_tokens else None
            ),
        )

    def lines(self, info: DatasetInfo) -> Iterator[str]:
        """Yield what a user wants to read at the end."""
        unit = "texts" if info.row_tokens is None else "conversations"
        yield (
            f"took {self.documents('train'):,} {unit} for training and {self.documents('validation'):,} for validation"
        )
        if info.row_tokens is not None:
            trained, tokens = info.trained("train"), self._sums("train").tokens
            yield (
                f"{trained:,} of {tokens:,} training tokens are learned ({trained / tokens:.1%}); they fill "
                f"{tokens / info.tokens('train'):.1%} of {info.tokens('train') // info.row_tokens:,} rows of "
                f"{info.row_tokens:,}"
            )
        yield from self.left_out.lines()
        for row in self.drops.rows():
            yield f"{row.rule} dropped {row.count:,} {row.unit}{'' if row.count == 1 else 's'} of {row.source}"
        tokenizer = info.tokenizer
        if tokenizer.bytes_per_token:
            line = f"{tokenizer.bytes_per_token:.2f} bytes a token of the validation split"
            if tokenizer.compared_bytes_per_token:
                line += f"; {tokenizer.compared_bytes_per_token:.2f} with {tokenizer.compared}"
            yield line

    def sources(self) -> tuple[SourceInfo, ...]:
        """Return what `dataset.json` tells of each source."""
        statistics = self.statistics
        return tuple(
            self._source(source, statistics.sources.get(source.source.name, SourceStatistics()))
            for source in self._corpus.sources
        )

    def _sums(self, split: str) -> SourceStatistics:
        sums = SourceStatistics()
        for source in self.by_split[split].sources.values():
            sums.merge(source)
        return sums

    def _source(self, source: SourcePieces, statistics: SourceStatistics) -> SourceInfo:
        summary = self._sources[source.source.name]
        counted = summary.left_out.counts()
        return SourceInfo(
            name=source.source.name,
            location=printable(source.source.where, limit=4096),
            files=source.files,
            texts=summary.texts,
            text_bytes=statistics.bytes,
            left_out=_by_reason(row for row in counted if not is_bad(row[2][0])),
            bad_records=_by_reason(row for row in counted if is_bad(row[2][0])),
            dropped={
                f"{row.rule} ({row.unit}s)": Counted(
                    row.count, tuple(printable(example.id) for example in row.examples)
                )
                for row in self.drops.rows()
                if row.source == source.source.name
            },
            languages=dict(sorted(statistics.languages.items())),
        )


def versions() -> dict[str, str]:
    """Return the versions of the software that decides which tokens a text becomes."""
    names = ("llama-ray", "tokenizers", "numpy", "pyarrow", "ray")
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in names}}


def settings(config: PrepareConfig) -> dict[str, Setting]:
    """Return the flags that decide what a dataset holds, for people."""
    values = {**asdict(config), **asdict(config.cleaning), **asdict(config.training)}
    unused = ["cleaning", "training", "conversations", "source", "output", "overwrite", "workers"]
    if config.row_tokens is not None:
        values |= asdict(config.conversations)
        unused += [*FOR_TEXT, *CLEANS_TEXT, *asdict(config.training)]
    for name in unused:
        del values[name]
    return {
        name: printable(", ".join(value) if isinstance(value, (list, tuple)) else value, limit=4096)
        if isinstance(value, (list, tuple, str))
        else value
        for name, value in values.items()
    }


def _by_reason(rows: Iterable[tuple[str, int, Sequence[LeftOut]]]) -> dict[str, Counted]:
    return {
        reason: Counted(count, tuple(piece.location() for piece in first if piece.name))
        for reason, count, first in rows
    }
