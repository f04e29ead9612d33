from __future__ import annotations

import math
from pathlib import Path

import pytest

from llama_ray.data.preparing.config import PrepareConfig, named_source
from llama_ray.data.preparing.prepare import prepare


@pytest.mark.parametrize(
    ("given", "name", "where"),
    [
        ("builtin", "builtin", "builtin"),
        ("web=data/web.jsonl.gz", "web", "data/web.jsonl.gz"),
        ("data/web.jsonl.gz", "web", "data/web.jsonl.gz"),
        ("/texts/books/", "books", "/texts/books/"),
        ("/texts/books/**/*.txt", "books", "/texts/books/**/*.txt"),
        ("s3://bucket/folder?region=eu", "folder", "s3://bucket/folder?region=eu"),
        ("a=s3://bucket/folder?region=eu", "a", "s3://bucket/folder?region=eu"),
        ("hf://owner/fine web", "fine-web", "hf://owner/fine web"),
        ("*.txt", "text", "*.txt"),
        ("./a=b", "a-b", "./a=b"),
    ],
)
def test_a_source_has_the_name_that_is_given_or_that_of_its_last_part(
    given: str, name: str, where: str
) -> None:
    assert named_source(given) == (name, where)


def test_shares_of_the_tokenizers_text_sum_to_one() -> None:
    config = PrepareConfig(["a=x", "b=y"], "data", tokenizer_weights=["a=3", "b=1"])
    assert config.weights() == {"a": 0.75, "b": 0.25}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": []}, "source is empty; give"),
        ({"source": ["{tmp}/nowhere"]}, "no text found in"),
        (
            {"source": ["a/x", "b/x"]},
            "2 sources are named x; each must have a name of its own; write --source NAME=",
        ),
        ({"output": "{tmp}/corpus"}, r"holds other files \(.*.txt\)"),
        ({"output": "{tmp}/corpus/1.txt"}, "is a file; give a directory"),
        ({"output": "{tmp}/corpus/1.txt/data"}, "cannot write to .*; choose another output"),
        ({"output": "{tmp}/caf\udce9"}, r"output is '.*/caf\\xe9'; it must be text in UTF-8"),
        ({"output": "s3://bucket/data"}, "give a directory on storage that all nodes share"),
        ({"tokenizer": "{tmp}/corpus"}, "no tokenizer at"),
        ({"compare_tokenizer": "{tmp}/corpus"}, "no tokenizer at"),
        (
            {"tokenizer_weights": ["corpus"]},
            "tokenizer_weights is 'corpus'; it must be NAME=SHARE with a positive",
        ),
        ({"tokenizer_weights": ["corpus=0"]}, "tokenizer_weights is 'corpus=0'; it must be NAME=SHARE"),
        ({"tokenizer_weights": ["web=1"]}, "tokenizer_weights is 'web=1'; .* once for each of corpus"),
        ({"vocab_size": 257}, "vocab_size is 257; it must be at least 258"),
        ({"vocab_size": 10**12}, "vocab_size is 1000000000000; it must be at most 16777216"),
        *(
            (
                {"validation_fraction": fraction},
                f"validation_fraction is {fraction}; it must be above 0 and below 1",
            )
            for fraction in (1.0, 0.0, 2.0, -1.0, math.nan, math.inf)
        ),
        ({"max_bytes": 0}, "max_bytes is 0; it must be at least 1"),
        ({"seed": -1}, "seed is -1; it must be at least 0"),
        ({"seed": 2**64}, "seed is 18446744073709551616; it must be at most"),
    ],
)
def test_invalid_settings_are_refused_in_one_line(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    (tmp_path / "corpus").mkdir()
    for name in "12":
        (tmp_path / "corpus" / f"{name}.txt").write_text("text")
    given: dict[str, object] = {
        "source": ["{tmp}/corpus"],
        "output": "{tmp}/data",
        "vocab_size": 300,
        **changes,
    }
    with pytest.raises(ValueError, match=message) as raised:
        prepare(
            PrepareConfig(**{key: _filled(value, tmp_path) for key, value in given.items()}),
            lambda line: None,
        )  # type: ignore[arg-type]
    assert "\n" not in str(raised.value)


def _filled(value: object, tmp_path: Path) -> object:
    if isinstance(value, list):
        return [_filled(each, tmp_path) for each in value]
    return value.format(tmp=tmp_path) if isinstance(value, str) else value
