"""Runs on pairs of answers: the workers' layouts, resuming, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llama_ray.data.dataset.files import LocalFiles
from llama_ray.data.dataset.info import TokenizerInfo, read_info, write_info
from llama_ray.data.dataset.references import write_references
from llama_ray.data.dataset.token_dataset import TokenDataset
from llama_ray.model.config import LlamaConfig
from llama_ray.pretrained import save_pretrained
from llama_ray.training.config import TrainConfig
from llama_ray.training.loop import train
from tests.small_models import random_model, small_config, small_tokenizer
from tests.token_data import write_documents
from tests.training.helpers import CPU, FSDP, Recorder, Settings, in_processes, losses, losses_after

ROW_TOKENS = 24
TOKENIZER = small_tokenizer()
PER_ROW = ([5, 7], [4, 8])
"""Lengths of the documents of rows with one pair, and with two, of which padding fills the last one."""


@pytest.fixture(scope="module")
def model() -> LlamaConfig:
    return small_config(TOKENIZER.vocab_size)


@pytest.fixture(scope="module")
def pairs(model: LlamaConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of 24 rows with references, and the model to begin with beside it."""
    directory = tmp_path_factory.mktemp("pairs")
    save_pretrained(random_model(model), None, directory / "model")
    without_references(directory / "data")
    references = {
        split: [[-20.0 - n % 5 for n in range(shards[0].documents)]]
        for split, shards in read_info(directory / "data").splits.items()
    }
    write_references(LocalFiles(directory / "data"), "weights", "the model", references)
    return directory


def without_references(directory: Path, num_rows: int = 24) -> Path:
    random = np.random.default_rng(0)
    documents: list[list[int]] = []
    learned: list[bool] = []
    for row in range(num_rows):
        lengths = PER_ROW[0] if row % 3 else [*PER_ROW[1], *PER_ROW[0]]
        # The last document holds the padding.
        for n, length in enumerate(lengths):
            padding = ROW_TOKENS - sum(lengths) if n == len(lengths) - 1 else 0
            documents.append([*random.integers(10, TOKENIZER.vocab_size, length).tolist(), *[0] * padding])
            learned += [False, False, *[True] * (length - 2), *[False] * padding]
    validation = [documents[:4], learned[: sum(map(len, documents[:4]))]]
    directory.mkdir()
    TOKENIZER.save(directory)
    write_documents(
        directory,
        {"train": [documents], "validation": [validation[0]]},
        TokenizerInfo(TOKENIZER.fingerprint, TOKENIZER.vocab_size),
        learned={"train": [learned], "validation": [validation[1]]},
        row_tokens=ROW_TOKENS,
    )
    write_info(directory, replace(read_info(directory), task="dpo"))
    return directory


def test_a_window_has_the_reference_of_each_document_where_it_begins(pairs: Path) -> None:
    batch = TokenDataset(pairs / "data", "train").windows(np.array([1, 0]), ROW_TOKENS)
    assert batch.reference is not None
    assert batch.reference.nonzero().tolist() == [[0, 0], [0, 5], [1, 0], [1, 4], [1, 12], [1, 17]]
    assert batch.reference[batch.reference != 0].tolist() == [-24, -20, -20, -21, -22, -23]


def settings(pairs: Path, **changes: Any) -> TrainConfig:
    return TrainConfig(
        task="dpo", init_from=str(pairs / "model"), max_steps=6, batch_size=4, learning_rate=1e-2, log_every=1,
        checkpoint_every=3, precision="fp32", **changes,
    )  # fmt: skip


def run(
    model: LlamaConfig, config: TrainConfig, data: Path, output: Path | None, start: Path | None
) -> dict[int, float]:
    recorder = Recorder()
    train(
        model, config, data, device=CPU, observer=recorder, resume_from=start,
        output_dir=None if output is None else str(output),
    )  # fmt: skip
    return losses(recorder)


@pytest.fixture(scope="module")
def alone(
    model: LlamaConfig, pairs: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[int, float]]:
    output = tmp_path_factory.mktemp("alone")
    return output, run(model, settings(pairs), pairs / "data", output, None)


def test_a_resumed_run_is_the_same_to_the_bit(
    model: LlamaConfig, pairs: Path, alone: tuple[Path, dict[int, float]]
) -> None:
    output, expected = alone
    assert expected[6] < expected[1]
    start = output / "step_00000003"
    assert run(model, settings(pairs), pairs / "data", None, start) == losses_after(3, expected)


@pytest.mark.parametrize("layout", [{"parallelism": "ddp"}, FSDP], ids=["ddp", "fsdp"])
def test_two_workers_have_the_losses_of_one(
    model: LlamaConfig, pairs: Path, alone: tuple[Path, dict[int, float]], layout: Settings
) -> None:
    config = replace(settings(pairs, **layout), batch_size=2)
    found = in_processes(2, run, model, config, pairs / "data", None, None)[0]
    assert found == pytest.approx(alone[1], rel=1e-4)


def test_adapters_learn_preferences(model: LlamaConfig, pairs: Path) -> None:
    torch.manual_seed(0)
    found = run(model, settings(pairs, lora_rank=4), pairs / "data", None, None)
    assert found[6] < found[1]


def test_pairs_without_a_reference_are_refused(model: LlamaConfig, pairs: Path, tmp_path: Path) -> None:
    data = without_references(tmp_path / "data")
    with pytest.raises(
        ValueError, match=r"holds no log-probabilities of a reference model; jobs/train.py"
    ) as refused:
        run(model, settings(pairs), data, None, None)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tensor_parallel": 2}, "tensor_parallel is 2; it must be 1 with task dpo"),
        ({"z_loss": 1e-4}, "z_loss is 0.0001; it must be 0 with task dpo"),
        ({"init_from": None}, "needs a model to tune; give it with --init_from"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**{"task": "dpo", "init_from": "x"} | changes)
