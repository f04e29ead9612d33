"""Training of adapters: the same in every layout, exact on resume, and equal to peft's."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from llama_ray.data.dataset.batch import Batch
from llama_ray.model.adapter_files import base_of
from llama_ray.model.config import LlamaConfig
from llama_ray.model.llama import Llama
from llama_ray.model.parameter_names import hf_name
from llama_ray.model.saving import save_model
from llama_ray.pretrained import load_pretrained
from llama_ray.training.adapter_base import check_base
from llama_ray.training.config import TrainConfig
from llama_ray.training.loop import train
from llama_ray.training.optimizers.build import build_optimizer
from llama_ray.training.parallel.layout import SINGLE_WORKER
from llama_ray.training.parallel.parallelize import parallelize, unallocated_model
from llama_ray.training.step import Stepper, StepResult
from llama_ray.utils.targets import IGNORE_INDEX
from tests.small_models import random_model
from tests.training.helpers import (
    CPU,
    DDP,
    FSDP,
    Recorder,
    Settings,
    in_processes,
    losses,
    losses_after,
)

EIGHT_STEPS = TrainConfig(
    max_steps=8,
    batch_size=8,
    learning_rate=3e-2,
    log_every=1,
    checkpoint_every=4,
    validate_every=8,
    precision="fp32",
    init_from="the fixture base",
    lora_rank=4,
)
TWO_STEPS = replace(EIGHT_STEPS, max_steps=2, checkpoint_every=2, validate_every=2)
WORKERS = 2
LAYOUTS: dict[str, Settings] = {"ddp": DDP, "fsdp": FSDP, "fsdp in bf16": {**FSDP, "precision": "bf16"}}
DROPOUT: Settings = {"lora_dropout": 0.3}


@pytest.fixture(scope="module")
def base(tiny: LlamaConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("base")
    save_model(random_model(tiny), directory)
    return directory


def run(
    model: LlamaConfig,
    config: TrainConfig,
    base: Path,
    dataset: Path,
    output: Path,
    resume_from: Path | None = None,
) -> Recorder:
    recorder = Recorder()
    config = replace(config, init_from=str(base))
    train(
        model,
        config,
        dataset,
        device=CPU,
        observer=recorder,
        output_dir=str(output),
        resume_from=resume_from,
    )
    return recorder


def adapted(tiny: LlamaConfig, base: Path, **settings: object) -> Stepper:
    """Return the stepper of one worker, whose adapters are trained: B is not 0."""
    config = replace(TWO_STEPS, batch_size=2, **settings)
    llama = unallocated_model(tiny, config)
    parallelize(llama, config, SINGLE_WORKER, CPU, compile_blocks=False)
    weights = dict(load_pretrained(base)[0].named_parameters())
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in llama.named_parameters():
            if not parameter.requires_grad:
                parameter.copy_(weights[name])
            elif "lora_B" in name:
                parameter.normal_(0, 0.2, generator=generator)
    return Stepper(llama, build_optimizer(llama, config), config, device=CPU)


def batch_of(tiny: LlamaConfig) -> Batch:
    tokens = torch.randint(0, tiny.vocab_size, (2, 33), generator=torch.Generator().manual_seed(7))
    targets = tokens[:, 1:].clone()
    targets[0, :20] = IGNORE_INDEX
    return Batch(tokens[:, :-1], targets, None)


def peer_of(base: Path, stepper: Stepper) -> peft.PeftModel:
    """Return peft's model with the adapter of `stepper`."""
    llama, lora = stepper.model, stepper.config.lora
    assert isinstance(llama, Llama)
    assert lora is not None
    with warnings.catch_warnings():
        # peft asks transformers for an attribute under its old name.
        warnings.filterwarnings("ignore", category=FutureWarning)
        plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        settings = peft.LoraConfig(
            task_type="CAUSAL_LM", r=lora.rank, lora_alpha=lora.alpha, target_modules=list(lora.targets)
        )
        model = peft.get_peft_model(plain, settings)
    peft.set_peft_model_state_dict(
        model,
        {f"base_model.model.{hf_name(n)}": p.clone() for n, p in llama.named_parameters() if p.requires_grad},
    )
    return model


