"""A training run, from top to bottom."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from llama_ray.data.loader import Loader, TokenDataset, validation_batches
from llama_ray.data.tokenizer import Tokenizer
from llama_ray.model.config import LlamaConfig
from llama_ray.model.llama import Llama
from llama_ray.training.config import Schedule, TrainConfig
from llama_ray.training.metrics import Throughput, peak_flops, peak_memory_bytes
from llama_ray.training.observer import Observer
from llama_ray.training.optimizer import build_optimizer, learning_rate, set_learning_rate
from llama_ray.training.parallel import parallelize, rank, unwrap, world_size
from llama_ray.training.preflight import check_run
from llama_ray.training.state import Progress, load_state, save_state
from llama_ray.training.step import Stepper


class TrainingError(RuntimeError):
    """A run that cannot go on; the message says why and what to try."""


def train(
    model_config: LlamaConfig,
    config: TrainConfig,
    data: str | Path,
    *,
    device: torch.device,
    observer: Observer,
    resume_from: Path | None = None,
    run_id: str | None = None,
) -> Progress:
    """Train a model on the prepared data directory `data`, on every worker of the current process group.

    Call it in each worker; without a process group it trains alone. `resume_from` is a checkpoint to go on from;
    `run_id` is kept in every checkpoint. Returns how far the run got. Raises ValueError for data that does not
    fit, CheckpointError for a checkpoint that does not, TrainingError when the loss is no longer a number.
    """
    check_run(model_config, config, data, world_size(), resume_from)
    seq_len = config.seq_len or model_config.max_seq_len
    loader = Loader(
        TokenDataset(data, "train"),
        seq_len=seq_len,
        batch_size=config.batch_size,
        rank=rank(),
        world_size=world_size(),
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        seed=config.seed,
    )
    validation = TokenDataset(data, "validation")
    tokenizer = Tokenizer.load(data)
    schedule = Schedule.of(config, loader.batches_per_epoch)

    compile_blocks = device.type == "cuda" if config.compile is None else config.compile
    model = Llama(model_config, seed=config.seed, device=device)
    optimizer = build_optimizer(model, config)
    progress = Progress(run_id=run_id)
    if resume_from is not None:
        progress = load_state(resume_from, model, optimizer)
        loader.load_state_dict(progress.loader)
    stepper = Stepper(
        parallelize(model, device, compile_blocks=compile_blocks),
        optimizer,
        device=device,
        precision=config.precision,
        max_grad_norm=config.max_grad_norm,
    )
    if progress.scaler:
        stepper.scaler.load_state_dict(progress.scaler)
    tokens_per_step = loader.global_batch_size * seq_len
    throughput = Throughput(
        model_config.flops_per_token(seq_len), peak_flops(device, config.precision), world_size()
    )

    def validate(step: int) -> None:
        limit = config.validation_batches or None
        batches = validation_batches(validation, seq_len, config.batch_size, rank(), world_size(), limit)
        loss = stepper.validate(batches)
        progress.validation_loss = loss
        metrics = {"validation/loss": loss, "validation/perplexity": math.exp(min(loss, 700.0))}
        observer.validated(step, metrics, unwrap(stepper.model))

    def checkpoint(step: int) -> None:
        progress.loader = loader.state_dict()
        progress.scaler = stepper.scaler.state_dict()
        metrics = {"step": step, "validation_loss": progress.validation_loss or math.nan}

        def write(directory: Path) -> None:
            save_state(directory, model=model, optimizer=optimizer, tokenizer=tokenizer, progress=progress)

        observer.checkpoint(step, metrics, write)

    observer.started(schedule, progress.step)
    throughput.resume()
    for step in range(progress.step + 1, schedule.total_steps + 1):
        rate = learning_rate(step, config, schedule)
        set_learning_rate(optimizer, rate)
        epoch = loader.epoch
        result = stepper.step(loader.next_global_batch())
        progress.step = step
        progress.tokens += tokens_per_step
        throughput.count(tokens_per_step)

        if step % config.log_every == 0 or step in (1, schedule.total_steps):
            loss = result.mean_loss()
            if not math.isfinite(loss):
                raise TrainingError(
                    f"the loss is {loss} at step {step}; lower learning_rate ({config.learning_rate}) or max_grad_norm "
                    f"({config.max_grad_norm}), or use precision bf16 or fp32, and --resume"
                )
            tokens_per_s, mfu = throughput.read()
            observer.logged(
                step,
                {
                    "train/loss": loss,
                    "train/learning_rate": rate,
                    "train/gradient_norm": result.grad_norm.item(),
                    "throughput/tokens_per_s": tokens_per_s,
                    "throughput/mfu": mfu,
                    "memory/peak_bytes": peak_memory_bytes(device),
                    "progress/tokens": progress.tokens,
                    "progress/epoch": epoch,
                },
            )
        if schedule.validates(step) or schedule.saves(step):
            if device.type == "cuda":
                torch.cuda.synchronize(device)  # work still queued belongs to the steps, not to what follows
            throughput.pause()
            if schedule.validates(step):
                validate(step)
            if schedule.saves(step):
                checkpoint(step)
            throughput.resume()
    return progress
