"""Checks of a run that need no worker."""

from __future__ import annotations

from pathlib import Path

from llama_ray.data.dataset.locations import dataset_info, load_tokenizer
from llama_ray.data.dataset.shards import DatasetError
from llama_ray.data.dataset.token_dataset import TokenDataset
from llama_ray.data.mixtures.loader import Loader
from llama_ray.data.mixtures.mixture import Mixture
from llama_ray.data.mixtures.validation import validation_batches
from llama_ray.data.tokenizing.tokenizer import Tokenizer
from llama_ray.model.checkpoint import load_config
from llama_ray.model.config import LlamaConfig
from llama_ray.training.checkpointing.progress import load_progress
from llama_ray.training.config import Schedule, TrainConfig
from llama_ray.training.parallel.layout import choose_layout


def check_run(
    model: LlamaConfig,
    config: TrainConfig,
    data: str | Path,
    world_size: int,
    resume_from: Path | None = None,
) -> None:
    """Raise ValueError if model, data, checkpoint and batch do not fit together: one line, with the way out."""
    seq_len = config.seq_len or model.max_seq_len
    if seq_len > model.max_seq_len:
        raise ValueError(
            f"seq_len is {seq_len}; it must be at most the model's max_seq_len {model.max_seq_len}; "
            "lower seq_len or raise max_seq_len"
        )
    layout = choose_layout(model, config, world_size)
    info = dataset_info(str(data))
    tokenizer = load_tokenizer(str(data))
    if tokenizer.fingerprint != info.tokenizer.fingerprint:
        raise DatasetError(
            f"{data} was tokenised with another tokenizer than the tokenizer.json in it; prepare the data again"
        )
    if info.vocab_size > model.vocab_size:
        raise ValueError(
            f"vocab_size is {model.vocab_size}; it must be at least {info.vocab_size} as in the tokenizer of {data}; "
            f"give --vocab_size {info.vocab_size} or more, or prepare data with a smaller vocabulary"
        )
    loader = Loader(
        Mixture.of(TokenDataset(data, "train")),
        seq_len=seq_len,
        batch_size=config.batch_size,
        rank=0,
        world_size=layout.data_world,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        seed=config.seed,
        stages=config.stages,
    )
    validation_batches(Mixture.of(TokenDataset(data, "validation")), seq_len, config.batch_size)
    if resume_from is not None:
        _check_resume(model, tokenizer, data, resume_from)
        progress = load_progress(resume_from)
        position = progress.loader
        if position is None or not loader.load_state_dict(position, allow_other_data=config.allow_other_data):
            loader.start_after(progress.step)
    check_steps(loader, Schedule.of(config, loader.timetable, loader.windows_per_epoch), config)


def check_steps(loader: Loader, schedule: Schedule, config: TrainConfig) -> None:
    """Raise ValueError for steps that are too large for the data or the workers, and for too many repetitions."""
    first = loader.timetable.step + 1
    for number, segment in enumerate(loader.timetable.segments):
        following = loader.timetable.segments[number + 1 : number + 2]
        if segment.from_step > schedule.total_steps or any(s.from_step <= first for s in following):
            continue
        loader.sequences(segment)
        if segment.windows > loader.windows_per_epoch:
            raise ValueError(
                f"one step takes {segment.windows:,} samples from step {segment.from_step} on; the training split "
                f"holds {loader.windows_per_epoch:,}; lower batch_size, gradient_accumulation_steps or "
                "max_seq_len, or use more data"
            )
    position = loader.timetable.position_after(max(schedule.total_steps, first - 1))
    for name, epochs in loader.epochs_by_source(position).items():
        if 0 < config.max_repetitions < epochs:
            raise ValueError(
                f"max_repetitions is {config.max_repetitions:g}; the run of {schedule.total_steps:,} steps goes "
                f"{epochs:.2f} times through source {name}; raise it, lower the source's weight, "
                "shorten the run, or use more data"
            )


def _check_resume(model: LlamaConfig, tokenizer: Tokenizer, data: str | Path, resume_from: Path) -> None:
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
            f"{data} was made with another tokenizer ({tokenizer.fingerprint[:12]}) than "
            f"{resume_from} was trained with ({before[:12]}); prepare the data with --tokenizer {resume_from}"
        )
