import itertools

import pytest
import torch
from transformers import get_cosine_with_min_lr_schedule_with_warmup

from llama_ray.model.config import LlamaConfig
from llama_ray.model.llama import Llama
from llama_ray.training.config import TrainConfig
from llama_ray.training.optimizers.build import build_optimizer, learning_rate, set_learning_rate
from tests.training.helpers import schedule_of


def test_warmup_and_cosine_are_those_of_transformers() -> None:
    config = TrainConfig(max_steps=100, warmup_steps=10, learning_rate=2e-3)
    schedule = schedule_of(config)
    dummy = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2e-3)
    peer = get_cosine_with_min_lr_schedule_with_warmup(dummy, 10, 100, min_lr_rate=0.1)
    for step in range(1, 101):
        dummy.step()
        peer.step()
        assert learning_rate(step, config, schedule) == pytest.approx(peer.get_last_lr()[0])


def test_a_linear_schedule_falls_evenly_to_the_lowest_rate() -> None:
    config = TrainConfig(max_steps=110, warmup_steps=10, learning_rate=1.0, schedule="linear")
    schedule = schedule_of(config)
    rates = [learning_rate(step, config, schedule) for step in range(10, 111)]
    assert rates[0] == 1.0
    assert rates[-1] == pytest.approx(0.1)
    assert {round(a - b, 9) for a, b in itertools.pairwise(rates)} == {0.009}


WSD = TrainConfig(
    max_steps=100,
    warmup_steps=10,
    learning_rate=2.0,
    schedule="wsd",
    decay_fraction=0.25,
    min_learning_rate_ratio=0.0,
)


def test_wsd_is_constant_and_then_decays() -> None:
    schedule = schedule_of(WSD)
    rates = {step: learning_rate(step, WSD, schedule) for step in range(1, 101)}
    assert rates[5] == 1.0
    assert {rates[step] for step in range(10, 76)} == {2.0}
    assert rates[76] < 2.0
    assert rates[88] == pytest.approx(2.0 * 12 / 25)
    assert rates[100] == pytest.approx(0.0)


def test_wsd_with_a_long_warmup_decays_right_after_it() -> None:
    late = schedule_of(TrainConfig(max_steps=100, warmup_steps=90))
    assert learning_rate(90, WSD, late) == 2.0
    assert learning_rate(95, WSD, late) == pytest.approx(1.0)


def test_muon_takes_the_matrices_of_the_blocks() -> None:
    model = Llama(LlamaConfig.preset("llama-tiny"))
    optimizer = build_optimizer(model, TrainConfig(optimizer="muon"))
    orthogonalised = {id(p) for g in optimizer.param_groups if g["muon"] for p in g["params"]}
    for name, p in model.named_parameters():
        assert (id(p) in orthogonalised) == (name.startswith("layers.") and "norm" not in name), name


def test_weight_decay_is_for_matrices_only() -> None:
    model = Llama(LlamaConfig.preset("llama-tiny", tie_embeddings=True))
    optimizer = build_optimizer(model, TrainConfig(weight_decay=0.5))
    decayed = {id(p) for g in optimizer.param_groups if g["weight_decay"] == 0.5 for p in g["params"]}
    plain = {id(p) for g in optimizer.param_groups if g["weight_decay"] == 0.0 for p in g["params"]}
    for name, p in model.named_parameters():
        assert id(p) in (plain if "norm" in name else decayed), name
    assert len(decayed) + len(plain) == len(list(model.parameters()))


def test_a_learning_rate_is_set_in_all_groups() -> None:
    optimizer = build_optimizer(Llama(LlamaConfig.preset("llama-tiny")), TrainConfig(optimizer="muon"))
    set_learning_rate(optimizer, 0.25)
    assert {g["lr"] for g in optimizer.param_groups} == {0.25}
