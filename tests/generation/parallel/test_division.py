from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from llama_ray.generation.parallel.division import check_ranks, rank_slicer
from llama_ray.model.checkpoint import load_model
from llama_ray.model.llama import Llama


def test_every_divided_size_and_the_gpus_are_checked(model: Llama) -> None:
    cpu = torch.device("cpu")
    for name in ("intermediate_size", "vocab_size"):
        odd = dataclasses.replace(model.config, **{name: 99})
        with pytest.raises(ValueError, match=f"2; it must divide the model's {name} of 99; .* by 1 only$"):
            check_ranks(odd, 2, cpu)
    gpus = torch.cuda.device_count()
    heads = dataclasses.replace(
        model.config,
        num_heads=gpus + 2,
        num_kv_heads=gpus + 2,
        intermediate_size=gpus + 2,
        vocab_size=gpus + 2,
    )
    with pytest.raises(ValueError, match=f"tensor_parallel is {gpus + 2}; {gpus} GPUs are visible"):
        check_ranks(heads, gpus + 2, torch.device("cuda"))
    with pytest.raises(ValueError, match="device is cuda:1; tensor_parallel 2 takes GPUs 0 to 1"):
        check_ranks(model.config, 2, torch.device("cuda:1"))


def test_a_rank_reads_only_its_share_of_the_weights(saved: Path, model: Llama) -> None:
    ranks = [dict(load_model(saved, slicer=rank_slicer(rank, 2)).named_parameters()) for rank in range(2)]
    for name, whole in model.named_parameters():
        first, second = (rank[name] for rank in ranks)
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            assert torch.equal(torch.cat([first, second], 1), whole)
        elif "proj" in name or "lm_head" in name:
            assert torch.equal(torch.cat([first, second]), whole)
        else:
            assert torch.equal(first, whole)
            assert torch.equal(second, whole)
