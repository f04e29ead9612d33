"""A training run, from top to bottom."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from llama_ray.data.loader import Loader, TokenDataset, validation_batches
from llama_ray.data.tokenizer import Tokenizer
from llama_ray.model.config import LlamaConfig
from llama_ray.model.llama import Llama
from llama_ray.training.checkpointing.checkpointer import Checkpointer
from llama_ray.training.checkpointing.state import Progress, load_state
from llama_ray.training.config import Schedule, TrainConfig
from llama_ray.training.errors import Skips, TrainingError, out_of_memory_at
from llama_ray.training.interrupt import Agreement, Interrupt, Stopped
from llama_ray.training.metrics import Throughput, peak_flops, peak_memory_bytes, perplexity
from llama_ray.training.observer import Observer
from llama_ray.training.optimizers.build import build_optimizer, learning_rate, set_learning_rate
from llama_ray.training.parallel.compilation import compile_pays
from llama_ray.training.parallel.layout import choose_layout, local_world_size, memory_per_worker
from llama_ray.training.parallel.parallelize import gather_model, parallelize, rank, world_size
from llama_ray.training.preflight import check_run
from llama_ray.training.profiling import profiled
from llama_ray.training.step import Stepper

MAX_FAILED_CHECKPOINTS = 3


def train(
    model_config: LlamaConfig,
    config: TrainConfig,
    data: str | Path,
    *,
    device: torch.device,
    observer: Observer,
    output_dir: str | None = None,
    resume_from: Path | None = None,
    run_id: str | None = None,
    asked: Callable[[], Interrupt] = lambda: Interrupt.NONE,
) -> Progress:
    """Train a model on the prepared data directory `data`, on every worker of the current process group.

    Call it in each worker; without a process group it trains alone. Checkpoints go to `output_dir`, an absolute
    path or a URI that all workers reach; without one none are made. `resume_from` is a checkpoint to go on from;
    `run_id` is kept in every checkpoint. `asked`, called at each step, says what somebody outside wants; what any
    worker is asked, all of them do. Returns how far the run got. Raises ValueError for data that does not fit,
    CheckpointError for a checkpoint that does not, Stopped when asked to stop and TrainingError when going on is
    of no use: the loss is no longer a number, or checkpoints cannot be stored.
    """
    check_run(model_config, config, data, world_size(), resume_from)
    node = local_world_size(world_size())
    layout = choose_layout(
        model_config, config, world_size(), memory_bytes=memory_per_worker(device, node), node_size=node
    ).on(device)
    torch.manual_seed(config.seed + layout.data_rank)  # else torch draws a seed for each process
    seq_len = config.seq_len or model_config.max_seq_len
    loader = Loader(
        TokenDataset(data, "train"),
        seq_len=seq_len,
        batch_size=config.batch_size,
        rank=layout.data_rank,
        world_size=layout.data_world,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        seed=config.seed,
    )
    validation = TokenDataset(data, "validation")
    tokenizer = Tokenizer.load(data)
    schedule = Schedule.of(config, loader.batches_per_epoch)

    tokens_per_step = loader.global_batch_size * seq_len
    compile_blocks, compiling = config.compile, ""
    if compile_blocks is None:
        flops = model_config.flops_per_token(seq_len) * tokens_per_step / world_size()
        compile_blocks, compiling = compile_pays(device, schedule.total_steps, flops)
    llama = Llama(model_config, device="meta")
    model = parallelize(llama, config, layout, device, compile_blocks=compile_blocks)
    optimizer = build_optimizer(model, config)
    stepper = Stepper(model, optimizer, config, device=device, layout=layout)
    progress = Progress(run_id=run_id)
    if resume_from is not None:
        progress = load_state(resume_from, llama, optimizer, rank(), world_size())
        loader.load_state_dict(progress.loader)
        if progress.scaler:
            stepper.scaler.load_state_dict(progress.scaler)
    skips = Skips(progress.skipped_steps, device)
    throughput = Throughput(
        model_config.flops_per_token(seq_len), peak_flops(device, config.precision), world_size()
    )

    def validate(step: int) -> None:
        limit = config.validation_batches or None
        batches = validation_batches(
            validation, seq_len, config.batch_size, layout.data_rank, layout.data_world, limit
        )
        loss = stepper.validate(batches)
        progress.validation_loss = loss
        metrics = {"validation/loss": loss, "validation/perplexity": perplexity(loss)}
        observer.validated(step, metrics, gather_model(model, config))

    checkpointer = Checkpointer(output_dir, llama, optimizer, tokenizer, config) if output_dir else None

    def checkpoint() -> None:
        if checkpointer is not None:
            progress.loader = loader.state_dict()
            progress.scaler = stepper.scaler.state_dict()
            progress.unsent = observer.unsent()
            checkpointer.save(progress)
            if checkpointer.failures_in_a_row >= MAX_FAILED_CHECKPOINTS:
                raise TrainingError(
                    f"{MAX_FAILED_CHECKPOINTS} checkpoints in a row could not be stored in {output_dir}; the last good "
                    "one is still there: make room or correct the permissions, and --resume"
                )

    def tell_saved() -> None:
        if checkpointer is not None:
            for saved in checkpointer.finished():
                observer.checkpointed(saved)

    def finish(step: int) -> None:
        if checkpointer is not None:
            checkpointer.wait()
            tell_saved()
            checkpointer.close()
            if checkpointer.failures_in_a_row:
                raise TrainingError(
                    f"the checkpoint of step {step} could not be stored in {output_dir}; make room or correct the "
                    "permissions, and --resume to go on from the one before"
                )

    agreement = Agreement(asked, config.collective_timeout_s)
    observer.started(schedule, progress, "; ".join(filter(None, (layout.reason, compiling))))
    throughput.resume()
    with profiled(config.profile_steps if rank() == 0 else 0, observer.profiled) as step_done:
        for step in range(progress.step + 1, schedule.total_steps + 1):
            rate = learning_rate(step, config, schedule)
            set_learning_rate(optimizer, rate)
            epoch = loader.epoch
            with out_of_memory_at(step):
                result = stepper.step(loader.next_global_batch())
            skips.count(result.skipped)
            progress.step = step
            progress.tokens += tokens_per_step
            throughput.count(tokens_per_step)

            logs = step % config.log_every == 0 or step in (1, schedule.total_steps)
            if logs or schedule.saves(step):
                progress.skipped_steps, in_a_row = skips.read()
                if in_a_row >= config.max_skipped_steps:
                    raise TrainingError(
                        f"{in_a_row} steps in a row up to step {step} had a loss or gradient that is not finite; lower "
                        f"learning_rate ({config.learning_rate}) or max_grad_norm ({config.max_grad_norm}), or use "
                        "precision bf16 or fp32, and --resume"
                    )
            if logs:
                tokens_per_s, mfu = throughput.read()
                observer.logged(
                    step,
                    {
                        "train/loss": result.loss.item(),
                        "train/learning_rate": rate,
                        "train/gradient_norm": result.grad_norm.item(),
                        "train/skipped_steps": progress.skipped_steps,
                        "throughput/tokens_per_s": tokens_per_s,
                        "throughput/mfu": mfu,
                        "memory/peak_bytes": peak_memory_bytes(device),
                        "progress/tokens": progress.tokens,
                        "progress/epoch": epoch,
                    },
                )
            if schedule.validates(step) or schedule.saves(step):
                if device.type == "cuda":
                    torch.cuda.synchronize(
                        device
                    )  # work still queued belongs to the steps, not to what follows
                throughput.pause()
                if schedule.validates(step):
                    validate(step)
                if schedule.saves(step):
                    checkpoint()
                throughput.resume()
            request = agreement.next_interrupt()
            if request and not schedule.saves(step):
                checkpoint()
            if request is Interrupt.STOP and step < schedule.total_steps:
                finish(step)
                raise Stopped(step)
            tell_saved()
            step_done()
    finish(progress.step)
    return progress
