from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from llama_ray.model.checkpoint import load_model
from llama_ray.model.config import LlamaConfig, RopeScaling
from llama_ray.model.llama import Llama
from llama_ray.model.stored_config import load_config
from llama_ray.model.stored_model import open_model
from llama_ray.model.weight_files import CheckpointError
from tests.model.gguf.helpers import llama_3_factors, metadata_of, tensors_of, write, write_model
from tests.small_models import random_model, small_config

QUERY = "model.layers.0.self_attn.q_proj.weight"


def shape(**fields: Any) -> LlamaConfig:
    # Rows of whole blocks of 32 weights; 4 heads of the queries, 2 of the keys.
    return small_config(60, hidden_size=64, intermediate_size=96, norm_eps=1e-5, **fields)


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_in_float32_is_read_as_it_was(tmp_path: Path, tied: bool) -> None:
    model = random_model(shape(tie_embeddings=tied, head_dim=32, rope_theta=50_000.0))
    loaded = load_model(write_model(tmp_path / "m.gguf", model, **{"llama.attention.key_length": 32}))
    assert loaded.config == model.config
    for name, weight in model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), weight), name


@pytest.mark.parametrize(("kind", "dtype"), [("F16", torch.float16), ("BF16", torch.bfloat16)])
def test_half_precision_keeps_its_dtype(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    model = random_model(shape())
    loaded = load_model(write_model(tmp_path / "m.gguf", model, kind))
    assert loaded.embed_tokens.weight.dtype == dtype
    assert torch.equal(loaded.layers[1].mlp.up_proj.weight, model.layers[1].mlp.up_proj.weight.to(dtype))


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_quantized_weights_are_those_of_transformers(tmp_path: Path, kind: str) -> None:
    model = random_model(shape())
    file = write_model(tmp_path / "m.gguf", model, kind, **{"llama.vocab_size": 60})
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32)
    with ExitStack() as stack:
        tensors = open_model(file, stack).tensors
        for name, weight in theirs.named_parameters():
            assert torch.equal(tensors[name].read(), weight), name


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_any_region_is_that_of_the_whole_tensor(
    data: st.DataObject, quantized: dict[str, torch.Tensor], quantized_file: Path
) -> None:
    with ExitStack() as stack:
        tensors = open_model(quantized_file, stack).tensors
        name = data.draw(st.sampled_from(sorted(tensors)))
        region = tuple(
            slice(*sorted(data.draw(st.tuples(st.integers(0, size), st.integers(0, size)))))
            for size in tensors[name].shape
        )
        assert torch.equal(tensors[name].read(region), quantized[name][region])


@pytest.fixture(scope="module")
def quantized_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("gguf") / "m.gguf", random_model(shape()), "Q4_1")


@pytest.fixture(scope="module")
def quantized(quantized_file: Path) -> dict[str, torch.Tensor]:
    with ExitStack() as stack:
        return {name: tensor.read() for name, tensor in open_model(quantized_file, stack).tensors.items()}


def test_nothing_is_read_once_the_file_is_closed(quantized_file: Path) -> None:
    with ExitStack() as stack:
        tensor = open_model(quantized_file, stack).tensors[QUERY]
    with pytest.raises(ValueError, match="the file is closed"):
        tensor.read()


LLAMA_3 = RopeScaling(rope_type="llama3", factor=8.0)


@pytest.mark.parametrize(
    "scaling",
    [
        LLAMA_3,
        replace(LLAMA_3, factor=32.0),
        replace(LLAMA_3, factor=2.5, low_freq_factor=1.5, high_freq_factor=5.0),
        replace(LLAMA_3, low_freq_factor=0.3, high_freq_factor=2.7),
    ],
    ids=str,
)
def test_llama_3s_scaling_is_found_in_its_tensor(tmp_path: Path, scaling: RopeScaling) -> None:
    config = shape(head_dim=64, rope_theta=500_000.0, max_seq_len=131_072, rope_scaling=scaling)
    tensors = tensors_of(Llama(config)) | {"rope_freqs.weight": llama_3_factors(config).numpy()}
    metadata = metadata_of(config) | {"llama.attention.key_length": 64}
    assert load_config(write(tmp_path / "m.gguf", metadata, tensors)) == config


