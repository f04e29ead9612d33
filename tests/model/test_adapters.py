"""Adapters on disk: those of PEFT are read, PEFT reads ours, and both compute the same."""

from __future__ import annotations

import json
import warnings
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from llama_ray.model.adapter_files import (
    adapter_texts,
    base_of,
    open_adapter,
    save_adapter,
    stored_base_weights,
)
from llama_ray.model.adapters import add_adapters, merged_model
from llama_ray.model.llama import Llama
from llama_ray.model.lora import LoraLinear
from llama_ray.model.lora_config import LoraConfig
from llama_ray.model.merging import check_shapes, merged
from llama_ray.model.saving import save_model
from llama_ray.model.stored_model import open_model
from llama_ray.model.weight_files import CheckpointError
from llama_ray.model.weights_hash import weights_hash
from llama_ray.pretrained import load_pretrained, load_tokenizer, resolve
from tests.small_models import random_model, small_config

CONFIG = small_config(131)
TOKENS = torch.randint(0, 131, (2, 24), generator=torch.Generator().manual_seed(1))
LORA = LoraConfig(rank=4, alpha=8.0)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    save_model(random_model(CONFIG), tmp_path / "base")
    return tmp_path / "base"


def adapted_model(lora: LoraConfig = LORA) -> Llama:
    """Return the model of `base` with an adapter that has been trained, so that B is not 0."""
    model = random_model(CONFIG)
    add_adapters(model, lora)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, LoraLinear):
                module.factors()[1].normal_(0, 0.3, generator=generator)
    return model


def save(model: Llama, base: Path, directory: Path) -> Path:
    assert model.lora is not None
    with ExitStack() as stack:
        base_weights = weights_hash(open_model(base, stack))
    factors = {
        f"model.{name}.weight": module.factors()
        for name, module in model.named_modules()
        if isinstance(module, LoraLinear)
    }
    save_adapter(directory, model.lora, factors, base=str(base), base_weights=base_weights)
    return directory


def peft_model(base: Path) -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


def quietly_loaded(base: Path, adapter: Path) -> peft.PeftModel:
    with warnings.catch_warnings():
        # peft asks transformers for an attribute under its old name.
        warnings.filterwarnings("ignore", category=FutureWarning)
        return peft.PeftModel.from_pretrained(peft_model(base), adapter).eval()


def peft_adapter(base: Path, directory: Path, **settings: object) -> peft.PeftModel:
    """Make an adapter with peft, save it, and return the model that has it."""
    options = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "down_proj"], **settings}
    torch.manual_seed(0)
    with warnings.catch_warnings():
        # Also of layers that are not usual targets.
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **options)
        model = peft.get_peft_model(peft_model(base), config).eval()
        model.save_pretrained(directory)
    return model


@pytest.mark.parametrize(
    "lora", [LORA, LoraConfig(rank=8, alpha=2.5, rslora=True, targets=("v_proj", "gate_proj"))]
)
def test_peft_computes_the_logits_of_an_adapter_that_was_saved_here(
    base: Path, tmp_path: Path, lora: LoraConfig
) -> None:
    model = adapted_model(lora)
    peer = quietly_loaded(base, save(model, base, tmp_path / "adapter"))
    torch.testing.assert_close(model(TOKENS), peer(TOKENS).logits, atol=1e-3, rtol=1e-4)
    assert (model(TOKENS) - random_model(CONFIG)(TOKENS)).abs().max() > 0.1


@pytest.mark.parametrize(
    "settings", [{}, {"use_rslora": True, "target_modules": "all-linear"}, {"layers_to_transform": [1]}]
)
def test_an_adapter_of_peft_is_merged_when_it_is_loaded(
    base: Path, tmp_path: Path, settings: dict[str, object]
) -> None:
    peer = peft_adapter(base, tmp_path / "adapter", **settings)
    model, _ = load_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(model(TOKENS), peer(TOKENS).logits, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"use_dora": True}, "use_dora True"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "lora_only"}, "bias 'lora_only'"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 2}}, "alpha_pattern"),
        ({"target_modules": ["lm_head"]}, "lm_head"),
    ],
)
def test_what_is_more_than_two_factors_is_refused_by_name(
    base: Path, tmp_path: Path, settings: dict[str, object], named: str
) -> None:
    peft_adapter(base, tmp_path / "adapter", **settings)
    with pytest.raises(CheckpointError, match=f"{named}.*merge_and_unload") as error:
        load_pretrained(tmp_path / "adapter")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"peft_type": "IA3"}, "type 'IA3'; only LORA"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights 'pissa_niter_4'"),
        ({"lora_bias": True}, "lora_bias True"),
        ({"r": 5}, "says rank 5"),
        ({"r": "many"}, "rank is 'many'"),
        ({"base_model_name_or_path": None}, "names no base_model_name_or_path"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused_by_name(
    base: Path, tmp_path: Path, change: dict[str, object], named: str
) -> None:
    directory = save(adapted_model(), base, tmp_path / "adapter")
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=named):
        load_pretrained(directory)