def named(model: peft.PeftModel) -> dict[str, torch.nn.Parameter]:
    """Return peft's factors by our names."""
    return {
        name.removeprefix("base_model.model.model.").replace(".default", ""): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def gradients(stepper: Stepper, batch: Batch) -> dict[str, Tensor]:
    llama = stepper.model
    valid = (batch.targets != IGNORE_INDEX).sum()
    (llama(batch.inputs, targets=batch.targets)[0] / valid).backward()
    found = {name: p.grad.clone() for name, p in llama.named_parameters() if p.grad is not None}
    stepper.optimizer.zero_grad()
    return found


def test_gradients_and_a_step_are_those_of_peft(tiny: LlamaConfig, base: Path) -> None:
    stepper, batch = adapted(tiny, base, max_grad_norm=0.0), batch_of(tiny)
    peer = peer_of(base, stepper)
    # transformers shifts the labels itself.
    labels = torch.cat((torch.full((2, 1), IGNORE_INDEX), batch.targets), dim=1)
    inputs = torch.cat((batch.inputs, batch.targets[:, -1:].clamp(min=0)), dim=1)
    peer(inputs, labels=labels).loss.backward()
    ours = gradients(stepper, batch)
    theirs = named(peer)
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name].grad, atol=1e-6, rtol=1e-4)
    config = stepper.config
    torch.optim.AdamW(
        theirs.values(),
        lr=config.peak_learning_rate,
        betas=(config.beta1, config.beta2),
        weight_decay=config.weight_decay,
    ).step()
    stepper.step([batch])
    for name, parameter in stepper.model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter, theirs[name], atol=1e-5, rtol=1e-4)


def test_only_adapters_have_gradients_and_optimizer_states(tiny: LlamaConfig, base: Path) -> None:
    stepper = adapted(tiny, base, precision="bf16")
    names = set(gradients(adapted(tiny, base), batch_of(tiny)))
    assert names
    assert all(".lora_A." in name or ".lora_B." in name for name in names)
    stepper.step([batch_of(tiny)])
    by_tensor = {p: name for name, p in stepper.model.named_parameters()}
    assert {by_tensor[p] for p in stepper.optimizer.state} == names
    assert all(
        p.dtype is (torch.float32 if name in names else torch.bfloat16) for p, name in by_tensor.items()
    )
    lora = stepper.config.lora
    assert lora is not None
    assert lora.num_parameters(tiny) == sum(p.numel() for p in stepper.optimizer.state)


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_recomputed_blocks_drop_the_same_and_have_the_same_gradients(
    tiny: LlamaConfig, base: Path, mode: str
) -> None:
    found = []
    for checkpointing in ("none", mode):
        stepper = adapted(tiny, base, **DROPOUT, activation_checkpointing=checkpointing)
        torch.manual_seed(11)
        found.append(gradients(stepper, batch_of(tiny)))
    torch.testing.assert_close(found[0], found[1])
    assert any(
        (found[0][n] - g).abs().max() > 1e-3
        for n, g in gradients(adapted(tiny, base), batch_of(tiny)).items()
    )


def test_validation_drops_nothing(tiny: LlamaConfig, base: Path) -> None:
    batch = batch_of(tiny)
    exact = adapted(tiny, base).validate([batch])
    assert adapted(tiny, base, **DROPOUT).validate([batch]) == exact


