"""Checkpoints as other libraries write them: read as transformers reads them, or refused with the reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from llama_ray.model.checkpoint import load_model
from llama_ray.model.config import LlamaConfig, RopeScaling
from llama_ray.model.llama import Llama
from llama_ray.model.saving import save_model
from llama_ray.model.stored_config import load_config
from llama_ray.model.weight_files import CheckpointError
from tests.small_models import random_model, small_config

HEAD, EMBEDDING, NORM = "lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"
QUERY = "model.layers.0.self_attn.q_proj.weight"
Spoil = Callable[[Path], object]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_model(random_model(small_config(60, tie_embeddings=True)), tmp_path)
    return tmp_path


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    save_model(random_model(small_config(60)), tmp_path, max_shard_bytes=20_000)
    return tmp_path


def edit_config(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(
    directory: Path, edit: Callable[[dict[str, torch.Tensor]], object], file: str = "model.safetensors"
) -> None:
    tensors = load_file(directory / file)
    edit(tensors)
    save_file(tensors, directory / file, metadata={"format": "pt"})


def edit_index(directory: Path, edit: Callable[[dict[str, str]], object]) -> None:
    path = directory / "model.safetensors.index.json"
    content = json.loads(path.read_text())
    edit(content["weight_map"])
    path.write_text(json.dumps(content))


def assert_read_as_transformers_does(directory: Path) -> Llama:
    ours = load_model(directory)
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    tokens = torch.arange(60).view(2, 30)
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, atol=1e-4, rtol=1e-4)
    return ours


def only_head(directory: Path) -> None:
    edit_tensors(directory, lambda t: t.update({HEAD: t.pop(EMBEDDING)}))


def equal_head(directory: Path) -> None:
    edit_tensors(directory, lambda t: t.update({HEAD: t[EMBEDDING].clone()}))


def other_head(directory: Path) -> None:
    edit_tensors(directory, lambda t: t.update({HEAD: t[EMBEDDING].flip(0).contiguous()}))


@pytest.mark.parametrize(("change", "tied"), [(only_head, True), (equal_head, True), (other_head, False)])
def test_a_tied_weight_has_the_name_of_the_head_or_of_the_embedding(
    saved: Path, change: Spoil, tied: bool
) -> None:
    change(saved)
    assert assert_read_as_transformers_does(saved).config.tie_embeddings == tied


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


@pytest.mark.parametrize(
    "fields",
    [
        {"architectures": ["LLaMAForCausalLM"]},
        {"architectures": None},
        {
            "rope_scaling": None,
            "rope_theta": None,
            "rope_parameters": {"rope_type": "default", "rope_theta": 77.0},
        },
        {"rope_scaling": None, "rope_theta": 77.0, "rope_parameters": {"rope_type": "linear", "factor": 4}},
        {"rope_scaling": LLAMA3, "rope_theta": 500},
        {"rope_scaling": None, "rope_parameters": LLAMA3 | {"rope_theta": 500.0}},
        {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "default"}},
        {"num_key_value_heads": 2, "head_dim": None, "pretraining_tp": 2, "quantization_config": None},
    ],
    ids=str,
)
def test_configurations_are_read_as_transformers_reads_them(saved: Path, fields: dict[str, object]) -> None:
    edit_config(saved, **fields)
    config = json.loads((saved / "config.json").read_text())
    if config["rope_theta"] is None:
        del config["rope_theta"]
        (saved / "config.json").write_text(json.dumps(config))
    assert_read_as_transformers_does(saved)


def test_settings_of_no_effect_are_not_needed(saved: Path) -> None:
    edit_config(saved, rope_scaling={"rope_type": None}, tie_word_embeddings=None, rope_theta=None)
    config = load_config(saved)
    assert (config.rope_scaling, config.tie_embeddings, config.rope_theta) == (None, False, 10_000.0)


@pytest.mark.parametrize("missing", [name for name in LLAMA3 if name != "rope_type"])
@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_a_scaling_without_a_field_is_refused_by_name(saved: Path, key: str, missing: str) -> None:
    edit_config(saved, rope_scaling=None)
    edit_config(saved, **{key: {k: v for k, v in LLAMA3.items() if k != missing}})
    with pytest.raises(
        CheckpointError, match=f"config.json: the rope scaling 'llama3' lacks {missing}; complete"
    ):
        load_model(saved)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, r"quantized weights \(gptq\)"),
        ({"quantization_config": {"quant_method": "awq"}}, r"quantized weights \(awq\)"),
        ({"quantization_config": {"load_in_4bit": True}}, r"quantized weights \(bitsandbytes\)"),
        ({"quantization_config": {"quant_algo": "FP8"}}, r"quantized weights \(FP8\)"),
        ({"quantization_config": {"bits": 2}}, r"quantized weights \(a format without a name\)"),
        ({"compression_config": {"format": "pack-quantized"}}, r"quantized weights \(pack-quantized\)"),
        ({"model_type": "mistral"}, "the architecture is mistral; it must be LlamaForCausalLM"),
        ({"architectures": ["LlamaModel"]}, "the architecture is LlamaModel"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false'; it must be true or false"),
        ({"attention_bias": "false"}, "attention_bias is 'false'; it must be true or false"),
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear'; it must be an object or null"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "factor is '2'; it must be a number"),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
            "scaling is 'dynamic'; it must be 'linear' or 'llama3'",
        ),
        ({"rope_scaling": {"type": ["x"]}}, "the rope scaling is"),
        ({"rope_scaling": None, "rope_parameters": {"full_attention": {}}}, "differs between layers"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5; it must be 1"),
        ({"hidden_size": "32"}, "hidden_size is '32'; it must be a whole number"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_configurations_of_other_models_are_refused(
    saved: Path, fields: dict[str, object], message: str
) -> None:
    edit_config(saved, **fields)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_model(saved)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["[]", '"llama"', "{", "\xff", "[" * 100_000])
def test_a_configuration_that_is_no_object_is_refused(saved: Path, content: str) -> None:
    (saved / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_model(saved)


def quantized(*names: str) -> Spoil:
    """Replace a weight as quantization tools do."""

    def spoil(directory: Path) -> None:
        def edit(tensors: dict[str, torch.Tensor]) -> None:
            del tensors[QUERY]
            tensors.update(
                {QUERY.replace("weight", name): torch.zeros(4, dtype=torch.int32) for name in names}
            )

        edit_tensors(directory, edit)

    return spoil


def in_dtype(dtype: torch.dtype, *more: str) -> Spoil:
    def spoil(directory: Path) -> None:
        def edit(tensors: dict[str, torch.Tensor]) -> None:
            tensors[QUERY] = torch.zeros(tensors[QUERY].shape).to(dtype)
            tensors.update({QUERY + name: torch.ones(1) for name in more})

        edit_tensors(directory, edit)

    return spoil


@pytest.mark.parametrize(
    ("spoil", "kind"),
    [
        (quantized("qweight", "qzeros", "scales", "g_idx"), "GPTQ"),
        (quantized("qweight", "qzeros", "scales"), "GPTQ or AWQ"),
        (in_dtype(torch.uint8, ".absmax", ".quant_state.bitsandbytes__nf4"), "bitsandbytes"),
        (in_dtype(torch.int8, ".SCB"), "bitsandbytes"),
        (quantized("weight_packed", "weight_scale"), "compressed-tensors"),
        (in_dtype(torch.float8_e4m3fn, "_scale_inv"), "FP8"),
        (in_dtype(torch.float8_e4m3fn, "_scale"), "FP8 or compressed-tensors"),
        (in_dtype(torch.float8_e4m3fn), "FP8"),
        (in_dtype(torch.float8_e5m2), "FP8"),
        (in_dtype(torch.int8), "I8"),
        (in_dtype(torch.int64), "I64"),
        (in_dtype(torch.bool), "BOOL"),
    ],
)
@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_weights_that_are_no_floats_are_refused(
    saved: Path, spoil: Spoil, kind: str, dtype: torch.dtype | None
) -> None:
    spoil(saved)
    with pytest.raises(CheckpointError, match=rf"holds quantized weights \({kind}\); only float32"):
        load_model(saved, dtype=dtype)


def test_weights_of_several_float_types_load_in_that_of_the_embedding(saved: Path) -> None:
    edit_tensors(saved, lambda t: t.update({NORM: t[NORM].double(), EMBEDDING: t[EMBEDDING].half()}))
    assert {p.dtype for p in load_model(saved).parameters()} == {torch.float16}


def no_index(directory: Path) -> None:
    (directory / "model.safetensors.index.json").unlink()


def lfs_pointer(directory: Path) -> None:
    no_index(directory)
    (directory / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")


def instead(name: str) -> Spoil:
    def spoil(directory: Path) -> None:
        no_index(directory)
        for file in directory.glob("model-*.safetensors"):
            file.unlink()
        (directory / name).write_bytes(b"x")

    return spoil


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (no_index, r"holds model-00001-of-\S+, .* but no model\.safetensors\.index\.json"),
        (lfs_pointer, "is a pointer of Git LFS to the weights; fetch them with: git lfs pull"),
        (instead("pytorch_model-00001-of-00002.bin"), "a pickle, which can run code"),
        (instead("consolidated.00.pth"), "a pickle, which can run code"),
        (instead("adapter_model.safetensors"), "an adapter without adapter_config.json; copy that too"),
        (instead("model.Q4_1.gguf"), "llama.cpp's format"),
        (instead("model.safetensors"), "damaged or cut short"),
        (lambda d: edit_index(d, lambda m: m.update({NORM: "../x.safetensors"})), "is no index of weights"),
        (lambda d: edit_index(d, lambda m: m.update({NORM: 3})), "is no index of weights"),
        (lambda d: edit_index(d, lambda m: m.clear()), "is no index of weights"),
        (
            lambda d: edit_index(d, lambda m: m.update({NORM: "gone.safetensors"})),
            r"lacks gone\.safetensors, named in",
        ),
        (lambda d: (d / "model.safetensors.index.json").write_text("{"), "is no index of weights"),
        (lambda d: (d / "model.safetensors.index.json").write_text("[]"), "is no index of weights"),
    ],
)
def test_files_that_cannot_be_read_are_named(sharded: Path, spoil: Spoil, message: str) -> None:
    spoil(sharded)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_model(sharded)
    assert "\n" not in str(caught.value)


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    model = random_model(small_config(60))
    for rank in range(2):
        save_model(model, tmp_path / str(rank))
    (tmp_path / "both").mkdir()
    (tmp_path / "0" / "config.json").rename(tmp_path / "both" / "config.json")
    for rank in range(2):
        (tmp_path / str(rank) / "model.safetensors").rename(
            tmp_path / "both" / f"model-rank{rank}.safetensors"
        )
    with pytest.raises(
        CheckpointError, match=r"twice, in model-rank0\.safetensors and model-rank1\.safetensors"
    ):
        load_model(tmp_path / "both")


def test_an_index_says_which_of_two_files_counts(sharded: Path) -> None:
    before = load_model(sharded)
    last = sorted(sharded.glob("model-*.safetensors"))[-1].name
    edit_tensors(sharded, lambda t: t.update({EMBEDDING: torch.zeros(60, 32)}), last)
    for (name, weight), loaded in zip(
        before.named_parameters(), load_model(sharded).parameters(), strict=True
    ):
        assert torch.equal(weight, loaded), name


def test_scalings_survive_a_copy(tmp_path: Path) -> None:
    scaling = RopeScaling(rope_type="llama3", factor=8, original_max_seq_len=64)
    config = LlamaConfig.preset("llama-tiny", rope_scaling=scaling)
    save_model(Llama(config), tmp_path)
    assert load_config(tmp_path) == config
