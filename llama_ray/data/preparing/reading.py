"""From pieces to the documents of a dataset: texts are read and cleaned, and what is not taken is counted."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from llama_ray.data.cleaning.cleaner import Cleaner
from llama_ray.data.cleaning.config import CleanConfig
from llama_ray.data.preparing.bad_records import BadRecords
from llama_ray.data.preparing.kept import Taken
from llama_ray.data.preparing.part_record import PartRecord
from llama_ray.data.records.fields import Fields
from llama_ray.data.records.pieces import Piece, read
from llama_ray.data.sources.left_out import LeftOut


@dataclass(frozen=True)
class Reading:
    """How texts become documents: the fields of records, what is cleaned, and the seed of the splits.

    `evaluations` is the file that `write_evaluations` wrote, or empty.
    """

    fields: Fields
    cleaning: CleanConfig
    seed: int
    evaluations: str = ""


def read_documents(
    source: str, pieces: Iterable[Piece], reading: Reading, record: PartRecord, bad: BadRecords
) -> Iterator[Taken]:
    """Yield the documents of some pieces of a source, and count into `record` and `bad` what is not taken.

    Raises TooManyBadRecordsError as `bad` does, and SourceError as `read` does.
    """
    cleaner = _load_cleaner(reading.cleaning, reading.evaluations)

    def leave_out(piece: LeftOut) -> None:
        record.left_out.add(piece)
        bad.add(source, piece)

    for piece in pieces:
        for text, offset, place in read(piece, reading.fields, leave_out):
            record.texts += 1
            id = f"{source}/{piece.file.name}:{offset}"
            cleaned = cleaner(text)
            for drop in cleaned.drops:
                record.drops.add(source, id, drop)
            if cleaned.text:
                yield Taken(id, cleaned.text, cleaned.language, place)


# A process works for one preparation after the other, each of which has many parts.
@functools.lru_cache(maxsize=1)
def _load_cleaner(config: CleanConfig, evaluations: str) -> Cleaner:
    return Cleaner(config, Path(evaluations) if evaluations else None)
