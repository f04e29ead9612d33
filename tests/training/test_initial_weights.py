"""Runs that begin with the weights of another model, however these and the workers are divided."""

from __future__ import annotations

import re
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from llama_ray.data.dataset.batch import Batch
from llama_ray.data.mixtures.sources import parse_sources
from llama_ray.data.tokenizing.tokenizer import Tokenizer
from llama_ray.model.config import LlamaConfig
from llama_ray.model.grown_vocabulary import with_vocabulary
from llama_ray.model.llama import Llama
from llama_ray.model.parameter_names import hf_name
from llama_ray.model.stored_model import StoredModel, UnreadTensor, open_model
from llama_ray.pretrained import load_pretrained, load_shape, save_pretrained
from llama_ray.training.checkpointing.state import plain_parameters
from llama_ray.training.config import TrainConfig
from llama_ray.training.initial_weights import fill, position_changes, starting_shape
from llama_ray.training.loop import train
from llama_ray.training.parallel.layout import choose_layout
from llama_ray.training.parallel.parallelize import gather_model, parallelize
from llama_ray.training.parallel.process_group import rank, world_size
from llama_ray.training.preflight import check_run
from tests.small_models import random_model, small_config
from tests.token_data import TEXTS, write_dataset
from tests.training.helpers import CPU, DDP, FSDP, HSDP, Recorder, Settings, in_processes

ONE_STEP = TrainConfig(
    max_steps=1, batch_size=2, seq_len=32, precision="fp32", document_mask=False, learning_rate=1e-9
)
LAYOUTS: dict[str, Settings] = {
    "ddp": DDP,
    "fsdp": FSDP,
    "hsdp": HSDP,
    "tp": {"tensor_parallel": 4},
    "tp x fsdp": {**FSDP, "tensor_parallel": 2},
}
GROWN = 8
"""Rows that are added to a vocabulary, for all layouts a multiple of the number of workers."""


@dataclass
class Counted:
    """A tensor that counts the elements that are read of it."""

    stored: UnreadTensor
    counts: list[int]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.stored.dtype

    def read(self, region: tuple[slice, ...] | None = None) -> Tensor:
        part = self.stored.read(region)
        self.counts.append(part.numel())
        return part


@dataclass(frozen=True)
class Filled:
    """What a worker had read, and the gathered weights; these are empty on a worker that gets none."""

    reads: list[int]
    weights: dict[str, np.ndarray]


def fill_in_layouts(directory: str) -> dict[tuple[str, int], Filled]:
    """Fill a model in each layout from the same files, by the name of the layout and the rows that are added."""
    return {(name, grown): fill_in(name, directory, grown) for name in LAYOUTS for grown in (0, GROWN)}