def test_what_a_step_drops_does_not_depend_on_what_was_drawn_before(
    tiny: LlamaConfig, base: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(EIGHT_STEPS, max_steps=3, **DROPOUT)
    expected = losses(run(tiny, config, base, dataset, tmp_path / "first"))
    step = Stepper.step

    def draw_first(self: Stepper, micro_batches: Sequence[Batch]) -> StepResult:
        result = step(self, micro_batches)
        torch.rand(7)
        return result

    monkeypatch.setattr(Stepper, "step", draw_first)
    assert losses(run(tiny, config, base, dataset, tmp_path / "second")) == expected


def train_in_layouts(
    tiny: LlamaConfig, base: Path, dataset: Path, output: Path
) -> dict[str, dict[int, float]]:
    """Train in each layout, in every worker of a process group; return the losses by step."""
    config = replace(TWO_STEPS, batch_size=TWO_STEPS.batch_size // WORKERS)
    return {
        name: losses(run(tiny, replace(config, **layout), base, dataset, output / name))
        for name, layout in LAYOUTS.items()
    }


def test_every_layout_trains_the_same_adapters(
    tiny: LlamaConfig, base: Path, dataset: Path, tmp_path: Path
) -> None:
    alone = {
        precision: losses(
            run(tiny, replace(TWO_STEPS, precision=precision), base, dataset, tmp_path / precision)
        )
        for precision in ("fp32", "bf16")
    }
    [together, *_] = in_processes(WORKERS, train_in_layouts, tiny, base, dataset, tmp_path)
    expected = dict(load_pretrained(tmp_path / "fp32" / "step_00000002")[0].named_parameters())
    start = dict(load_pretrained(base)[0].named_parameters())
    assert any((start[name] - p).abs().max() > 1e-2 for name, p in expected.items())
    for layout, found in together.items():
        in_bf16 = "bf16" in layout
        assert found == pytest.approx(alone["bf16" if in_bf16 else "fp32"], abs=1e-3 if in_bf16 else 1e-5)
        # Assembled of the files of all ranks, and merged.
        model, tokenizer = load_pretrained(tmp_path / layout / "step_00000002")
        assert tokenizer is not None
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter, expected[name], atol=0.1 if in_bf16 else 1e-4, rtol=1e-4)


def test_a_resumed_run_goes_on_exactly_with_dropout_too(
    tiny: LlamaConfig, base: Path, dataset: Path, tmp_path: Path
) -> None:
    config = replace(EIGHT_STEPS, **DROPOUT)
    whole = losses(run(tiny, config, base, dataset, tmp_path / "whole"))
    assert whole != losses(run(tiny, EIGHT_STEPS, base, dataset, tmp_path / "no dropout"))
    torch.manual_seed(99)
    checkpoint = tmp_path / "whole" / "step_00000004"
    resumed = losses(run(tiny, config, base, dataset, tmp_path / "resumed", checkpoint))
    assert resumed == losses_after(4, whole)
    files = {path.name for path in checkpoint.iterdir()}
    assert "adapter-rank00000.safetensors" in files
    assert not any(name.startswith("model") for name in files)


@pytest.fixture(scope="module")
def trained(tiny: LlamaConfig, base: Path, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a run of two steps."""
    directory = tmp_path_factory.mktemp("trained")
    run(tiny, TWO_STEPS, base, dataset, directory)
    return directory / "step_00000002"


def test_a_branch_of_a_run_finds_the_base_of_its_adapters(
    tiny: LlamaConfig, base: Path, dataset: Path, tmp_path: Path, trained: Path
) -> None:
    branch = replace(TWO_STEPS, init_from=None, branch_from=str(trained))
    recorder = Recorder()
    train(tiny, branch, dataset, device=CPU, observer=recorder, output_dir=str(tmp_path / "branch"))
    assert set(losses(recorder)) == {3, 4}
    assert base_of(tmp_path / "branch" / "step_00000004") == str(base)


@pytest.fixture
def moved(tiny: LlamaConfig, base: Path, dataset: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Return the checkpoint of a run, and the directory of its base, which may be changed."""
    own = tmp_path / "base"
    shutil.copytree(base, own)
    run(tiny, TWO_STEPS, own, dataset, tmp_path / "run")
    return tmp_path / "run" / "step_00000002", own


def test_a_run_does_not_go_on_upon_other_weights(
    tiny: LlamaConfig, dataset: Path, tmp_path: Path, moved: tuple[Path, Path]
) -> None:
    checkpoint, own = moved
    save_model(random_model(tiny, seed=2), own)
    with pytest.raises(ValueError, match=r"are not those that the run began with.*--init_from"):
        run(tiny, EIGHT_STEPS, own, dataset, tmp_path / "resumed", checkpoint)


def test_a_copy_of_a_base_that_was_written_over_is_found_by_init_from(
    tiny: LlamaConfig, dataset: Path, tmp_path: Path, moved: tuple[Path, Path]
) -> None:
    checkpoint, own = moved
    copy = shutil.copytree(own, tmp_path / "copy")
    save_model(random_model(tiny, seed=2), own)
    run(tiny, replace(TWO_STEPS, max_steps=3), copy, dataset, tmp_path / "resumed", checkpoint)
    assert base_of(tmp_path / "resumed" / "step_00000003") == str(copy)


def test_a_base_that_moved_is_found_by_init_from(
    tiny: LlamaConfig, dataset: Path, tmp_path: Path, moved: tuple[Path, Path]
) -> None:
    checkpoint, own = moved
    elsewhere = own.rename(tmp_path / "elsewhere")
    run(tiny, EIGHT_STEPS, elsewhere, dataset, tmp_path / "resumed", checkpoint)
    assert load_pretrained(tmp_path / "resumed" / "step_00000008")[0].config == tiny


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora_rank": 8}, "lora_rank is 8; it was 4 in"),
        ({"lora_rank": 0}, "lora_rank is none; it was 4 in"),
        ({"lora_targets": ("q_proj",)}, "lora_targets is .'q_proj',.; it was"),
    ],
)
def test_a_run_does_not_go_on_with_other_adapters(
    tiny: LlamaConfig,
    dataset: Path,
    tmp_path: Path,
    base: Path,
    trained: Path,
    settings: Settings,
    message: str,
) -> None:
    with pytest.raises(ValueError, match=message):
        run(tiny, replace(EIGHT_STEPS, **settings), base, dataset, tmp_path / "resumed", trained)


def test_what_adapters_cannot_change_or_stand_on_is_refused(
    tiny: LlamaConfig, base: Path, trained: Path
) -> None:
    config = replace(TWO_STEPS, init_from=str(base))
    with pytest.raises(ValueError, match="max_seq_len is 16; with lora_rank it must be 32"):
        check_base(replace(tiny, max_seq_len=16), config)
    with pytest.raises(ValueError, match="an adapter; with lora_rank it must be a whole model"):
        check_base(tiny, replace(config, init_from=str(trained)))


def test_a_base_with_secrets_in_its_name_is_refused_without_telling_them() -> None:
    with pytest.raises(ValueError, match=r"init_from is s3://\*\*\*@bucket/model, with secrets") as refused:
        TrainConfig(init_from="s3://key:hidden@bucket/model", lora_rank=4)
    assert "hidden" not in str(refused.value)
