from __future__ import annotations

from pathlib import Path

import pytest

from llama_ray.data.cleaning.config import CleanConfig
from llama_ray.data.preparing.bad_records import BadRecords, bad_file
from llama_ray.data.preparing.config import PrepareConfig
from llama_ray.data.preparing.corpus import find_corpus
from llama_ray.data.preparing.output_directory import WORK
from llama_ray.data.preparing.part_record import PartRecord
from llama_ray.data.preparing.part_task import Job, tokenise_part
from llama_ray.data.preparing.parts import divide
from llama_ray.data.preparing.passes import run_pass
from llama_ray.data.preparing.reading import Reading
from llama_ray.data.sources.files import SourceError
from llama_ray.data.sources.left_out import NOT_JSON, LeftOut
from llama_ray.data.tokenizing.encoder import EncoderChoice


def test_a_smaller_limit_holds_for_bad_records_of_parts_that_were_done_before(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("{")
    (tmp_path / WORK).mkdir()
    config = PrepareConfig([str(tmp_path / "a.jsonl")], str(tmp_path / "out"))
    parts = divide(find_corpus(config.sources(), config.fields()), config.shard_bytes)
    with BadRecords(bad_file(tmp_path / WORK, "tokenised", 0), most=1) as bad:
        bad.add("a", LeftOut("record", NOT_JSON, "a.jsonl", place=":1"))
    PartRecord(0.01, bad_records=1).write(tmp_path, "tokenised", 0)
    job = Job(
        str(tmp_path), Reading(config.fields(), CleanConfig(), 0), 0.01, 0, "", EncoderChoice(False, "", "")
    )
    with pytest.raises(
        SourceError, match=r"1 bad record so far \(a.jsonl:1: not JSON\); max_bad_records is 0"
    ):
        run_pass("tokenised", tokenise_part, config, parts, job, lambda line: None)
