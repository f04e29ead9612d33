"""What is refused before a run starts."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from llama_ray.model.config import LlamaConfig
from llama_ray.training.config import TrainConfig
from llama_ray.training.loop import train
from llama_ray.training.reporting.observer import Console
from tests.token_data import write_dataset
from tests.training.helpers import CPU, TWELVE_STEPS, FinishedRun


@pytest.mark.parametrize(
    ("model", "config", "message"),
    [
        ({"vocab_size": 300}, {}, r"vocab_size is 300; it must be at least .* --vocab_size"),
        ({}, {"seq_len": 64}, "seq_len is 64; it must be at most the model's max_seq_len 32"),
        ({}, {"batch_size": 4096}, "one step takes 4,096"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(
    tiny: LlamaConfig, dataset: Path, model: dict[str, Any], config: dict[str, Any], message: str
) -> None:
    shape = LlamaConfig.from_dict(tiny.to_dict() | model)
    with pytest.raises(ValueError, match=message):
        train(shape, TrainConfig(**config), dataset, device=CPU, observer=Console())


def test_data_tokenised_with_another_tokenizer_is_refused(tiny: LlamaConfig, tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "a")
    other = write_dataset(tmp_path / "b", vocab_size=300)
    shutil.copy(other / "tokenizer.json", data / "tokenizer.json")
    with pytest.raises(ValueError, match="tokenised with another tokenizer"):
        train(tiny, TWELVE_STEPS, data, device=CPU, observer=Console())


def test_resuming_with_another_shape_is_refused(
    finished: FinishedRun, tiny: LlamaConfig, dataset: Path
) -> None:
    other = LlamaConfig.from_dict(tiny.to_dict() | {"num_layers": 3})
    with pytest.raises(ValueError, match="num_layers 2 there, 3 here"):
        train(
            other, TWELVE_STEPS, dataset, device=CPU, observer=Console(), resume_from=finished.checkpoint(5)
        )


def test_resuming_with_data_of_another_tokenizer_is_refused(
    finished: FinishedRun, tiny: LlamaConfig, tmp_path: Path
) -> None:
    data = write_dataset(tmp_path / "other", vocab_size=300)
    with pytest.raises(ValueError, match="another tokenizer"):
        train(tiny, TWELVE_STEPS, data, device=CPU, observer=Console(), resume_from=finished.checkpoint(5))
