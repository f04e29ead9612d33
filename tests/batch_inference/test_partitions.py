from __future__ import annotations

import json
from pathlib import Path

import pytest

from llama_ray.batch_inference.output import Output
from llama_ray.batch_inference.rows import (
    Line,
    Part,
    RowError,
    Rows,
    find_rows,
    params_of,
    parse,
    prompt_of,
    read_lines,
)
from llama_ray.data.sources import SourceError
from llama_ray.generation.sampling.params import SamplingParams
from tests.batch_inference.conftest import write_rows


def none(path: str) -> bool:
    return False


def lines(rows: Rows) -> list[Line]:
    return [line for part in rows.parts for line in read_lines(Part.from_json(part.to_json()))]


def test_every_line_is_one_row_of_one_part_and_rows_are_numbered_over_all_files(tmp_path: Path) -> None:
    for name, count in (("b.jsonl", 700), ("a.jsonl", 50), ("deeper/c.jsonl", 1)):
        write_rows(tmp_path / name, [f'{{"name": "{name}", "i": {i}}}' for i in range(count)])
    (tmp_path / "notes.md").write_text("no rows")
    found = find_rows(str(tmp_path), none)
    assert found.count == 751
    read = lines(found)
    assert [line.row for line in read] == list(range(751))
    expected = [("a.jsonl", i) for i in range(50)] + [("b.jsonl", i) for i in range(700)]
    expected += [("deeper/c.jsonl", 0)]
    assert [tuple(json.loads(line.content).values()) for line in read] == expected
    assert [line.place for line in read] == [f"{name}:{i + 1}" for name, i in expected]
    assert [part.first_row for part in found.parts[:3]] == [0, 32, 64]
    assert {len(part.pieces) for part in found.parts} == {1, 2}  # some hold the end of one file and the next


def test_white_space_is_no_row_and_every_other_line_is(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\n  \r\n[2]\n\xff\xfe\n{"b": 3}')
    found = lines(find_rows(str(file), none))
    assert [(line.row, line.place, line.content) for line in found] == [
        (0, "x.jsonl:1", b'{"a": 1}'),
        (1, "x.jsonl:4", b"[2]"),
        (2, "x.jsonl:5", b"\xff\xfe"),
        (3, "x.jsonl:6", b'{"b": 3}'),
    ]


def test_the_fingerprint_is_that_of_the_rows(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "here" / "x.jsonl", [{"prompt": str(i)} for i in range(100)])
    copy = write_rows(tmp_path / "there" / "y.jsonl", [{"prompt": str(i)} for i in range(100)])
    same = find_rows(str(file), none).fingerprint
    assert find_rows(str(copy), none).fingerprint == same
    assert find_rows(f"file://{copy.parent}", none).fingerprint == same
    write_rows(copy, [{"prompt": str(i)} for i in reversed(range(100))])
    assert find_rows(str(copy), none).fingerprint != same


def test_rows_that_change_after_they_were_counted_are_refused(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "x.jsonl", [{"prompt": "one"}, {"prompt": "two"}])
    part = find_rows(str(file), none).parts[0]
    write_rows(file, [{"prompt": "one"}, {"prompt": "owt"}])
    with pytest.raises(SourceError, match="changed while it was read"):
        read_lines(part)
    file.unlink()
    with pytest.raises(SourceError, match="storage that all nodes share"):
        read_lines(part)


def test_a_folder_that_the_output_lies_in_is_read_without_it(tmp_path: Path) -> None:
    write_rows(tmp_path / "out.jsonl2.jsonl", [{"prompt": "a"}])
    before = find_rows(str(tmp_path), none).fingerprint
    for name in ("out.jsonl", "out.jsonl.parts/abc/part-000000.jsonl"):
        write_rows(tmp_path / name, [{"prompt": "b"}])
    assert find_rows(str(tmp_path), none).fingerprint != before
    assert find_rows(str(tmp_path), Output(f"{tmp_path}/out.jsonl").owns).fingerprint == before
    with pytest.raises(SourceError, match="file other than the output"):
        find_rows(f"{tmp_path}/out.jsonl", Output(f"{tmp_path}/out.jsonl").owns)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"prompt": "x"', "f:7 is not JSON"),
        (b"[1]", "no JSON object but list"),
        (b"\xff", "f:7 is not JSON"),
        (b'{"a": NaN}', "NaN is no number"),
        (b'{"a": 1e999}', "1e999 is no number"),
        (b'{"a": ' + b"[" * 100_000, "f:7 is not JSON"),
    ],
)
def test_a_line_that_is_no_row(content: bytes, message: str) -> None:
    with pytest.raises(RowError, match=message):
        parse(Line(3, "f:7", content))


def test_prompts() -> None:
    assert prompt_of({"prompt": "x", "other": 1}, "prompt") == "x"
    assert prompt_of({"question": "x"}, "question") == "x"
    assert prompt_of({"token_ids": [1, 2]}, "prompt") == [1, 2]
    for fields in (
        {}, {"prompt": None}, {"prompt": "x", "token_ids": [1]}, {"prompt": [1]}, {"token_ids": "1"},
        {"token_ids": [1.5]}, {"token_ids": [True]},
    ):  # fmt: skip
        with pytest.raises(RowError):
            prompt_of(fields, "prompt")


def test_sampling_parameters_of_a_row() -> None:
    base = SamplingParams(max_tokens=7, top_k=3, stop=("x",))
    plain = params_of({}, base, 1, 5)
    assert plain.seed is not None
    assert plain == SamplingParams(max_tokens=7, top_k=3, stop=("x",), seed=plain.seed)
    assert params_of({}, base, 1, 5) == plain
    assert len({params_of({}, base, seed, row).seed for seed in (1, 2) for row in range(50)}) == 100
    own = {"temperature": 0, "stop": ["y", "z"], "logit_bias": {"5": 2}, "seed": 9, "top_k": None}
    assert params_of({"sampling_params": own}, base, 1, 5) == SamplingParams(
        max_tokens=7, top_k=3, temperature=0.0, stop=("y", "z"), logit_bias={5: 2.0}, seed=9
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"temprature": 1}, "'temprature' is not known; known are max_tokens, min_tokens, temperature"),
        ({"temperature": "hot"}, "sampling_params: temperature: Input should be a valid number"),
        ({"max_tokens": 1.5}, "max_tokens: Input should be a valid integer"),
        ({"top_p": 7}, "sampling_params: top_p is 7.0; it must be above 0"),
        ([1], "'sampling_params' is list"),
    ],
)
def test_sampling_parameters_that_do_not_fit(given: object, message: str) -> None:
    with pytest.raises(RowError, match=message):
        params_of({"sampling_params": given}, SamplingParams(), 0, 0)
