"""Text to a tokenised dataset, in parallel on Ray Data."""

from __future__ import annotations

import functools
import hashlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import ray
import ray.data

from llama_ray.data.dataset.info import SPLITS, DatasetInfo, SourceInfo, TokenizerInfo
from llama_ray.data.dataset.shards import (
    FORMAT_VERSION,
    DatasetError,
    Shard,
    open_shard,
    shard_name,
    token_bytes,
)
from llama_ray.data.preparing.corpus import Corpus, divide, find_corpus, sample
from llama_ray.data.preparing.output_directory import (
    check_output,
    exclusive,
    finished_dataset,
    publish,
    staging_directory,
)
from llama_ray.data.preparing.shard_task import ShardResult, make_group, write_group
from llama_ray.data.records.fields import TextFields
from llama_ray.data.records.pieces import Piece, read
from llama_ray.data.sources.files import SourceError
from llama_ray.data.sources.left_out import Tally
from llama_ray.data.tokenizing.tokenizer import Tokenizer, check_vocab_size
from llama_ray.storage.paths import is_uri
from llama_ray.utils.errors import printable
from llama_ray.utils.fields import check_fields, limits
from llama_ray.utils.ray_cluster import largest
from llama_ray.utils.redact import RedactedRepr

TOKENIZER_SAMPLE_BYTES = 100_000_000
"""A tokenizer is trained on at most this much text; more takes long and changes few merges."""

_GROUP_BYTES = 4 * 1024 * 1024
_MAX_GROUPS = 4096
_RULES = 2
"""Counts the changes of what is text, so that a dataset by older rules is not taken for one by these."""

Log = Callable[[str], None]


@dataclass(frozen=True, repr=False)
class PrepareConfig(RedactedRepr):
    """What to make a dataset from, and where to write it.

    Args:
        source: 'builtin' (source code of the standard library), a text or .jsonl file, a folder, a glob or a URI.
        output: Directory for the dataset, on storage that all nodes of the cluster share.
        vocab_size: Maximum vocabulary size of the tokenizer to train; unused with `tokenizer`.
        tokenizer: A tokenizer.json, or a directory that holds one, to use instead of training a tokenizer.
        validation_fraction: Fraction of the documents for the validation split; at least one document.
        seed: Decides which documents are for validation, and which ones `max_bytes` leaves out.
        max_bytes: Maximum bytes of text to use, from a pseudo-random choice of documents; by default all.
        overwrite: Replace a dataset in `output`.
    """

    source: str
    output: str
    vocab_size: int = field(default=32000, metadata=limits(1, Tokenizer.LARGEST_VOCABULARY))
    tokenizer: str | None = None
    validation_fraction: float = field(default=0.01, metadata=limits(above=0, below=1))
    seed: int = field(default=0, metadata=limits(0, 2**63 - 1))
    max_bytes: int | None = field(default=None, metadata=limits(1, 2**63 - 1))
    overwrite: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        if self.tokenizer is None:
            check_vocab_size(self.vocab_size)
        if is_uri(self.output):
            raise ValueError(f"output is {self.output!r}; give a directory on storage that all nodes share")
        if printable(self.output, limit=len(self.output)) != self.output:
            raise ValueError(f"output is '{printable(self.output)}'; it must be text in UTF-8 on one line")


def prepare(config: PrepareConfig, log: Log = print) -> DatasetInfo:
    """Make the dataset that `config` describes, unless it already exists.

    The result depends on the configuration and the text only, not on the number of workers. What is not text is left
    out; a line at the end counts and names it for each reason. If another process makes the same dataset, this one
    waits for it. Raises a ValueError (SourceError, TokenizerError, DatasetError) for anything that the user can
    correct; unfinished files are then removed.
    """
    output = Path(config.output)
    check_output(output)
    corpus = find_corpus(config.source, config.max_bytes, config.seed, output)
    given = None if config.tokenizer is None else Tokenizer.load(config.tokenizer).for_documents()
    fingerprint = _fingerprint(config, corpus, given)
    found = finished_dataset(output, fingerprint, config.overwrite)
    if found is None:
        with exclusive(output, log):
            found = finished_dataset(output, fingerprint, config.overwrite)
            if found is None:
                return _make(config, corpus, given, fingerprint, log)
    log(f"{output} already holds this dataset ({found.tokens('train'):,} training tokens); nothing to do")
    return found


def _make(
    config: PrepareConfig, corpus: Corpus, given: Tokenizer | None, fingerprint: str, log: Log
) -> DatasetInfo:
    started = time.monotonic()
    output = Path(config.output)
    log(f"{len(corpus.documents):,} documents, {corpus.size / 1e6:.1f} MB from {printable(config.source)}")
    left_out = Tally()
    left_out.merge(corpus.left_out)
    for line in left_out.lines():
        log(line)
    _check_cpus(log)
    documents = divide(corpus, config.validation_fraction, config.seed)
    with staging_directory(output) as staging:
        tokenizer = given or _train_tokenizer(documents["train"], config, log)
        tokenizer.save(staging)
        location = printable(config.source, limit=4096)
        source = SourceInfo(name=location, location=location)
        shards, source = _write_shards(documents, tokenizer, staging, source, left_out, log)
        info = DatasetInfo(
            fingerprint=fingerprint,
            seed=config.seed,
            token_bytes=token_bytes(tokenizer.vocab_size),
            tokenizer=TokenizerInfo(
                fingerprint=tokenizer.fingerprint,
                vocab_size=tokenizer.vocab_size,
                bos_id=tokenizer.bos_id,
                eos_id=tokenizer.eos_id,
            ),
            sources=(source,),
            splits=_by_split(shards),
        )
        info = publish(staging, output, info)
    log(
        f"took {info.documents('train'):,} texts for training and {info.documents('validation'):,} for validation"
    )
    for line in left_out.lines():
        log(line)
    log(
        f"{output}: {info.tokens('train'):,} training and {info.tokens('validation'):,} validation tokens, "
        f"vocabulary {info.vocab_size:,}, {time.monotonic() - started:.0f} s"
    )
    return info


