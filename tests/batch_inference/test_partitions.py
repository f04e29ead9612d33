from __future__ import annotations

import json
from pathlib import Path

import pytest

from llama_ray.batch_inference.output import JobRecord, Output
from llama_ray.batch_inference.partitions import (
    Line,
    Partition,
    PartitionedInput,
    partition_input,
    read_lines,
)
from llama_ray.data.sources.files import SourceError
from tests.batch_inference.helpers import write_rows


def is_not_output(path: str) -> bool:
    return False


def lines(found: PartitionedInput) -> list[Line]:
    """All rows, read as a replica reads them."""
    return [line for p in found.partitions for line in read_lines(Partition.from_json(p.to_json()))]


def test_rows_of_all_files_are_numbered_through_and_each_is_in_one_partition(tmp_path: Path) -> None:
    for name, count in (("b.jsonl", 700), ("a.jsonl", 50), ("deeper/c.jsonl", 1)):
        write_rows(tmp_path / name, [f'{{"name": "{name}", "i": {i}}}' for i in range(count)])
    (tmp_path / "notes.md").write_text("no rows")
    found = partition_input(str(tmp_path), is_not_output)
    assert found.num_rows == 751
    read = lines(found)
    assert [line.row for line in read] == list(range(751))
    expected = [("a.jsonl", i) for i in range(50)] + [("b.jsonl", i) for i in range(700)]
    expected += [("deeper/c.jsonl", 0)]
    assert [tuple(json.loads(line.content).values()) for line in read] == expected
    assert [line.location for line in read] == [f"{name}:{i + 1}" for name, i in expected]
    assert [partition.first_row for partition in found.partitions[:3]] == [0, 32, 64]
    # Some partitions hold the end of one file and the beginning of the next.
    assert {len(partition.file_ranges) for partition in found.partitions} == {1, 2}


def test_every_line_but_blank_ones_is_a_row(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\n  \r\n[2]\n\xff\xfe\n{"b": 3}')
    assert lines(partition_input(str(file), is_not_output)) == [
        Line(0, "x.jsonl:1", b'{"a": 1}'),
        Line(1, "x.jsonl:4", b"[2]"),
        Line(2, "x.jsonl:5", b"\xff\xfe"),
        Line(3, "x.jsonl:6", b'{"b": 3}'),
    ]


def test_the_fingerprint_depends_on_the_rows_and_not_on_their_location(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "here" / "x.jsonl", [{"prompt": str(i)} for i in range(100)])
    copy = write_rows(tmp_path / "there" / "y.jsonl", [{"prompt": str(i)} for i in range(100)])
    same = partition_input(str(file), is_not_output).fingerprint
    assert partition_input(str(copy), is_not_output).fingerprint == same
    assert partition_input(f"file://{copy.parent}", is_not_output).fingerprint == same
    write_rows(copy, [{"prompt": str(i)} for i in reversed(range(100))])
    assert partition_input(str(copy), is_not_output).fingerprint != same


def test_rows_that_change_after_they_were_counted_are_refused(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "x.jsonl", [{"prompt": "one"}, {"prompt": "two"}])
    [partition] = partition_input(str(file), is_not_output).partitions
    write_rows(file, [{"prompt": "one"}, {"prompt": "owt"}])
    with pytest.raises(SourceError, match="changed while it was read"):
        read_lines(partition)
    file.unlink()
    with pytest.raises(SourceError, match="storage that all nodes share"):
        read_lines(partition)


def test_a_compressed_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl.gz").write_bytes(b"{}\n")
    with pytest.raises(SourceError, match=r"x\.jsonl\.gz is compressed; decompress it first"):
        partition_input(str(tmp_path / "*"), is_not_output)


def test_rows_of_a_folder_are_never_left_out_in_silence(tmp_path: Path) -> None:
    write_rows(tmp_path / "A.JSONL", [{"prompt": "a"}])
    write_rows(tmp_path / "b.ndjson", [{"prompt": "b"}])
    (tmp_path / "notes.gz").write_bytes(b"{}\n")
    assert partition_input(str(tmp_path), is_not_output).num_rows == 2
    for name, message in (
        ("c.jsonl.GZ", "is compressed"),
        ("c.jsonl", "cannot take rows from c.jsonl: links"),
    ):
        (tmp_path / name).symlink_to("nowhere") if name == "c.jsonl" else (tmp_path / name).write_bytes(b"{}")
        with pytest.raises(SourceError, match=message):
            partition_input(str(tmp_path), is_not_output)
        (tmp_path / name).unlink()


def test_a_folder_that_contains_the_output_is_read_without_it(tmp_path: Path) -> None:
    write_rows(tmp_path / "out.jsonl2.jsonl", [{"prompt": "a"}])
    before = partition_input(str(tmp_path), is_not_output).fingerprint
    for name in ("out.jsonl", "out.jsonl.parts/abc/part-000000.jsonl"):
        write_rows(tmp_path / name, [{"prompt": "b"}])
    output = Output(f"{tmp_path}/out.jsonl")
    assert partition_input(str(tmp_path), is_not_output).fingerprint != before
    assert partition_input(str(tmp_path), output.owns).fingerprint == before
    with pytest.raises(SourceError, match="file other than the output"):
        partition_input(output.location, output.owns)


@pytest.mark.parametrize("name", ["what?.jsonl", "run#3.jsonl", "a%20b c.jsonl"])
@pytest.mark.parametrize("as_uri", [False, True])
def test_an_output_of_any_name_is_known_as_its_own(tmp_path: Path, name: str, as_uri: bool) -> None:
    file = tmp_path / name
    output = Output(file.as_uri() if as_uri else str(file))
    output.start(JobRecord({}))
    assert [path.name for path in tmp_path.iterdir()] == [f"{name}.job.json"]
    write_rows(file, [{"prompt": "b"}])
    with pytest.raises(SourceError, match="file other than the output"):
        partition_input(output.location, output.owns)
