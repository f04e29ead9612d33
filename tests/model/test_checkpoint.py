import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from transformers import LlamaConfig as PeerConfig

from llama_ray.model.checkpoint import CheckpointError, hf_name, load_config, load_model, save_model
from llama_ray.model.config import LlamaConfig
from llama_ray.model.llama import Llama
from llama_ray.model.sharded_safetensors import SHARDING_INFO

TINY = LlamaConfig.preset("llama-tiny")


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_model(Llama(TINY), tmp_path / "saved")
    return tmp_path / "saved"


def test_what_is_saved_loads_again_to_the_bit(model: Llama, tmp_path: Path) -> None:
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


def test_a_dtype_can_be_asked_for_and_kept(saved: Path, tmp_path: Path) -> None:
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
        (lambda d: edit_config(d, attention_bias=True), "without biases"),
        (lambda d: edit_config(d, hidden_act="gelu"), "gelu"),
        (lambda d: edit_config(d, rope_scaling={"rope_type": "yarn", "factor": 2.0}), "yarn"),
        (lambda d: edit_config(d, num_attention_heads=7), "num_heads 7 is not divisible"),
        (lambda d: (d / "config.json").write_text("{}"), "only LlamaForCausalLM"),
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
def test_a_directory_that_cannot_be_read_says_why(saved: Path, spoil, message: str) -> None:
    spoil(saved)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_model(saved)
    assert "\n" not in str(caught.value)


def test_a_part_is_read_out_of_the_pieces_of_several_workers(saved: Path) -> None:
    tensors = load_file(saved / "model.safetensors")
    (saved / "model.safetensors").unlink()
    for rank in range(3):  # pieces of 22 + 22 + 20 rows, or of the other dimension
        pieces, places = {}, {}
        for name, tensor in tensors.items():
            dim = tensor.dim() - 1
            size = -(-tensor.shape[dim] // 3)
            pieces[name] = tensor.chunk(3, dim)[rank].contiguous()
            places[name] = {"saved_offsets": [0] * dim + [rank * size]}
        save_file(pieces, saved / f"model-rank{rank}.safetensors", {SHARDING_INFO: json.dumps(places)})
    whole, part = (
        load_model(saved),
        load_model(saved, slicer=lambda _, shape: tuple(slice(10, 55) for _ in shape)),
    )
    for (name, p), q in zip(part.named_parameters(), whole.parameters(), strict=True):
        assert torch.equal(q, tensors[hf_name(name)]), name
        assert torch.equal(p, q[tuple(slice(10, 55) for _ in q.shape)]), name


def test_the_rotary_table_of_older_exports_is_passed_over(saved: Path) -> None:
    edit_weights(saved, **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)})
    assert load_model(saved).config == TINY


def test_a_crash_while_saving_leaves_no_file_that_looks_whole(tmp_path: Path, monkeypatch) -> None:
    import llama_ray.model.checkpoint as checkpoint

    def crash(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", crash)
    with pytest.raises(OSError, match="No space"):
        save_model(Llama(TINY), tmp_path)
    with pytest.raises(CheckpointError):
        load_model(tmp_path)
