from __future__ import annotations

from pathlib import Path

import pytest

from llama_ray.exporting.averages import AverageConfig, write_average
from llama_ray.pretrained import save_pretrained
from tests.small_models import random_model, small_config, small_tokenizer


def test_models_with_different_tokenizers_are_refused(tmp_path: Path) -> None:
    tokenizer = small_tokenizer()
    other = small_tokenizer(["other words"], tokenizer.vocab_size)
    for name, own in {"a": tokenizer, "b": other}.items():
        save_pretrained(random_model(small_config(tokenizer.vocab_size)), own, tmp_path / name)
    config = AverageConfig(refs=(str(tmp_path / "a"), str(tmp_path / "b")))
    with pytest.raises(ValueError, match=r"/b has another tokenizer than \S+/a, so that their weights"):
        write_average(config, tmp_path / "average", lambda _: None)
    assert not (tmp_path / "average").exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "give either models or --run DIR"),
        ({"refs": ("a", "b"), "run": "d"}, "give either models or --run DIR"),
        ({"refs": ("a",)}, "a is one model; give at least two"),
        ({"run": "a", "last": 1}, "last is 1; it must be at least 2"),
        ({"run": "a", "dtype": "q8_0"}, "dtype is 'q8_0'; choose auto, f32, f16 or bf16"),
    ],
)
def test_what_makes_no_average_is_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AverageConfig(**fields)  # type: ignore[arg-type]
