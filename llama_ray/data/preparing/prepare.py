"""Text to a tokenised dataset, in parallel on Ray Data."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from llama_ray.data.cleaning.language import check_languages
from llama_ray.data.dataset.info import DatasetInfo
from llama_ray.data.dataset.shards import FORMAT_VERSION
from llama_ray.data.preparing.config import PrepareConfig
from llama_ray.data.preparing.corpus import Corpus, find_corpus
from llama_ray.data.preparing.making import make_dataset
from llama_ray.data.preparing.output_directory import (
    check_output,
    exclusive,
    finish_publishing,
    finished_dataset,
    is_complete,
    staging_directory,
)
from llama_ray.data.preparing.progress import Log, duration
from llama_ray.data.preparing.ray_tasks import check_cpus, start_ray
from llama_ray.data.preparing.tokenizers import GivenTokenizers
from llama_ray.data.sources.files import SourceError
from llama_ray.utils.errors import printable

_RULES = 3
"""Counts the changes of what is text, so that a dataset by older rules is not taken for one by these."""


def prepare(config: PrepareConfig, log: Log = print, connect: Callable[[], None] = start_ray) -> DatasetInfo:
    """Make the dataset that `config` describes, unless it already exists.

    The result depends on the configuration and the text only, not on the number of workers. What is not text is left
    out; a line at the end counts and names it for each reason. If another process makes the same dataset, this one
    waits for it. A preparation that is killed goes on where it was when it is started again. Raises a ValueError
    (SourceError, TokenizerError, DatasetError) for anything that the user can correct. `connect` is called when a
    cluster is needed, if there is none yet: what is wrong with the sources or the output is known before.
    """
    output = Path(config.output)
    check_output(output)
    check_languages(config.cleaning.language)
    corpus = find_corpus(config.sources(), config.fields(), config.max_bytes, config.seed, output)
    given = GivenTokenizers.load(config)
    fingerprint = _fingerprint(config, corpus, given)
    found = finished_dataset(output, fingerprint, config.overwrite)
    if found is None:
        with exclusive(output, log):
            found = finished_dataset(output, fingerprint, config.overwrite)
            if found is None:
                return _make(config, corpus, given, fingerprint, log, connect)
    log(f"{output} already holds this dataset ({found.tokens('train'):,} training tokens); nothing to do")
    return found


def _make(
    config: PrepareConfig,
    corpus: Corpus,
    given: GivenTokenizers,
    fingerprint: str,
    log: Log,
    connect: Callable[[], None],
) -> DatasetInfo:
    started = time.monotonic()
    output = Path(config.output)
    for source in corpus.sources:
        log(
            f"{source.source.name}: {source.files:,} file{'' if source.files == 1 else 's'}, "
            f"{source.size / 1e6:,.1f} MB from {printable(source.source.where)}"
        )
        for line in source.left_out.lines():
            log(line)
    check_cpus(log, connect)
    with staging_directory(output, fingerprint, log) as staging:
        if is_complete(staging):
            info = finish_publishing(staging, output)
        else:
            info = make_dataset(config, corpus, given, fingerprint, staging, log)
    log(
        f"{output}: {info.tokens('train'):,} training and {info.tokens('validation'):,} validation tokens, "
        f"vocabulary {info.vocab_size:,}, {duration(time.monotonic() - started)}"
    )
    return info


def _fingerprint(config: PrepareConfig, corpus: Corpus, given: GivenTokenizers) -> str:
    settings = asdict(config)
    # The same files under another path are the same corpus, and these settings do not change what is made of it.
    for name in ("source", "output", "overwrite", "workers", "max_bad_records"):
        del settings[name]
    # The template is part of the tokenizer.
    del settings["conversations"]["chat_template"]
    if given.tokenizer is not None:
        del settings["vocab_size"], settings["training"]
    settings["tokenizer"], settings["compare_tokenizer"] = given.identities()
    settings["cleaning"]["decontaminate"] = [_digest(file) for file in config.cleaning.decontaminate]
    content = json.dumps([FORMAT_VERSION, _RULES, settings, corpus.fingerprint], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def _digest(file: str) -> str:
    try:
        return hashlib.sha256(Path(file).read_bytes()).hexdigest()
    except OSError as error:
        raise SourceError(
            f"decontaminate names {printable(file)}, which cannot be read: {error.strerror}"
        ) from error
