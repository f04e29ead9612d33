"""From pieces to the documents of a dataset: texts are read, cleaned and numbered, and what is not taken is counted."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from llama_ray.data.cleaning.cleaner import Cleaner
from llama_ray.data.cleaning.config import CleanConfig
from llama_ray.data.preparing.bad_records import BadRecords
from llama_ray.data.preparing.part_record import PartRecord
from llama_ray.data.preparing.splits import Range, number_of
from llama_ray.data.records.fields import TextFields
from llama_ray.data.records.pieces import Piece, read
from llama_ray.data.sources.left_out import LeftOut


@dataclass(frozen=True)
class Reading:
    """How texts become documents: the fields of records, what is cleaned, and the seed of the splits."""

    fields: TextFields
    cleaning: CleanConfig
    seed: int


class Taken(NamedTuple):
    """A text that a dataset takes, and the number that decides its split."""

    number: float
    id: str
    text: str
    language: str = ""


def read_documents(
    source: str, pieces: Iterable[Piece], reading: Reading, record: PartRecord, bad: BadRecords
) -> Iterator[Taken]:
    """Yield the documents of some pieces of a source, and count into `record` and `bad` what is not taken.

    Raises TooManyBadRecordsError as `bad` does, and SourceError as `read` does.
    """
    cleaner = _load_cleaner(reading.cleaning)

    def leave_out(piece: LeftOut) -> None:
        record.left_out.add(piece)
        bad.add(source, piece)

    for piece in pieces:
        for text, offset in read(piece, reading.fields, leave_out):
            record.texts += 1
            id = f"{source}/{piece.file.name}:{offset}"
            cleaned = cleaner(text)
            for drop in cleaned.drops:
                record.drops.add(source, id, drop)
            if not cleaned.text:
                continue
            number = number_of(reading.seed, id)
            record.numbers = (record.numbers or Range()) | Range(number, number)
            yield Taken(number, id, cleaned.text, cleaned.language)


# A process works for one preparation after the other, each of which has many parts.
@functools.lru_cache(maxsize=1)
def _load_cleaner(config: CleanConfig) -> Cleaner:
    return Cleaner(config)
