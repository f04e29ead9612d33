"""A training run before its first step: layout, data, model, optimizer, and the checkpoint that it continues from."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from llama_ray.data.dataset.locations import load_tokenizer
from llama_ray.data.mixtures.loader import Loader
from llama_ray.data.mixtures.mixture import Mixture
from llama_ray.data.mixtures.opening import open_mixture
from llama_ray.data.mixtures.sources import DataSource
from llama_ray.model.adapter_files import adapter_texts
from llama_ray.model.config import LlamaConfig
from llama_ray.storage.attempts import Attempt, current
from llama_ray.training.adapter_base import read_base
from llama_ray.training.checkpointing.checkpointer import Checkpointer, NoCheckpointer
from llama_ray.training.checkpointing.progress import Progress
from llama_ray.training.checkpointing.state import load_state
from llama_ray.training.config import Schedule, TrainConfig
from llama_ray.training.elastic import for_layout
from llama_ray.training.hosts.interrupt import Interrupt, InterruptAgreement
from llama_ray.training.initial_weights import read_initial_weights
from llama_ray.training.optimizers.build import build_optimizer
from llama_ray.training.parallel.compilation import should_compile
from llama_ray.training.parallel.float8 import check_float8
from llama_ray.training.parallel.layout import Layout, choose_layout, memory_per_worker
from llama_ray.training.parallel.parallelize import parallelize, unallocated_model
from llama_ray.training.parallel.process_group import local_world_size, rank, world_size
from llama_ray.training.reporting.metrics import Throughput, peak_flops
from llama_ray.training.reporting.observer import Observer
from llama_ray.training.reporting.skipped_steps import SkippedSteps
from llama_ray.training.run import TrainingRun
from llama_ray.training.starting_point import StartingPoint
from llama_ray.training.step import Stepper
from llama_ray.training.task import check_references

PREFETCHED = 2
"""Global batches that are built while the model trains on another one."""


def prepare_run(
    model_config: LlamaConfig,
    config: TrainConfig,
    sources: Sequence[DataSource],
    *,
    device: torch.device,
    observer: Observer,
    output_dir: str | Attempt | None,
    start: StartingPoint | None,
    run_id: str | None,
    poll_interrupt: Callable[[], Interrupt],
) -> TrainingRun:
    """Build everything that a run needs, and fill it from the checkpoint `start`, or else from `config.init_from`.

    Every worker must call it; see `train`.
    """
    check_float8(config, device)
    check_references(config, sources)
    layout = _layout(model_config, config, device)
    config = for_layout(config, layout)
    # Without this, torch draws a random seed in each process.
    torch.manual_seed(config.seed + layout.data_rank)
    seq_len = config.seq_len or model_config.max_seq_len
    loader = _loader(config, sources, layout, seq_len)
    progress = Progress(run_id=run_id, parent=config.init_from)
    batch_change = ""
    resume_from = None if start is None else start.directory
    if start is not None:
        progress = start.progress(run_id)
        batch_change = _go_to(progress, loader, config)
    schedule = Schedule.of(config, loader.timetable, loader.windows_per_epoch, progress.branched_at)
    compile_blocks, compile_reason = _compilation(
        config,
        device,
        schedule.total_steps,
        _flops_per_step(model_config, config, loader, schedule.total_steps),
    )

    llama = unallocated_model(model_config, config)
    starts_at_random = resume_from is None and (config.init_from is None or config.lora is not None)
    model = parallelize(
        llama, config, layout, device, compile_blocks=compile_blocks, init_weights=starts_at_random
    )
    optimizer = build_optimizer(model, config)
    num_sources = len(sources) if len(sources) > 1 else 0
    stepper = Stepper(model, optimizer, config, device=device, layout=layout, num_sources=num_sources)
    adapter_files: dict[str, str] = {}
    if config.lora is not None:
        base = read_base(llama, config, resume_from)
        adapter_files = adapter_texts(config.lora, base.reference, base.weights_hash)
    elif resume_from is None and config.init_from is not None:
        read_initial_weights(llama, config.init_from)
    if resume_from is not None:
        load_state(resume_from, llama, optimizer, rank(), world_size())
        stepper.scaler.load_state_dict(progress.scaler)

    throughput = Throughput(peak_flops(device, config.precision), world_size())
    checkpointer: Checkpointer | NoCheckpointer = NoCheckpointer()
    if output_dir:
        attempt = current(output_dir) if isinstance(output_dir, str) else output_dir
        tokenizer = load_tokenizer(sources[0].location)
        checkpointer = Checkpointer(attempt, llama, optimizer, tokenizer, config, adapter_files)
    return TrainingRun(
        model_config=model_config,
        config=config,
        schedule=schedule,
        description="; ".join(filter(None, (layout.reason, compile_reason, batch_change))),
        seq_len=seq_len,
        loader=loader,
        validation=_mixture(config, sources, "validation"),
        stepper=stepper,
        progress=progress,
        skipped_steps=SkippedSteps(progress.skipped_steps, progress.skipped_in_a_row, device),
        throughput=throughput,
        checkpointer=checkpointer,
        interrupts=InterruptAgreement(poll_interrupt, config.collective_timeout_s),
        observer=observer,
    )


def _layout(model_config: LlamaConfig, config: TrainConfig, device: torch.device) -> Layout:
    workers = world_size()
    node = local_world_size(workers)
    memory = memory_per_worker(device, node)
    return choose_layout(model_config, config, workers, memory_bytes=memory, node_size=node).with_mesh(device)


def _mixture(config: TrainConfig, sources: Sequence[DataSource], split: str) -> Mixture:
    return open_mixture(sources, split, documents=config.document_mask, cache_bytes=config.data_cache_bytes)


def _loader(config: TrainConfig, sources: Sequence[DataSource], layout: Layout, seq_len: int) -> Loader:
    return Loader(
        _mixture(config, sources, "train"),
        seq_len=seq_len,
        batch_size=config.batch_size,
        rank=layout.data_rank,
        world_size=layout.data_world,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        seed=config.seed,
        stages=config.stages,
        prefetch=PREFETCHED,
    )


def _go_to(progress: Progress, loader: Loader, config: TrainConfig) -> str:
    """Continue at the position of `progress`; return a sentence if steps mean other samples than before."""
    before, step = progress.loader, progress.step
    if before is None or not loader.load_state_dict(before, allow_other_data=config.allow_other_data):
        loader.start_after(step)
        # What was measured on the data before tells nothing about these.
        progress.validation_loss = progress.validation_step = None
        return f"other data than up to step {step}: a first epoch of them begins"
    if before["sources"] != loader.state_dict()["sources"]:
        # A source that is new counts in the validation, too.
        progress.validation_loss = progress.validation_step = None
    now = loader.timetable.segment(max(step, 1)).windows
    if before["windows_per_step"] == now:
        return ""
    return (
        f"global batch of {now} sequences, {before['windows_per_step']} up to step {step}: it goes on after "
        f"{before['position']} sequences"
    )


def _flops_per_step(model_config: LlamaConfig, config: TrainConfig, loader: Loader, steps: int) -> float:
    """Return the operations of one worker in a step, on average over the `steps` of the run, see `flops_per_token`.

    Not those of the next step: a run that resumes in another stage must compile, or not, as it did before.
    """
    segments = loader.timetable.segments
    ends = [min(segment.from_step - 1, steps) for segment in segments[1:]] + [steps]
    return sum(
        max(end + 1 - segment.from_step, 0)
        * segment.sequences(loader.seq_len)
        * segment.seq_len
        * config.flops_per_token(model_config, segment.seq_len)
        for segment, end in zip(segments, ends, strict=True)
    ) / (steps * world_size())


def _compilation(
    config: TrainConfig, device: torch.device, steps: int, flops_per_step: float
) -> tuple[bool, str]:
    """Whether to compile the blocks, and why; no reason is given where the user has decided."""
    if config.compile is not None:
        return config.compile, ""
    return should_compile(device, steps, flops_per_step)
