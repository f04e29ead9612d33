"""What became of a part: a small file beside its shards, without which the part is not done."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, get_args

from llama_ray.data.cleaning.drops import Drops
from llama_ray.data.dataset.info import SPLITS
from llama_ray.data.dataset.shards import DatasetError, Shard
from llama_ray.data.preparing.output_directory import WORK
from llama_ray.data.preparing.splits import Range
from llama_ray.data.report.statistics import Statistics
from llama_ray.data.sources.left_out import Tally
from llama_ray.storage.atomic import write_text
from llama_ray.utils.typed_json import from_json

Stage = Literal["cleaned", "tokenised"]
"""What was done to a part: it is cleaned first only where duplicates are looked for."""
STAGES: tuple[Stage, ...] = get_args(Stage)


@dataclass
class PartRecord:
    """What a task found in its part and wrote.

    `limit` is that of `split_of`, `numbers` spans those of the documents. `texts` counts what was read, `bad_records`
    what could not be; `statistics` are of the documents of each split. `compared_tokens` counts the tokens, but for bos
    and eos, that a second tokenizer makes of the validation split.
    """

    limit: float
    texts: int = 0
    bad_records: int = 0
    numbers: Range | None = None
    compared_tokens: int = 0
    shards: dict[str, Shard] = field(default_factory=dict)
    statistics: dict[str, Statistics] = field(
        default_factory=lambda: {split: Statistics() for split in SPLITS}
    )
    left_out: Tally = field(default_factory=Tally)
    drops: Drops = field(default_factory=Drops)

    def write(self, staging: Path, stage: Stage, part: int) -> None:
        """Write the record of a part whose shards are in `staging`."""
        content = {
            "limit": self.limit,
            "texts": self.texts,
            "bad_records": self.bad_records,
            "numbers": self.numbers and asdict(self.numbers),
            "compared_tokens": self.compared_tokens,
            "shards": {split: asdict(shard) for split, shard in self.shards.items()},
            "statistics": {split: found.to_json() for split, found in self.statistics.items()},
            "left_out": self.left_out.to_json(),
            "drops": self.drops.to_json(),
        }
        write_text(_file(staging, stage, part), json.dumps(content) + "\n")


def read_record(staging: Path, stage: Stage, part: int) -> PartRecord:
    """Return the record of a part. Raises DatasetError if it, or a shard, cannot be read here."""
    try:
        content = json.loads(_file(staging, stage, part).read_bytes())
        record = PartRecord(
            limit=content["limit"],
            texts=content["texts"],
            bad_records=content["bad_records"],
            numbers=from_json(Range, content["numbers"]) if content["numbers"] else None,
            compared_tokens=content["compared_tokens"],
            shards={split: from_json(Shard, shard) for split, shard in content["shards"].items()},
            statistics={split: Statistics.from_json(found) for split, found in content["statistics"].items()},
            left_out=Tally.from_json(content["left_out"]),
            drops=Drops.from_json(content["drops"]),
        )
        for shard in record.shards.values():
            size = (staging / shard.file).stat().st_size
            if size != shard.bytes:
                raise ValueError(f"{shard.file} has {size} bytes; it must have {shard.bytes}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DatasetError(
            f"a part that a worker wrote cannot be read here ({error}); give an --output on storage that all nodes "
            "share"
        ) from error
    return record


def done_before(staging: Path, stage: Stage, part: int, limit: float) -> bool:
    """Whether this stage of the part was finished, with this `limit`, before the preparation was killed."""
    if not _file(staging, stage, part).exists():
        return False
    try:
        return read_record(staging, stage, part).limit == limit
    except DatasetError:
        return False


def any_done(staging: Path) -> bool:
    """Whether a part was finished."""
    return any(any((staging / WORK).glob(f"{stage}-*.json")) for stage in STAGES)


def _file(staging: Path, stage: Stage, part: int) -> Path:
    return staging / WORK / f"{stage}-{part:05d}.json"
