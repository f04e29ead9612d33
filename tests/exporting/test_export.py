"""Models for other programs: what transformers and peft load gives the same logits, from any reference."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from llama_ray.data.tokenizing.tokenizer import Tokenizer
from llama_ray.data.tokenizing.training import BOS, EOS
from llama_ray.exporting.averages import AverageConfig, write_average
from llama_ray.exporting.export import ExportConfig, export
from llama_ray.model.adapter_files import ADAPTER_WEIGHTS
from llama_ray.model.checkpoint import load_model
from llama_ray.model.config import LlamaConfig
from llama_ray.model.config_files import config_files
from llama_ray.model.llama import Llama
from llama_ray.model.parameter_names import hf_name
from llama_ray.model.saving import save_model
from llama_ray.model.weight_files import CheckpointError
from llama_ray.pretrained import load_pretrained, save_pretrained
from tests.data.chat_templates import tokenizer_with
from tests.generation.adapters.helpers import save_random_adapter
from tests.small_models import random_model, small_config, small_tokenizer

TOKENS = torch.arange(60).view(2, 30)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    tokenizer = small_tokenizer()
    directory = tmp_path / "model"
    save_pretrained(random_model(small_config(tokenizer.vocab_size)), tokenizer, directory)
    file = directory / "generation_config.json"
    file.write_text(
        json.dumps({"bos_token_id": 0, "eos_token_id": [1, 7], "temperature": 0.6, "do_sample": True})
    )
    return directory


def write(ref: Path, to: Path, **options: object) -> Path:
    export(ExportConfig(ref=str(ref), to=str(to), **options))  # type: ignore[arg-type]
    return to


def assert_same_logits(directory: Path, reference: Path) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        expected = load_model(reference).float()(TOKENS)
        torch.testing.assert_close(theirs(TOKENS).logits, expected, atol=1e-4, rtol=1e-4)


def test_transformers_loads_shards_with_tokenizer_and_ends_of_answers(tmp_path: Path, model: Path) -> None:
    new = write(model, tmp_path / "new", max_shard_bytes=20_000)
    assert_same_logits(new, model)
    assert len(list(new.glob("model-*.safetensors"))) > 2
    text = "a brown 漢字 fox"
    assert AutoTokenizer.from_pretrained(new).encode(text) == Tokenizer.load(model).encode_prompt(text)
    settings = GenerationConfig.from_pretrained(new)
    assert (settings.eos_token_id, settings.temperature) == ([1, 7], 0.6)
    assert json.loads((new / "config.json").read_text())["eos_token_id"] == [1, 7]


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_a_directory_comes_back_from_gguf(tmp_path: Path, model: Path, dtype: str) -> None:
    file = write(model, tmp_path / "model.gguf", dtype=dtype)
    new = write(file, tmp_path / "new")
    assert_same_logits(new, file)
    kind = {"f16": torch.float16, "bf16": torch.bfloat16}[dtype]
    for ours, old in zip(load_model(new).parameters(), load_model(model).parameters(), strict=True):
        assert torch.equal(ours, old.to(kind))
    assert GenerationConfig.from_pretrained(new).eos_token_id == [1, 7]
    assert Tokenizer.load(new).fingerprint == Tokenizer.load(model).fingerprint


def test_weights_are_rounded_as_ggufs_own_writer_rounds_them(tmp_path: Path) -> None:
    import gguf

    size = {"hidden_size": 64, "intermediate_size": 96}
    save_model(random_model(small_config(300, **size)), tmp_path / "model")
    weight = load_model(tmp_path / "model").layers[1].mlp.up_proj.weight.detach().numpy()
    for dtype in ("q8_0", "f16", "bf16"):
        reader = gguf.GGUFReader(write(tmp_path / "model", tmp_path / f"{dtype}.gguf", dtype=dtype))
        [stored] = (tensor for tensor in reader.tensors if tensor.name == "blk.1.ffn_up.weight")
        expected = gguf.quantize(weight, stored.tensor_type)
        assert stored.data.tobytes() == expected.tobytes()


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    config = small_config(131)
    save_model(random_model(config), tmp_path / "base")
    return save_random_adapter(tmp_path / "adapter", config, 1, base=str(tmp_path / "base"))


def test_an_adapter_is_merged_or_written_as_it_is(tmp_path: Path, adapter: Path) -> None:
    expected, _ = load_pretrained(adapter)
    merged = write(adapter, tmp_path / "merged", merge=True)
    for ours, weight in zip(load_model(merged).parameters(), expected.parameters(), strict=True):
        assert torch.equal(ours, weight)
    copy, _ = load_pretrained(write(adapter, tmp_path / "copy"))
    for ours, weight in zip(copy.parameters(), expected.parameters(), strict=True):
        assert torch.equal(ours, weight)
    with pytest.raises(CheckpointError, match="copy holds an adapter; give another directory"):
        write(adapter, tmp_path / "copy", merge=True)
    with pytest.raises(CheckpointError, match="merged, which holds a whole model; give another place"):
        write(adapter, tmp_path / "merged")
    with pytest.raises(CheckpointError, match="is an adapter; add --merge, or give --to DIR"):
        write(adapter, tmp_path / "adapter.gguf")


def test_no_model_takes_the_place_of_what_it_is_made_of(tmp_path: Path, adapter: Path) -> None:
    with pytest.raises(CheckpointError, match="base, a model that the new one is made of; give another"):
        write(adapter, tmp_path / "base", merge=True)
    config = AverageConfig(refs=(str(adapter), str(tmp_path / "base")))
    for place in ("base", "adapter"):
        with pytest.raises(CheckpointError, match="a model that the new one is made of; give another"):
            write_average(config, tmp_path / place, print)


def test_a_checkpoint_of_a_run_is_not_written_over_by_an_adapter(tmp_path: Path, adapter: Path) -> None:
    checkpoint = save_random_adapter(tmp_path / "step_00000001", small_config(131), 2)
    (checkpoint / ADAPTER_WEIGHTS).rename(checkpoint / "adapter-rank00000.safetensors")
    before = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    with pytest.raises(CheckpointError, match=r"is a checkpoint of a training run .*; give another"):
        write(adapter, checkpoint)
    assert {path.name: path.read_bytes() for path in checkpoint.iterdir()} == before


def test_several_chat_templates_come_back_from_gguf(tmp_path: Path) -> None:
    templates = {"default": "{{ messages[0].content }}", "tool_use": "{{ tools }}"}
    named = [{"name": name, "template": text} for name, text in templates.items()]
    tokenizer = tokenizer_with(tmp_path / "model", named, bos_token=BOS, eos_token=EOS)
    save_model(random_model(small_config(tokenizer.vocab_size)), tmp_path / "model")
    again = Tokenizer.load(write(tmp_path / "model", tmp_path / "model.gguf"))
    assert again.chat_template is not None
    assert again.chat_template.templates == templates


@pytest.mark.parametrize("name", ["model.gguf", "new"])
def test_a_weight_beyond_float16_is_refused_and_what_was_there_stays(
    tmp_path: Path, model: Path, name: str
) -> None:
    there = write(model, tmp_path / name, dtype="f16")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    large = load_model(model)
    with torch.no_grad():
        large.layers[1].mlp.up_proj.weight[3, 4] = 70_000
    save_model(large, tmp_path / "large")
    with pytest.raises(
        CheckpointError, match=r"layers.1.mlp.up_proj.weight has the weight 7e\+04; float16 ends at"
    ):
        write(tmp_path / "large", there, dtype="f16")
    assert {path: path.read_bytes() for path in before} == before
    assert not list(tmp_path.rglob(".*"))


def test_a_weight_beyond_the_scale_of_its_block_is_refused(tmp_path: Path) -> None:
    large = random_model(small_config(131, hidden_size=64))
    with torch.no_grad():
        large.layers[1].mlp.up_proj.weight[3, 4] = -1e7
    save_model(large, tmp_path / "large")
    with pytest.raises(
        CheckpointError, match=r"layers.1.mlp.up_proj.weight has a weight of the size 1e\+07; q8_0 ends at"
    ):
        write(tmp_path / "large", tmp_path / "large.gguf", dtype="q8_0")
    assert not (tmp_path / "large.gguf").exists()


@contextmanager
def anonymous_memory() -> Iterator[list[int]]:
    """Append to the list that is yielded how many bytes of memory, without pages of files, were used at the most."""

    def used() -> int:
        status = Path("/proc/self/status").read_text()
        return int(status.partition("RssAnon:")[2].split()[0]) * 1024

    peak, done = [used()], threading.Event()
    first = peak[0]

    def watch() -> None:
        while not done.wait(0.002):
            peak.append(used())

    thread = threading.Thread(target=watch)
    thread.start()
    result: list[int] = []
    try:
        yield result
    finally:
        done.set()
        thread.join()
        result.append(max(peak) - first)


def save_zeros(config: LlamaConfig, directory: Path) -> None:
    """Save a model of float32 zeros, which take no space on the disk."""
    directory.mkdir()
    shapes = {hf_name(n): list(p.shape) for n, p in Llama(config, device="meta").named_parameters()}
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * 4
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with (directory / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    (directory / "config.json").write_text(config_files(config, torch.float32)["config.json"])


@pytest.mark.parametrize(("name", "options"), [("model.gguf", {"dtype": "q8_0"}), ("new", {"dtype": "bf16"})])
def test_memory_is_less_than_the_largest_tensor(tmp_path: Path, name: str, options: dict[str, str]) -> None:
    # Two tensors of 64 MiB.
    config = small_config(2**17, hidden_size=128, num_layers=1)
    size = config.vocab_size * config.hidden_size * 4
    save_zeros(config, tmp_path / "model")
    with anonymous_memory() as used:
        write(tmp_path / "model", tmp_path / name, **options)
    assert used[0] < size / 4
