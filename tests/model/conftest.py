"""Random LLaMA shapes, and the transformers model that carries the same weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from llama_ray.model.config import LlamaConfig, RopeScaling
from llama_ray.model.llama import Llama
from llama_ray.model.saving import save_model

SMALL = {
    "vocab_size": 131,
    "hidden_size": 48,
    "num_layers": 2,
    "num_heads": 4,
    "intermediate_size": 100,
    "max_seq_len": 96,
}
SHAPES = {
    "multi-head": LlamaConfig(**SMALL),
    "grouped": LlamaConfig(**SMALL, num_kv_heads=2),
    "multi-query": LlamaConfig(**SMALL, num_kv_heads=1),
    "tied": LlamaConfig(**SMALL, tie_embeddings=True),
    "odd": LlamaConfig(
        vocab_size=97,
        hidden_size=30,
        num_layers=3,
        num_heads=3,
        head_dim=14,
        intermediate_size=53,
        max_seq_len=77,
        norm_eps=1e-5,
        rope_theta=500_000.0,
    ),
    "linear": LlamaConfig(**SMALL, rope_scaling=RopeScaling(rope_type="linear", factor=4.0)),
    "llama3": LlamaConfig(
        **SMALL,
        num_kv_heads=2,
        tie_embeddings=True,
        rope_scaling=RopeScaling(rope_type="llama3", factor=8.0, original_max_seq_len=32),
    ),
}


@pytest.fixture(params=SHAPES)
def config(request: pytest.FixtureRequest) -> LlamaConfig:
    return SHAPES[request.param]


@pytest.fixture
def model(config: LlamaConfig) -> Llama:
    model = Llama(config, seed=1)
    # Larger weights than initial ones, so that a difference shows.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(8)
            else:
                parameter.uniform_(0.5, 1.5)
    return model


@pytest.fixture
def peer(model: Llama, tmp_path: Path) -> LlamaForCausalLM:
    save_model(model, tmp_path / "hf")
    return AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