def _fingerprint(config: PrepareConfig, corpus: Corpus, tokenizer: Tokenizer | None) -> str:
    settings = asdict(config)
    # The same files under another path are the same corpus.
    del settings["source"], settings["output"], settings["overwrite"]
    if tokenizer is not None:
        del settings["vocab_size"]
        settings["tokenizer"] = (tokenizer.fingerprint, tokenizer.bos_id, tokenizer.eos_id)
    content = json.dumps([FORMAT_VERSION, _RULES, settings, corpus.fingerprint], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def _train_tokenizer(documents: list[Piece], config: PrepareConfig, log: Log) -> Tokenizer:
    chosen = sample(documents, TOKENIZER_SAMPLE_BYTES, config.seed + 2)
    size = sum(document.size for document in chosen) / 1e6
    log(f"training a tokenizer of {config.vocab_size:,} entries on {size:.1f} MB")
    started = time.monotonic()
    # What is not text is counted when it is tokenised.
    texts = (text.text for document in chosen for text in read(document, TextFields(), lambda piece: None))
    tokenizer = Tokenizer.train(texts, config.vocab_size)
    fewer = "" if tokenizer.vocab_size == config.vocab_size else "; the text gives no more"
    log(f"tokenizer: {tokenizer.vocab_size:,} entries in {time.monotonic() - started:.1f} s{fewer}")
    return tokenizer


def _write_shards(
    documents: dict[str, list[Piece]],
    tokenizer: Tokenizer,
    directory: Path,
    source: SourceInfo,
    left_out: Tally,
    log: Log,
) -> tuple[dict[str, Shard], SourceInfo]:
    """Write a shard for each group of documents, in a task of its own, so shards are the same on any cluster.

    Returns the shards by name, and `source` with what it gave. Adds to `left_out` what the tasks leave out.
    """
    total = sum(document.size for split in SPLITS for document in documents[split])
    groups = list(_groups(documents, max(_GROUP_BYTES, total // _MAX_GROUPS)))
    write = functools.partial(
        write_group,
        directory=str(directory),
        tokenizer_fingerprint=tokenizer.fingerprint,
        source=source.name,
    )
    # The lines that we log are easier to read in a job's log.
    ray.data.DataContext.get_current().enable_progress_bars = False
    rows = ray.data.from_items(groups, override_num_blocks=len(groups)).map(write).iter_rows()
    started = time.monotonic()
    shards: dict[str, Shard] = {}
    size = tokens = 0
    for done, result in enumerate((ShardResult(**row) for row in rows), start=1):
        shard = _checked_shard(result, directory)
        if shard is not None:
            shards[shard.file] = shard
            tokens += shard.tokens
            texts = source.texts + shard.documents
            source = replace(source, texts=texts, text_bytes=source.text_bytes + result.text_bytes)
        size += result.bytes
        left_out.merge(Tally.from_json(result.left_out))
        log(
            f"tokenised {done} of {len(groups)} shards, {size / 1e6:.1f} of {total / 1e6:.1f} MB, "
            f"{tokens:,} tokens, {time.monotonic() - started:.0f} s"
        )
    return shards, source


def _groups(documents: dict[str, list[Piece]], size: int) -> Iterator[dict[str, str]]:
    """Yield groups of consecutive documents of the same split, each of at least `size` bytes but the last."""
    for split in SPLITS:
        group: list[Piece] = []
        index = filled = 0
        for document in documents[split]:
            group.append(document)
            filled += document.size
            if filled >= size:
                yield make_group(shard_name(split, index), group)
                group, filled, index = [], 0, index + 1
        if group:
            yield make_group(shard_name(split, index), group)


def _checked_shard(result: ShardResult, directory: Path) -> Shard | None:
    if result.error:
        raise SourceError(result.error)
    described = json.loads(result.shard)
    if described is None:
        return None
    try:
        open_shard(directory / result.file)
    except DatasetError as error:
        raise DatasetError(
            f"a shard that a worker wrote cannot be read here ({error}); give an --output on storage that all nodes "
            "share"
        ) from error
    return Shard(**described)


def _by_split(shards: dict[str, Shard]) -> dict[str, tuple[Shard, ...]]:
    return {
        split: tuple(shards[name] for name in sorted(shards) if name.startswith(split)) for split in SPLITS
    }


def _check_cpus(log: Log) -> None:
    """Raise ValueError if the cluster has no CPU and can add none: tasks would wait for one without a word."""
    if not ray.is_initialized():
        ray.init(log_to_driver=False)
    cpus = largest("CPU")
    if cpus < 1:
        raise ValueError(f"this cluster has {cpus:g} CPUs; preparing data needs 1; add a node with CPUs")
    free = ray.available_resources()  # type: ignore[no-untyped-call]
    if free.get("CPU", 0) < 1:
        log("all CPUs of the cluster are in use; waiting for one")