def test_a_tensor_that_divides_by_one_is_no_scaling(tmp_path: Path) -> None:
    config = shape()
    tensors = tensors_of(Llama(config)) | {"rope_freqs.weight": np.ones(8, np.float32)}
    assert load_config(write(tmp_path / "m.gguf", metadata_of(config), tensors)) == config


@pytest.mark.parametrize(
    "metadata",
    [
        {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
        {"llama.rope.scale_linear": 4.0},
        # llama.cpp takes it for linear scaling, too.
        {"llama.rope.scaling.factor": 4.0},
    ],
    ids=str,
)
def test_linear_scaling_is_in_the_metadata(tmp_path: Path, metadata: dict[str, Any]) -> None:
    config = load_config(write_model(tmp_path / "m.gguf", Llama(shape()), **metadata))
    assert config.rope_scaling == RopeScaling(rope_type="linear", factor=4.0)


@pytest.mark.parametrize(
    "metadata",
    [
        {"llama.rope.scaling.type": "none", "llama.rope.scale_linear": 4.0},
        {"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0},
        {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 0.0},
    ],
    ids=str,
)
def test_what_llama_cpp_does_not_scale_is_not_scaled(tmp_path: Path, metadata: dict[str, Any]) -> None:
    assert load_config(write_model(tmp_path / "m.gguf", Llama(shape()), **metadata)).rope_scaling is None


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"general.alignment": 0}, "general.alignment is 0; it must be a power of 2; copy it again"),
        ({"general.architecture": "qwen2"}, "the architecture is 'qwen2'; it must be 'llama'; give a LLaMA"),
        ({"llama.expert_count": 8}, "it has 8 experts; it must have none"),
        ({"split.count": 3}, "join them with: llama-gguf-split --merge"),
        ({"llama.rope.scaling.type": "yarn"}, "the rope scaling is 'yarn'; it must be 'none', 'linear'"),
        ({"llama.rope.dimension_count": 8}, "llama.rope.dimension_count is 8; it must be 16"),
        ({"llama.block_count": None}, "has no llama.block_count; convert the model again"),
        ({"llama.block_count": 3}, r"it lacks blk.2.attn_k.weight, .* and 6 more; give the file of a whole"),
        ({"llama.feed_forward_length": 128}, r"blk.0.ffn_gate.weight is \[96, 64\]; its metadata say \[128"),
        ({"llama.block_count": 0}, "num_layers is 0; it must be at least 1"),
    ],
    ids=str,
)
def test_another_model_is_refused(tmp_path: Path, metadata: dict[str, Any], message: str) -> None:
    file = write_model(tmp_path / "m.gguf", Llama(shape()), **metadata)
    with pytest.raises(CheckpointError, match=message) as refused, ExitStack() as stack:
        open_model(file, stack)
    assert str(file) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_scaling_of_another_kind_is_refused(tmp_path: Path) -> None:
    tensors = tensors_of(Llama(shape())) | {"rope_freqs.weight": np.arange(1, 9, dtype=np.float32)}
    file = write(tmp_path / "m.gguf", metadata_of(shape()), tensors)
    with pytest.raises(CheckpointError, match=r"rope_freqs.weight cannot be expressed as a rope_scaling"):
        load_config(file)


def test_a_format_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    file = write_model(tmp_path / "m.gguf", Llama(shape()), "F16")
    content = bytearray(file.read_bytes())
    # Behind the name: two dimensions, 64 by 60, then the format.
    at = content.index(b"token_embd.weight") + len(b"token_embd.weight") + 4 + 16
    assert content[at] == gguf.GGMLQuantizationType.F16
    content[at] = gguf.GGMLQuantizationType.IQ4_XS
    file.write_bytes(content)
    with pytest.raises(
        CheckpointError, match=r"token_embd.weight is in the format IQ4_XS; it must be one of BF16"
    ):
        load_config(file)


def test_a_file_that_is_cut_short_is_refused(tmp_path: Path) -> None:
    file = write_model(tmp_path / "m.gguf", Llama(shape()))
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(CheckpointError, match="it is cut short; copy it again"):
        load_config(file)
