from __future__ import annotations

from dataclasses import replace

import pytest

from llama_ray.model.config import LlamaConfig
from llama_ray.training.config import TrainConfig
from llama_ray.training.parallel.layout import GIB
from llama_ray.training.planning.plan import Cluster, make_plan
from llama_ray.training.planning.search import nearest_that_fits

LLAMA_7B, LLAMA_65B = LlamaConfig.preset("llama-7b"), LlamaConfig.preset("llama-65b")


def test_65b_on_64_gpus_fits_once_it_is_sharded() -> None:
    cluster = Cluster(gpus=64, gpu_memory_bytes=80 * GIB)
    replicated = make_plan(LLAMA_65B, TrainConfig(batch_size=1, parallelism="ddp"), cluster)
    assert not replicated.fits
    assert replicated.memory["optimizer"] == pytest.approx(8 * LLAMA_65B.num_parameters(), rel=0.01)

    sharded = nearest_that_fits(replicated)

    assert sharded is not None
    assert sharded.fits
    assert sharded.cluster == cluster
    assert sharded.config == replace(replicated.config, parallelism="fsdp")
    assert sharded.memory["parameters"] == pytest.approx(4 * LLAMA_65B.num_parameters() / 64, rel=0.01)
    assert sharded.tokens_per_step == replicated.tokens_per_step


def test_a_smaller_batch_keeps_an_automatic_layout_and_the_global_batch() -> None:
    cluster = Cluster(gpus=4, gpu_memory_bytes=40 * GIB)
    # Tensor parallelism does not divide this length.
    asked = TrainConfig(batch_size=16, activation_checkpointing="full", seq_len=2047)
    plan = make_plan(LLAMA_7B, asked, cluster)
    assert not plan.fits

    other = nearest_that_fits(plan)

    assert other is not None
    assert other.fits
    assert other.cluster == cluster
    size = other.config.batch_size
    assert other.config == replace(asked, batch_size=size, gradient_accumulation_steps=16 // size)
    assert other.tokens_per_step == plan.tokens_per_step


def test_hsdp_that_does_not_fit_becomes_fsdp_over_all_gpus() -> None:
    cluster = Cluster(gpus=8, gpu_memory_bytes=40 * GIB)
    asked = TrainConfig(batch_size=1, parallelism="hsdp", fsdp_size=2, activation_checkpointing="full")
    plan = make_plan(LLAMA_7B, asked, cluster)
    assert not plan.fits

    other = nearest_that_fits(plan)

    assert other is not None
    assert other.fits
    assert other.config == replace(asked, parallelism="fsdp", fsdp_size=0)


@pytest.mark.parametrize("batch_size", [1, 256])
def test_too_few_gpus_are_doubled_until_it_fits(batch_size: int) -> None:
    cluster = Cluster(gpus=1, gpu_memory_bytes=40 * GIB)
    plan = make_plan(LLAMA_7B, TrainConfig(batch_size=batch_size), cluster)
    assert not plan.fits

    other = nearest_that_fits(plan)

    assert other is not None
    assert other.fits
    assert other.cluster == replace(cluster, gpus=4)
    half = replace(cluster, gpus=2)
    assert not make_plan(LLAMA_7B, other.config, half).fits
