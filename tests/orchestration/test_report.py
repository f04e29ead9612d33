from __future__ import annotations

from dataclasses import replace

import pytest

from llama_ray.data.dataset.info import DatasetInfo, SourceInfo, Task, TokenizerInfo
from llama_ray.data.dataset.shards import Shard
from llama_ray.data.mixtures.sources import DataSource
from llama_ray.data.mixtures.stages import Segment
from llama_ray.data.mixtures.weights import WHOLE
from llama_ray.model.config import LlamaConfig
from llama_ray.orchestration.report import describe_run, describe_version, short_count
from llama_ray.orchestration.run_data import RunData
from llama_ray.training.checkpointing.progress import Progress
from llama_ray.training.config import TrainConfig

MODEL = LlamaConfig.preset("llama-tiny")
SHARD = Shard("train-00000.bin", "books", 9000, 3, 9000, False, 18100, "0" * 64)
INFO = DatasetInfo(
    fingerprint="f",
    seed=0,
    token_bytes=2,
    tokenizer=TokenizerInfo("t", 512),
    sources=(SourceInfo("books", "books/**/*.txt"),),
    splits={"train": (SHARD,), "validation": (replace(SHARD, tokens=1000, documents=1),)},
)


DATA = RunData((DataSource("data", "data/books"),), {"data": INFO}, (Segment(1, 16, 512, {"data": WHOLE}),))
MIXTURE = RunData(
    (DataSource("books", "data/books", 0.75), DataSource("code", "data/code", 0.25)),
    {"books": INFO, "code": INFO},
    (
        Segment(1, 16, 512, {"books": WHOLE * 3 // 4, "code": WHOLE // 4}),
        Segment(900, 32, 256, {"code": WHOLE}),
    ),
)


def test_a_version_is_described_by_a_sentence_before_the_details() -> None:
    text = describe_version(MODEL, DATA, Progress(step=10, tokens=2560, validation_loss=2.0))
    first, empty, *details = text.splitlines()
    assert first == "Loss 2.0000 on held-out text (perplexity 7.39) after 2,560 tokens of `books/**/*.txt`."
    assert empty == ""
    assert all(line.startswith("- **") for line in details)


@pytest.mark.parametrize(
    ("task", "first", "mean"),
    [
        ("sft", "Loss 0.5000 on held-out conversations (perplexity 1.65) after", "nats per learned token"),
        ("dpo", "Loss 0.5000 on held-out pairs of answers after", "DPO loss in nats per pair"),
    ],
)
def test_a_tuned_version_says_what_its_loss_is_of(task: Task, first: str, mean: str) -> None:
    text = describe_version(MODEL, DATA, Progress(step=10, tokens=2560, validation_loss=0.5), task)
    assert text.startswith(first)
    assert mean in text


def test_a_run_is_described_by_a_sentence_before_the_details() -> None:
    first, empty, *details = describe_run(MODEL, TrainConfig(), DATA, world_size=2).splitlines()
    assert first == f"Pre-training of a LLaMA with {MODEL.num_parameters():,} parameters on `books/**/*.txt`."
    assert empty == ""
    assert "- **Data**: 9,000 training and 1,000 validation tokens, vocabulary of 512" in details


def test_the_sources_and_stages_of_a_mixture_have_a_line_each() -> None:
    config = TrainConfig(seq_len=512, batch_size=8)
    first, _, *details = describe_run(MODEL, config, MIXTURE, world_size=2).splitlines()
    assert first.endswith("parameters on `books, code`.")
    assert "- **Data**: 18,000 training and 2,000 validation tokens, vocabulary of 512" in details
    assert (
        "- **Source code**: 0.25 of the samples at first, 9,000 training tokens of `books/**/*.txt`"
        in details
    )
    assert (
        "- **From step 900**: samples of code 1, sequences of 256 tokens, global batch of 16,384 tokens"
        in details
    )
    assert not any("From step 1" in line for line in details)
    version = describe_version(MODEL, MIXTURE, Progress(step=10, tokens=2560, validation_loss=2.0))
    assert "on the validation split of all sources" in version


def test_a_mixture_is_known_by_its_sources_whatever_their_weights() -> None:
    assert DATA.fingerprint == "f"
    reweighted = replace(MIXTURE, segments=MIXTURE.segments[1:])
    assert reweighted.fingerprint == MIXTURE.fingerprint != DATA.fingerprint
    params = MIXTURE.params()
    assert params["source"] == "books, code"
    assert params["sources"]["code"] == {"location": "data/code", "share": 0.25}


@pytest.mark.parametrize(("tensor_parallel", "tokens"), [(1, 24576), (2, 12288)])
def test_workers_that_share_layers_do_not_add_to_the_global_batch(tensor_parallel: int, tokens: int) -> None:
    config = TrainConfig(batch_size=8, gradient_accumulation_steps=3, tensor_parallel=tensor_parallel)
    text = describe_run(MODEL, config, DATA, world_size=4)
    assert 8 * 3 * 4 // tensor_parallel * MODEL.max_seq_len == tokens
    assert f"- **Global batch**: {tokens:,} tokens" in text


def test_counts_are_short() -> None:
    assert [short_count(n) for n in (158_000, 34_000_000, 6_738_415_616)] == ["158k", "34m", "6.7b"]
