"""Tuning on rows of conversations: what is checked, and what a run of it learns and saves."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llama_ray.data.conversations.conversation import Conversation
from llama_ray.data.conversations.examples import ExampleEncoder, Refusal
from llama_ray.data.conversations.formats import read_conversation
from llama_ray.data.dataset.info import TokenizerInfo, write_info
from llama_ray.data.dataset.shards import Shard, ShardWriter, shard_name
from llama_ray.data.mixtures.sources import parse_sources
from llama_ray.data.mixtures.stages import Stage
from llama_ray.data.preparing.row_writer import Encoded, RowWriter
from llama_ray.pretrained import load_pretrained, save_pretrained
from llama_ray.training.config import TrainConfig
from llama_ray.training.loop import train
from llama_ray.training.task import for_data
from tests.data.chat_templates import LLAMA_3_1, tokenizer_with
from tests.small_models import random_model, small_config
from tests.token_data import INFO
from tests.training.helpers import Recorder, losses

ROW = 128
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THINGS = ["rope", "saw", "kite", "boat", "sled", "tent", "bell", "rake", "hose", "vase", "mask", "coin"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with random weights and a chat template."""
    directory = tmp_path_factory.mktemp("model")
    tokenizer = tokenizer_with(directory / "tokenizer", TEMPLATE)
    config = small_config(tokenizer.vocab_size, max_seq_len=ROW)
    save_pretrained(random_model(config), tokenizer, directory / "model")
    return directory / "model"


def rows(directory: Path, model: Path, row_tokens: int = ROW, template: str | None = None) -> Path:
    """Write conversations as a preparation does, with several in a row."""
    directory.mkdir(exist_ok=True)
    _, tokenizer = load_pretrained(model)
    assert tokenizer is not None
    if template is not None:
        tokenizer = tokenizer.with_chat_template(template)
    tokenizer.save(directory)
    found = ExampleEncoder(tokenizer, "2024-07-26").encode([conversation(thing) for thing in THINGS])
    splits: dict[str, tuple[Shard, ...]] = {}
    for split, chosen in (("train", found[2:]), ("validation", found[:2])):
        with ShardWriter(
            directory / shard_name(split, 0), INFO.token_bytes, source="chat", masks=True
        ) as shard:
            writer = RowWriter(shard, "chat", row_tokens, tokenizer.eos_id or 0)
            for examples in chosen:
                assert not isinstance(examples, Refusal)
                writer.add(Encoded("chat/a:0", "text", [examples]))
            writer.flush()
        assert shard.shard is not None
        splits[split] = (shard.shard,)
    known = TokenizerInfo(tokenizer.fingerprint, tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id)
    write_info(directory, replace(INFO, tokenizer=known, splits=splits, task="sft", row_tokens=row_tokens))
    return directory


def conversation(thing: str) -> Conversation:
    return read_conversation({"prompt": f"The {thing}?", "completion": f"{thing}!"})


