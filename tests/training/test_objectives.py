"""The loss of pairs of answers, against a plain formula and TRL."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from llama_ray.data.dataset.batch import Batch
from llama_ray.model.attention.documents import DocumentAttention
from llama_ray.model.llama import Llama
from llama_ray.model.loss import token_losses
from llama_ray.pretrained import save_pretrained
from llama_ray.training.config import TrainConfig
from llama_ray.training.objectives import REWARDS, PairObjective
from llama_ray.training.optimizers.build import build_optimizer
from llama_ray.training.step import Stepper, StepResult
from llama_ray.utils.targets import IGNORE_INDEX
from tests.small_models import random_model, small_config
from tests.training.helpers import CPU

BETA = 0.3
Answer = tuple[list[int], int, float]
"""Token ids, how many of them are the prompt, and the reference's log-probability of the rest."""
PAIRS: list[tuple[Answer, Answer]] = [
    (([5, 6, 7, 8, 9], 2, -6.0), ([5, 6, 11, 12], 2, -5.0)),
    (([20, 21, 22, 23, 24, 25, 26], 4, -9.0), ([20, 21, 22, 23, 30, 31, 32, 33], 4, -8.5)),
    (([40, 41], 1, -3.0), ([40, 43, 44], 1, -4.0)),
]
ROW_TOKENS = 20


def batch_of(rows: list[list[tuple[Answer, Answer]]]) -> Batch:
    """Rows as prepared data have them: documents laid end to end, padding at the end of the last one."""
    shape = (len(rows), ROW_TOKENS)
    inputs = torch.zeros(shape, dtype=torch.int64)
    targets = torch.full(shape, IGNORE_INDEX)
    starts, reference = torch.zeros(shape, dtype=torch.int32), torch.zeros(shape)
    for row, pairs in enumerate(rows):
        place = 0
        for ids, prompt, of_reference in (answer for pair in pairs for answer in pair):
            end = place + len(ids)
            inputs[row, place:end] = torch.tensor(ids)
            targets[row, place + prompt - 1 : end - 1] = torch.tensor(ids[prompt:])
            starts[row, place:] = place
            reference[row, place] = of_reference
            place = end
    return Batch(inputs, targets, starts, reference=reference)


ROWS = [[PAIRS[0], PAIRS[2]], [PAIRS[1]]]


def model() -> Llama:
    return random_model(small_config(64))


def log_probability(policy: Llama, answer: Answer) -> Tensor:
    ids, prompt, _ = answer
    log_p = policy(torch.tensor([ids]))[0].log_softmax(-1)
    return torch.stack([log_p[place - 1, ids[place]] for place in range(prompt, len(ids))]).sum()


def plain_losses(policy: Llama, length_normalize: bool) -> Tensor:
    losses = []
    for pair in PAIRS:
        chosen, rejected = (log_probability(policy, answer) - answer[2] for answer in pair)
        if length_normalize:
            chosen, rejected = (r / (len(a[0]) - a[1]) for r, a in zip((chosen, rejected), pair, strict=True))
        losses.append(-torch.log(torch.sigmoid(BETA * (chosen - rejected))))
    return torch.stack(losses)


def gradients(policy: torch.nn.Module, loss: Tensor) -> dict[str, Tensor]:
    policy.zero_grad()
    torch.autograd.backward(loss)
    return {n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None}


def packed_loss(policy: Llama, length_normalize: bool, rows: list[list[tuple[Answer, Answer]]]) -> Tensor:
    batch = batch_of(rows)
    assert batch.starts is not None
    attend = DocumentAttention.of(batch.starts, CPU, torch.float32)
    return PairObjective(BETA, length_normalize).loss(policy, batch, attend, None)


@pytest.mark.parametrize("length_normalize", [False, True])
def test_packed_pairs_have_the_loss_and_gradients_of_the_plain_formula(length_normalize: bool) -> None:
    policy = model()
    expected = plain_losses(policy, length_normalize).sum()
    objective, reported, *rewards = packed_loss(policy, length_normalize, ROWS).unbind()
    torch.testing.assert_close(objective, expected, rtol=1e-5, atol=1e-6)
    assert reported == objective.detach()
    chosen, rejected = (
        torch.stack([BETA * (log_probability(policy, pair[n]) - pair[n][2]) for pair in PAIRS]).detach()
        for n in (0, 1)
    )
    torch.testing.assert_close(
        torch.stack(rewards),
        torch.stack([chosen.sum(), rejected.sum(), (chosen - rejected).sum(), (chosen > rejected).sum()]),
        rtol=1e-4,
        atol=1e-4,
    )
    ours, theirs = gradients(policy, objective), gradients(policy, expected)
    assert ours.keys() == theirs.keys()
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-6)