def fill_in(name: str, directory: str, grown: int) -> Filled:
    with ExitStack() as stack:
        stored = open_model(directory, stack)
        reads: list[int] = []
        counted = {key: Counted(tensor, reads) for key, tensor in stored.tensors.items()}
        stored = with_vocabulary(StoredModel(stored.config, counted), stored.config.vocab_size + grown)
        config = TrainConfig(precision="fp32", **LAYOUTS[name])
        layout = choose_layout(stored.config, config, world_size()).with_mesh(CPU)
        llama = Llama(stored.config, device="meta")
        model = parallelize(llama, config, layout, CPU, compile_blocks=False, init_weights=False)
        fill(((hf_name(key), weight) for key, weight in plain_parameters(llama)), stored)
    gathered = gather_model(model)
    weights = {} if gathered is None or rank() else gathered.state_dict()
    return Filled(reads, {key: weight.numpy() for key, weight in weights.items()})


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that the tokenizer of `data` fits, with weights that are not initial ones, in bf16 and two files."""
    directory = tmp_path_factory.mktemp("source")
    tokenizer = Tokenizer.train(iter(TEXTS), 400)
    model = random_model(small_config(388, num_kv_heads=4))
    save_pretrained(model.to(torch.bfloat16), tokenizer, directory)
    return directory


@pytest.fixture(scope="module")
def filled(source: Path) -> list[dict[tuple[str, int], Filled]]:
    return in_processes(4, fill_in_layouts, str(source))


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_begins_with_the_stored_weights(
    name: str, source: Path, filled: list[dict[tuple[str, int], Filled]]
) -> None:
    expected = load_pretrained(source, torch.float32)[0].state_dict()
    weights = filled[0][name, 0].weights
    assert weights.keys() == expected.keys()
    for key, weight in expected.items():
        assert np.array_equal(weights[key], weight.numpy()), key


@pytest.mark.parametrize("name", LAYOUTS)
def test_new_tokens_begin_as_the_mean_of_the_others(
    name: str, source: Path, filled: list[dict[tuple[str, int], Filled]]
) -> None:
    expected = load_pretrained(source, torch.float32)[0].state_dict()
    weights = filled[0][name, GROWN].weights
    for key in ("embed_tokens.weight", "lm_head.weight"):
        old, new = weights[key][:-GROWN], weights[key][-GROWN:]
        assert np.array_equal(old, expected[key].numpy())
        mean = expected[key].double().mean(0).bfloat16().float().numpy()
        assert np.array_equal(new, np.broadcast_to(mean, new.shape))


@pytest.mark.parametrize(("name", "parts"), [("fsdp", 4), ("hsdp", 2), ("tp", 4), ("tp x fsdp", 4)])
def test_a_worker_reads_its_share_only(
    name: str, parts: int, source: Path, filled: list[dict[tuple[str, int], Filled]]
) -> None:
    whole = load_pretrained(source)[0].config.num_parameters()
    for found in filled:
        # Norms are replicated under tensor parallelism.
        assert sum(found[name, 0].reads) < 1.1 * whole / parts


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "small")


def shape_of(source: Path, **given: object) -> LlamaConfig:
    return starting_shape(load_shape(source), given, str(source))


def first_loss(source: str | Path, data: Path, shape: LlamaConfig, **settings: object) -> float:
    recorder = Recorder()
    config = replace(ONE_STEP, init_from=str(source), **settings)  # type: ignore[arg-type]
    train(shape, config, data, device=CPU, observer=recorder)
    return float(recorder.points[1]["loss/train"])


def first_batch(data: Path, shape: LlamaConfig) -> Batch:
    [batch] = check_run(shape, ONE_STEP, parse_sources(str(data)), 1).next_global_batch()
    return batch


def test_the_first_loss_is_that_of_the_model_itself(source: Path, data: Path) -> None:
    shape = shape_of(source)
    batch = first_batch(data, shape)
    peer = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    with torch.no_grad():
        logits = peer(batch.inputs).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten())
    assert first_loss(source, data, shape) == pytest.approx(expected.item(), abs=1e-5)


def test_a_run_may_begin_with_a_checkpoint_of_another_run(source: Path, data: Path, tmp_path: Path) -> None:
    """Its weights are taken, and neither its optimizer nor its steps."""
    shape = shape_of(source)
    config = replace(ONE_STEP, init_from=str(source), max_steps=3, learning_rate=1e-2)
    progress = train(shape, config, data, device=CPU, observer=Recorder(), output_dir=str(tmp_path))
    assert progress.parent == str(source)
    checkpoint = tmp_path / "step_00000003"
    expected = load_pretrained(checkpoint)[0]
    batch = first_batch(data, shape)
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(
            expected(batch.inputs).flatten(0, 1), batch.targets.flatten()
        )
    assert first_loss(checkpoint, data, shape) == pytest.approx(loss.item(), abs=1e-5)


def test_a_run_that_resumes_does_not_read_its_first_weights_again(
    source: Path, data: Path, tmp_path: Path
) -> None:
    shape = shape_of(source)
    config = replace(ONE_STEP, init_from=str(source), max_steps=2, checkpoint_every=1)
    train(shape, config, data, device=CPU, observer=Recorder(), output_dir=str(tmp_path))
    gone = replace(config, init_from=str(tmp_path / "gone"))
    again = train(shape, gone, data, device=CPU, observer=Recorder(), resume_from=tmp_path / "step_00000001")
    assert (again.step, again.parent) == (2, str(source))


@pytest.mark.parametrize(
    ("changes", "settings", "message"),
    [
        ({"hidden_size": 64}, {}, "hidden_size is 64; it must be 32 as in .*; leave it out"),
        ({"vocab_size": 512}, {}, "vocab_size is 512; it must be 388 as in .*--resize_vocab"),
        ({"vocab_size": 387}, {"resize_vocab": True}, "vocab_size is 387; it must be 388"),
        ({}, {"init_from": "nowhere"}, "nowhere is not a directory or a .gguf file"),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    source: Path, data: Path, changes: dict[str, int], settings: dict[str, object], message: str
) -> None:
    shape = replace(shape_of(source), **changes)  # type: ignore[arg-type]
    config = replace(ONE_STEP, **{"init_from": str(source), **settings})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        check_run(shape, config, parse_sources(str(data)), 1)


def test_data_of_another_tokenizer_are_refused_with_the_way_out(source: Path, tmp_path: Path) -> None:
    other = write_dataset(tmp_path / "other", vocab_size=300)
    config = replace(ONE_STEP, init_from=str(source))
    message = (
        r"other tokenizer than that of .* \('.*' becomes other tokens\); prepare the data with --tokenizer"
    )
    with pytest.raises(ValueError, match=message):
        check_run(shape_of(source), config, parse_sources(str(other)), 1)


def test_a_vocabulary_grows_to_that_of_the_data(source: Path, tmp_path: Path) -> None:
    """The data's tokenizer is that of the model with three more special tokens."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<|{i}|>" for i in range(3)]})
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    data = write_dataset(tmp_path / "data", tokenizer=Tokenizer.load(tmp_path / "tokenizer"))
    shape = shape_of(source)
    with pytest.raises(
        ValueError, match=r"vocab_size is 388; it must be at least 390 .*; give --resize_vocab"
    ):
        first_loss(source, data, shape)
    larger = replace(shape, vocab_size=390)
    assert first_loss(source, data, larger, resize_vocab=True) == pytest.approx(
        first_loss(source, write_dataset(tmp_path / "small"), shape), abs=0.1
    )


def test_settings_of_positions_may_change_and_are_told(source: Path) -> None:
    shape = shape_of(source, max_seq_len=512, rope_theta=5e5)
    assert (shape.max_seq_len, shape.rope_theta) == (512, 5e5)
    longer, theta = position_changes(load_shape(source), shape, str(source))
    assert re.match(r"max_seq_len is 512, and 256 in .*; positions from 256 on are new to the model", longer)
    assert re.match("rope_theta is 500000.0, and 10000.0 in ", theta)
    shorter = list(position_changes(load_shape(source), shape_of(source, max_seq_len=64), str(source)))
    assert len(shorter) == 1
    assert "new to the model" not in shorter[0]