@pytest.fixture(scope="module")
def data(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rows(tmp_path_factory.mktemp("rows"), model)


def tuning(model: Path, **values: Any) -> TrainConfig:
    given = {"max_steps": 8, "batch_size": 2, "learning_rate": 3e-3, "precision": "fp32", "log_every": 1}
    return TrainConfig(**{"task": "sft", "init_from": str(model), **given, **values})


@pytest.mark.parametrize("lora_rank", [0, 8])
def test_answers_are_learned_and_the_checkpoint_ends_them(
    tmp_path: Path, model: Path, data: Path, lora_rank: int
) -> None:
    recorder = Recorder()
    shape = load_pretrained(model)[0].config
    config = tuning(model, lora_rank=lora_rank, learning_rate=3e-2 if lora_rank else 3e-3)
    train(shape, config, data, device=torch.device("cpu"), observer=recorder, output_dir=str(tmp_path))
    curve = losses(recorder)
    assert curve[8] < curve[1] - 1
    checkpoint = tmp_path / "step_00000008"
    _, tokenizer = load_pretrained(checkpoint)
    assert tokenizer is not None
    assert tokenizer.chat_template is not None
    if not lora_rank:
        generation = json.loads((checkpoint / "generation_config.json").read_text())
        assert generation["eos_token_id"] == tokenizer.all_eos_ids(shape.vocab_size)
        assert {tokenizer.eos_id} | tokenizer.end_of_turn_ids() == set(generation["eos_token_id"])


def test_the_loss_is_the_mean_over_the_learned_tokens(model: Path, data: Path) -> None:
    """Held against the logits of the conversations one by one, without rows, padding and neighbours."""
    recorder = Recorder()
    loaded, tokenizer = load_pretrained(model)
    assert tokenizer is not None
    train(
        loaded.config,
        tuning(model, max_steps=1, batch_size=4),
        data,
        device=torch.device("cpu"),
        observer=recorder,
    )
    total, count = 0.0, 0
    for thing in THINGS[2:]:
        [[example]] = ExampleEncoder(tokenizer, "2024-07-26").encode([conversation(thing)])
        ids = torch.from_numpy(example.ids.astype(np.int64))
        with torch.no_grad():
            logprobs = loaded(ids[None, :-1])[0].log_softmax(-1)
        learned = torch.from_numpy(example.learned[1:])
        total -= float(logprobs.gather(1, ids[1:, None])[learned].sum())
        count += int(learned.sum())
    assert losses(recorder)[1] == pytest.approx(total / count, rel=1e-4)


def test_the_rows_decide_the_length_of_sequences(model: Path, data: Path) -> None:
    assert for_data(tuning(model), parse_sources(data)).seq_len == ROW
    assert for_data(tuning(model, seq_len=ROW), parse_sources(data)).seq_len == ROW


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "pretrain", "init_from": None}, "task is pretrain; .* was prepared for task sft; give --task sft"),
        ({"task": "dpo"}, "task is dpo; .* was prepared for task sft; give --task sft"),
        ({"seq_len": 64}, "seq_len is 64; it must be 128, the length of the rows of .*; leave it out"),
        ({"document_mask": False}, "document_mask is false; with task sft it must be true"),
        ({"stages": (Stage(from_step=2, seq_len=64),)}, "stages.seq_len is 64; with task sft it must be left out"),
    ],
)  # fmt: skip
def test_what_does_not_fit_to_rows_is_refused(
    model: Path, data: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        for_data(replace(tuning(model), **changes), parse_sources(data))


def test_texts_are_no_data_for_tuning(model: Path, dataset: Path) -> None:
    with pytest.raises(
        ValueError, match=r"task is sft; .* was prepared for task pretrain; give --task pretrain"
    ):
        for_data(tuning(model), parse_sources(dataset))


def test_sources_of_a_mixture_have_rows_of_one_length_and_one_template(
    tmp_path: Path, model: Path, data: Path
) -> None:
    for other, message in (
        (rows(tmp_path / "long", model, 256), r"source b .* has rows of 256 tokens, source a .* of 128"),
        (
            rows(tmp_path / "llama", model, template=LLAMA_3_1),
            "source b .* has another chat template than source a",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            for_data(tuning(model), parse_sources([f"a={data}", f"b={other}"]))


def test_tuning_needs_a_model() -> None:
    with pytest.raises(
        ValueError, match="task is sft; it needs a model to tune; give it with --init_from REF"
    ):
        TrainConfig(task="sft")


def test_a_run_of_adapters_may_be_branched_off_and_goes_on_learning(
    tmp_path: Path, model: Path, data: Path
) -> None:
    shape, device = load_pretrained(model)[0].config, torch.device("cpu")
    # As people name them, in any order.
    adapters = {"lora_rank": 4, "lora_targets": ("v_proj", "q_proj"), "learning_rate": 3e-2}
    first, branch = Recorder(), Recorder()
    train(
        shape,
        tuning(model, max_steps=2, **adapters),
        data,
        device=device,
        observer=first,
        output_dir=str(tmp_path),
    )
    start = str(tmp_path / "step_00000002")
    config = tuning(model, init_from=None, branch_from=start, max_steps=3, **adapters)
    assert train(shape, config, data, device=device, observer=branch).step == 5
    assert losses(branch)[5] < losses(first)[1]


@pytest.mark.parametrize("setting", [{"dpo_beta": 0.5}, {"dpo_length_normalize": True}])
def test_settings_of_preferences_are_refused_without_them(setting: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(setting))} is .*; it has an effect on task dpo only"):
        TrainConfig(task="sft", init_from="x", **setting)


@pytest.mark.parametrize(
    ("values", "rate"),
    [
        ({}, 3e-4),
        ({"task": "sft", "init_from": "x"}, 2e-5),
        ({"task": "sft", "init_from": "x", "lora_rank": 8}, 2e-4),
        ({"task": "sft", "init_from": "x", "learning_rate": 1e-3}, 1e-3),
    ],
)
def test_the_learning_rate_depends_on_the_task(values: dict[str, Any], rate: float) -> None:
    config = TrainConfig(**values)
    assert config.peak_learning_rate == pytest.approx(rate)
    assert config.to_dict()["learning_rate"] == config.peak_learning_rate