def trl_loss(policy: torch.nn.Module, length_normalize: bool) -> Tensor:
    """The loss that DPOTrainer computes of PAIRS, without the trainer around it."""
    from trl.trainer.dpo_trainer import DPOTrainer
    from trl.trainer.utils import add_fused_lm_head

    add_fused_lm_head(policy, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
    answers = [pair[n] for n in (0, 1) for pair in PAIRS]
    longest = max(len(ids) for ids, _, _ in answers)
    inputs = {
        "input_ids": torch.tensor([ids + [0] * (longest - len(ids)) for ids, _, _ in answers]),
        "attention_mask": torch.tensor([[1] * len(i) + [0] * (longest - len(i)) for i, _, _ in answers]),
        "completion_mask": torch.tensor(
            [[0] * p + [1] * (len(i) - p) + [0] * (longest - len(i)) for i, p, _ in answers]
        ),
        "ref_chosen_logps": torch.tensor([answer[2] for answer in answers[: len(PAIRS)]]),
        "ref_rejected_logps": torch.tensor([answer[2] for answer in answers[len(PAIRS) :]]),
    }
    trainer: Any = SimpleNamespace(
        model=policy, accelerator=SimpleNamespace(device=CPU, gather_for_metrics=lambda x: x, gather=lambda x: x),
        aux_loss_enabled=False, ld_alpha=None, precompute_ref_logps=True, f_divergence_type="reverse_kl",
        loss_types=["sigmoid_norm" if length_normalize else "sigmoid"], loss_weights=[1.0], beta=BETA,
        use_weighting=False, _metrics={"train": defaultdict(list)}, _total_train_tokens=0, _tp_size=1,
    )  # fmt: skip
    loss: Tensor = DPOTrainer._compute_loss(trainer, policy, inputs, False)
    return loss


@pytest.mark.parametrize("length_normalize", [False, True])
def test_packed_pairs_have_the_loss_and_gradients_of_trl(tmp_path: Path, length_normalize: bool) -> None:
    from transformers import AutoModelForCausalLM

    policy = model()
    save_pretrained(policy, None, tmp_path)
    peer = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).train()
    theirs = trl_loss(peer, length_normalize)
    ours = packed_loss(policy, length_normalize, ROWS)[0] / len(PAIRS)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    of_peer, of_ours = gradients(peer, theirs), gradients(policy, ours)
    assert len(of_peer) == len(of_ours)
    for name, gradient in of_ours.items():
        peers = of_peer[name if name.startswith("lm_head") else f"model.{name}"]
        torch.testing.assert_close(gradient, peers, rtol=1e-3, atol=1e-6)


def step_on(micro_batches: list[Batch], **settings: Any) -> tuple[StepResult, dict[str, Tensor]]:
    config = TrainConfig(
        task="dpo", init_from="x", precision="fp32", dpo_beta=BETA, learning_rate=1e-2, **settings
    )
    policy = model()
    stepper = Stepper(policy, build_optimizer(policy, config), config, device=CPU)
    return stepper.step(micro_batches), policy.state_dict()


def test_how_a_global_batch_is_split_changes_the_step_of_pairs_by_rounding_only() -> None:
    """Its rows have different numbers of pairs, so that a mean over rows would be another one."""
    together, weights = step_on([batch_of(ROWS)])
    apart, others = step_on([batch_of(ROWS[:1]), batch_of(ROWS[1:])])
    assert together.tokens == apart.tokens == len(PAIRS)
    torch.testing.assert_close(together.loss, apart.loss)
    torch.testing.assert_close(together.measures, apart.measures)
    assert len(together.measures) == len(REWARDS)
    for name, weight in weights.items():
        torch.testing.assert_close(weight, others[name], rtol=1e-3, atol=1e-5)


def test_steps_on_pairs_prefer_the_chosen_answers() -> None:
    config = TrainConfig(task="dpo", init_from="x", precision="bf16", dpo_beta=BETA, learning_rate=1e-2)
    policy = model()
    stepper = Stepper(policy, build_optimizer(policy, config), config, device=CPU)
    margins = [stepper.step([batch_of(ROWS)]).measures[2].item() for _ in range(20)]
    assert margins[-1] > margins[0] + 1
    found = stepper.validate([batch_of(ROWS), batch_of(ROWS[1:])])
    assert found.measures[3] == 1
    assert found.loss < 0.3


def test_the_losses_of_tokens_are_no_view_of_which_sharding_would_warn() -> None:
    hidden, weight = torch.randn(2, 3, 4, requires_grad=True), torch.randn(8, 4)
    losses = token_losses(hidden, weight, torch.tensor([[1, 2, IGNORE_INDEX]] * 2))
    assert not losses._is_view()
    assert losses[:, 2].tolist() == [0, 0]