def test_a_loaded_adapter_computes_what_the_unmerged_model_does(base: Path, tmp_path: Path) -> None:
    model = adapted_model()
    loaded, _ = load_pretrained(save(model, base, tmp_path / "adapter"))
    torch.testing.assert_close(loaded(TOKENS), model(TOKENS), atol=1e-3, rtol=1e-4)
    in_memory = merged_model(model)
    assert all(torch.equal(p, q) for p, q in zip(loaded.parameters(), in_memory.parameters(), strict=True))


def test_a_base_with_other_weights_is_refused(base: Path, tmp_path: Path) -> None:
    directory = save(adapted_model(), base, tmp_path / "adapter")
    save_model(random_model(CONFIG, seed=2), base)
    with pytest.raises(CheckpointError, match="are not those that the adapter was trained on"):
        load_pretrained(directory)


def test_an_adapter_and_a_whole_model_are_not_saved_over_each_other(base: Path, tmp_path: Path) -> None:
    directory = save(adapted_model(), base, tmp_path / "adapter")
    with pytest.raises(CheckpointError, match="holds an adapter; give another directory"):
        save_model(random_model(CONFIG), directory)
    with pytest.raises(CheckpointError, match="holds a whole model"):
        save(adapted_model(), base, base)


def test_an_adapter_of_itself_is_refused(base: Path, tmp_path: Path) -> None:
    directory = save(adapted_model(), base, tmp_path / "adapter")
    for name, text in adapter_texts(LORA, str(directory), None).items():
        (directory / name).write_text(text)
    for load in (load_pretrained, load_tokenizer):
        with pytest.raises(CheckpointError, match="is the adapter itself; write the path or models:/"):
            load(directory)


def test_an_adapter_with_a_copy_for_llama_cpp_beside_it_is_an_adapter(base: Path, tmp_path: Path) -> None:
    directory = save(adapted_model(), base, tmp_path / "adapter")
    (directory / "adapter.gguf").write_bytes(b"GGUF")
    assert resolve(directory) == directory


def test_the_base_of_another_shape_is_refused(base: Path, tmp_path: Path) -> None:
    directory = save(adapted_model(), base, tmp_path / "adapter")
    save_model(Llama(replace(CONFIG, intermediate_size=48)), tmp_path / "other")
    with (
        ExitStack() as stack,
        pytest.raises(CheckpointError, match=r"is for model\.layers\.\d\.mlp.* of \[.*the model has \["),
    ):
        check_shapes(open_model(tmp_path / "other", stack), open_adapter(directory, stack))


def test_the_hash_depends_on_the_weights_and_not_on_their_files(base: Path, tmp_path: Path) -> None:
    def hash_of(directory: Path) -> str:
        with ExitStack() as stack:
            return weights_hash(open_model(directory, stack))

    model = random_model(CONFIG)
    save_model(model, tmp_path / "sharded", max_shard_bytes=10_000)
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    assert hash_of(tmp_path / "sharded") == hash_of(base)
    with torch.no_grad():
        model.norm.weight[3] += 1e-6
    save_model(model, tmp_path / "changed")
    assert hash_of(tmp_path / "changed") != hash_of(base)


@pytest.mark.parametrize(
    ("reference", "peft_name", "revision"),
    [
        ("hf://org/model@0123abc", "org/model", "0123abc"),
        ("hf://org/model", "org/model", None),
        ("hf://org/model/file.gguf@0123abc", "hf://org/model/file.gguf@0123abc", None),
        ("models:/name/3", "models:/name/3", None),
        ("/data/model", "/data/model", None),
    ],
)
def test_the_base_is_named_as_peft_names_it_and_found_again(
    tmp_path: Path, reference: str, peft_name: str, revision: str | None
) -> None:
    for name, text in adapter_texts(LORA, reference, "abc").items():
        (tmp_path / name).write_text(text)
    config = peft.LoraConfig.from_pretrained(tmp_path)
    assert (config.base_model_name_or_path, config.revision) == (peft_name, revision)
    assert base_of(tmp_path) == reference
    assert stored_base_weights(tmp_path) == "abc"


@settings(deadline=None, max_examples=50)
@given(
    rows=st.tuples(st.integers(0, 32), st.integers(0, 32)),
    columns=st.tuples(st.integers(0, 64), st.integers(0, 64)),
)
def test_a_region_of_a_merged_tensor_is_that_part_of_the_whole(
    rows: tuple[int, int], columns: tuple[int, int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    directory = tmp_path_factory.getbasetemp() / "regions"
    if not directory.exists():
        save_model(random_model(CONFIG), directory / "base")
        save(adapted_model(), directory / "base", directory / "adapter")
    with ExitStack() as stack:
        adapter = open_adapter(directory / "adapter", stack)
        tensor = merged(open_model(directory / "base", stack), adapter).tensors[
            "model.layers.1.mlp.down_proj.weight"
        ]
        region = (slice(*sorted(rows)), slice(*sorted(columns)))
        torch.testing.assert_close(tensor.read(region), tensor.read()[region])
