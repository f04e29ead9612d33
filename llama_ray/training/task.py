"""What the data of a run must be for its task, and what they decide."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from llama_ray.data.dataset.locations import load_tokenizer, open_files
from llama_ray.data.dataset.references import REFERENCE_FILE, read_references
from llama_ray.data.mixtures.opening import read_infos
from llama_ray.data.mixtures.sources import DataSource
from llama_ray.training.config import TrainConfig


def for_data(config: TrainConfig, sources: Sequence[DataSource]) -> TrainConfig:
    """Return `config` with the length of sequences that the data decide: that of their rows, if they are rows.

    Raises ValueError for data that were prepared for another task, for sources with rows of several lengths or several
    chat templates, and for settings that would cut the examples in a row or let them see each other.
    """
    infos = read_infos(sources)
    for source in sources:
        if (prepared := infos[source.name].task) != config.task:
            way_out = f"give --task {prepared}, or data that prepare_data.py made with --task {config.task}"
            raise ValueError(f"task is {config.task}; {source} was prepared for task {prepared}; {way_out}")
    first = sources[0]
    row_tokens = infos[first.name].row_tokens
    if row_tokens is None:
        return config
    for source in sources[1:]:
        if (other := infos[source.name].row_tokens) != row_tokens:
            raise ValueError(
                f"source {source.name} ({source}) has rows of {other} tokens, source {first.name} ({first}) of "
                f"{row_tokens}; prepare them with the same --seq_len"
            )
        if _templates(source) != _templates(first):
            raise ValueError(
                f"source {source.name} ({source}) has another chat template than source {first.name} ({first}); "
                "prepare them with the same --tokenizer and --chat_template"
            )
    if config.seq_len not in (0, row_tokens):
        raise ValueError(
            f"seq_len is {config.seq_len}; it must be {row_tokens}, the length of the rows of {first}; leave it out, "
            f"or prepare the data again with --seq_len {config.seq_len}"
        )
    if not config.document_mask:
        raise ValueError(
            f"document_mask is false; with task {config.task} it must be true, because a row holds several examples"
        )
    for stage in config.stages:
        if stage.seq_len not in (None, row_tokens):
            raise ValueError(
                f"stages.seq_len is {stage.seq_len}; with task {config.task} it must be left out, because shorter "
                "sequences would cut examples"
            )
    return replace(config, seq_len=row_tokens)


def check_references(config: TrainConfig, sources: Sequence[DataSource]) -> None:
    """Raise ValueError for pairs without the log-probabilities of the reference model, or with those of several."""
    if config.task != "dpo":
        return
    found = {source.name: read_references(open_files(source.location)) for source in sources}
    for source in sources:
        reference, first = found[source.name], found[sources[0].name]
        if reference is None or first is None:
            raise ValueError(
                f"{source} holds no log-probabilities of a reference model; jobs/train.py --task dpo --init_from REF "
                "computes them for a new run, or llama_ray.batch_inference.references.ensure_references"
            )
        if reference.weights != first.weights:
            raise ValueError(
                f"{source} holds the log-probabilities of another reference than {sources[0]}: {reference.model}, not "
                f"{first.model}; delete {REFERENCE_FILE} there"
            )


def _templates(source: DataSource) -> object:
    template = load_tokenizer(source.location).chat_template
    return template and template.templates
