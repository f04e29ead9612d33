"""Checks of a run that need no worker."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llama_ray.data.mixtures.loader import Loader
from llama_ray.data.mixtures.opening import common_tokenizer, open_mixture, read_infos
from llama_ray.data.mixtures.sources import DataSource
from llama_ray.data.mixtures.validation import validation_batches
from llama_ray.data.tokenizing.tokenizer import Tokenizer
from llama_ray.model.config import LlamaConfig
from llama_ray.model.stored_config import load_config
from llama_ray.training.adapter_base import check_base, check_same_adapters
from llama_ray.training.checkpointing.progress import Progress
from llama_ray.training.config import Schedule, TrainConfig
from llama_ray.training.initial_weights import check_initial_weights
from llama_ray.training.parallel.layout import choose_layout
from llama_ray.training.starting_point import StartingPoint
from llama_ray.training.task import for_data


def check_run(
    model: LlamaConfig,
    config: TrainConfig,
    sources: Sequence[DataSource],
    world_size: int,
    start: StartingPoint | None = None,
) -> Loader:
    """Raise ValueError if model, data, checkpoint and batch do not fit together: one line, with the way out.

    `start` is where the run goes on from. Returns the loader at the position from which the run goes on.
    """
    config = for_data(config, sources)
    seq_len = config.seq_len or model.max_seq_len
    if seq_len > model.max_seq_len:
        raise ValueError(
            f"seq_len is {seq_len}; it must be at most the model's max_seq_len {model.max_seq_len}; "
            "lower seq_len or raise max_seq_len"
        )
    layout = choose_layout(model, config, world_size)
    infos = read_infos(sources)
    tokenizer = common_tokenizer(sources, infos)
    if config.init_from is not None and start is None:
        check_initial_weights(model, config, tokenizer, str(sources[0]))
        if config.lora is not None:
            check_base(model, config)
    vocab_size = infos[sources[0].name].vocab_size
    if vocab_size > model.vocab_size:
        larger = "--resize_vocab" if config.init_from else f"--vocab_size {vocab_size} or more"
        raise ValueError(
            f"vocab_size is {model.vocab_size}; it must be at least {vocab_size} as in the tokenizer of {sources[0]}; "
            f"give {larger}, or prepare data with a smaller vocabulary"
        )
    loader = Loader(
        open_mixture(sources, "train"),
        seq_len=seq_len,
        batch_size=config.batch_size,
        rank=0,
        world_size=layout.data_world,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        seed=config.seed,
        stages=config.stages,
    )
    validation_batches(open_mixture(sources, "validation"), seq_len, config.batch_size)
    progress = Progress()
    if start is not None:
        _check_resume(model, tokenizer, sources, start.directory)
        check_same_adapters(config, start.directory)
        progress = start.progress()
        position = progress.loader
        if position is None or not loader.load_state_dict(position, allow_other_data=config.allow_other_data):
            loader.start_after(progress.step)
    schedule = Schedule.of(config, loader.timetable, loader.windows_per_epoch, progress.branched_at)
    check_steps(loader, schedule, config, sources)
    return loader


def check_steps(
    loader: Loader, schedule: Schedule, config: TrainConfig, sources: Sequence[DataSource]
) -> None:
    """Raise ValueError for steps that are too large for the data or the workers, and for too many repetitions."""
    done, last = loader.timetable.step, schedule.total_steps
    for stage in config.stages:
        if stage.from_step > last:
            raise ValueError(
                f"{stage} comes after the run, which has {last:,} steps; leave it out, or make the run longer"
            )
    for segment in loader.timetable.ahead(last):
        loader.sequences(segment)
        if segment.windows > loader.windows_per_epoch:
            raise ValueError(
                f"one step takes {segment.windows:,} samples from step {segment.from_step} on; the training split "
                f"holds {loader.windows_per_epoch:,}; lower batch_size, gradient_accumulation_steps or "
                "max_seq_len, or use more data"
            )
    epochs = loader.epochs_by_source(loader.timetable.position_after(max(last, done)))
    windows = loader.windows_by_source
    for source in sources:
        limit = config.max_repetitions if source.max_repetitions is None else source.max_repetitions
        if 0 < limit < epochs[source.name]:
            raise ValueError(
                f"max_repetitions is {limit:g}; up to step {last:,} the run goes {epochs[source.name]:.2f} times "
                f"through source {source.name} ({windows[source.name]:,} samples); raise it, lower the source's "
                "weight, shorten the run, or use more data"
            )


def _check_resume(
    model: LlamaConfig, tokenizer: Tokenizer, sources: Sequence[DataSource], resume_from: Path
) -> None:
    stored = load_config(resume_from)
    if stored != model:
        a, b = stored.to_dict(), model.to_dict()
        changed = ", ".join(f"{name} {a[name]} there, {b[name]} here" for name in a if a[name] != b[name])
        raise ValueError(
            f"{resume_from} holds a model of another shape ({changed}); resume with the same shape"
        )
    before = Tokenizer.load(resume_from).fingerprint
    if before != tokenizer.fingerprint:
        raise ValueError(
            f"{sources[0]} was made with another tokenizer ({tokenizer.fingerprint[:12]}) than "
            f"{resume_from} was trained with ({before[:12]}); prepare the data with --tokenizer {resume_from}"
        )
