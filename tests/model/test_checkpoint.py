import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from transformers import LlamaConfig as PeerConfig

from llama_ray.model import saving
from llama_ray.model.checkpoint import load_model
from llama_ray.model.config import LlamaConfig
from llama_ray.model.llama import Llama
from llama_ray.model.parameter_names import hf_name
from llama_ray.model.saving import save_model
from llama_ray.model.sharded_safetensors import SHARDING_INFO
from llama_ray.model.stored_config import load_config
from llama_ray.model.weight_files import CheckpointError
from llama_ray.utils.integers import ceil_div

TINY = LlamaConfig.preset("llama-tiny")


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_model(Llama(TINY), tmp_path / "saved")
    return tmp_path / "saved"


def test_loading_gives_the_exact_weights_that_were_saved(model: Llama, tmp_path: Path) -> None:
    save_model(model, tmp_path, max_shard_bytes=20_000)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    loaded = load_model(tmp_path)
    assert loaded.config == model.config
    for (name, p), q in zip(model.named_parameters(), loaded.parameters(), strict=True):
        assert torch.equal(p, q), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tied", [False, True])
def test_a_sharded_model_saved_by_transformers_loads(tmp_path: Path, dtype: torch.dtype, tied: bool) -> None:
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 3, "vocab_size": 259}
    peer = LlamaForCausalLM(
        PeerConfig(
            **shape,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            tie_word_embeddings=tied,
            rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1234.0},
        )
    ).to(dtype)
    peer.save_pretrained(tmp_path, max_shard_size="100KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    model = load_model(tmp_path)
    assert model.embed_tokens.weight.dtype == dtype
    assert model.config.rope_theta == 1234.0
    tokens = torch.randint(0, 259, (2, 64))
    with torch.no_grad():
        theirs = peer.float()(tokens).logits
        ours = model.float()(tokens)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_a_model_loaded_in_another_dtype_is_saved_in_it(saved: Path, tmp_path: Path) -> None:
    model = load_model(saved, dtype=torch.bfloat16)
    save_model(model, tmp_path / "bf16", bos_id=1, eos_id=2)
    peer = AutoModelForCausalLM.from_pretrained(tmp_path / "bf16")
    assert peer.dtype == torch.bfloat16
    assert (peer.generation_config.bos_token_id, peer.generation_config.eos_token_id) == (1, 2)


def test_older_rotary_settings_are_read(saved: Path) -> None:
    hf = json.loads((saved / "config.json").read_text())
    hf["rope_scaling"] = {"type": "linear", "factor": 2.0}
    (saved / "config.json").write_text(json.dumps(hf))
    scaling = load_config(saved).rope_scaling
    assert scaling is not None
    assert (scaling.rope_type, scaling.factor) == ("linear", 2.0)


def edit_config(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(directory: Path, **changes: torch.Tensor | None) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    for name, tensor in changes.items():
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor
    save_file(tensors, path)


def truncate(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def only_a_pickle(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


def no_shard(directory: Path) -> None:
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: edit_config(d, architectures=["MistralForCausalLM"]), "MistralForCausalLM"),
        (lambda d: edit_config(d, attention_bias=True), "attention_bias is true; only models without biases"),
        (lambda d: edit_config(d, hidden_act="gelu"), "gelu"),
        (lambda d: edit_config(d, rope_scaling={"rope_type": "yarn", "factor": 2.0}), "yarn"),
        (
            lambda d: edit_config(d, num_attention_heads=7),
            "num_heads is 7; it must be a multiple of num_kv_heads, 2",
        ),
        (
            lambda d: (d / "config.json").write_text("{}"),
            "the architecture is nothing; it must be LlamaForCausalLM",
        ),
        (lambda d: (d / "config.json").unlink(), "holds no config.json"),
        (lambda d: edit_weights(d, **{NORM: None}), f"lacks {NORM}"),
        (lambda d: edit_weights(d, surplus=torch.zeros(1)), "unexpected surplus"),
        (
            lambda d: edit_weights(d, **{NORM: torch.zeros(65)}),
            r"norm.weight is \[65\]; config.json says \[64\]",
        ),
        (truncate, "damaged or cut short"),
        (only_a_pickle, "pytorch_model.bin, a pickle"),
        (no_shard, "lacks model-00001-of-00002.safetensors"),
        (lambda d: (d / "model.safetensors").unlink(), "holds no model.safetensors"),
    ],
)
def test_an_unreadable_directory_is_refused_with_the_reason(saved: Path, spoil, message: str) -> None:
    spoil(saved)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_model(saved)
    assert "\n" not in str(caught.value)


def test_a_slice_is_assembled_from_the_files_of_several_workers(saved: Path) -> None:
    tensors = load_file(saved / "model.safetensors")
    (saved / "model.safetensors").unlink()
    for rank in range(3):  # Slices of 22, 22 and 20 of 64.
        slices, sharding = {}, {}
        for name, tensor in tensors.items():
            dim = tensor.dim() - 1
            size = ceil_div(tensor.shape[dim], 3)
            slices[name] = tensor.chunk(3, dim)[rank].contiguous()
            sharding[name] = {"saved_offsets": [0] * dim + [rank * size]}
        save_file(slices, saved / f"model-rank{rank}.safetensors", {SHARDING_INFO: json.dumps(sharding)})
    whole = load_model(saved)
    sliced = load_model(saved, slicer=lambda _, shape: tuple(slice(10, 55) for _ in shape))
    for (name, p), q in zip(sliced.named_parameters(), whole.parameters(), strict=True):
        assert torch.equal(q, tensors[hf_name(name)]), name
        assert torch.equal(p, q[tuple(slice(10, 55) for _ in q.shape)]), name


def test_rotary_frequencies_in_older_exports_are_ignored(saved: Path) -> None:
    edit_weights(saved, **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)})
    assert load_model(saved).config == TINY


def test_a_crash_while_saving_leaves_no_loadable_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(path: Path, *_: object) -> None:
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(saving, "write_safetensors", crash)
    with pytest.raises(OSError, match="No space"):
        save_model(Llama(TINY), tmp_path)
    with pytest.raises(CheckpointError):
        load_model(tmp_path)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_model_is_loaded_where_it_is_asked_for_whatever_the_default_device_is(
    saved: Path, device: str
) -> None:
    expected = load_model(saved)
    with torch.device("meta"):
        loaded = load_model(saved, device=device)
    for p, q in zip(loaded.parameters(), expected.parameters(), strict=True):
        assert p.device.type == device
        assert device == "meta" or torch.equal(p, q)
    assert {buffer.device.type for buffer in loaded.buffers()} == {device}
