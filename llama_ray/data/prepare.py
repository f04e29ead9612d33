"""Text to a tokenised dataset, in parallel on Ray Data."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray.data

from llama_ray.data.shards import (
    FORMAT_VERSION,
    INFO_FILE,
    SPLITS,
    DatasetError,
    DatasetInfo,
    Shard,
    Tokens,
    open_shard,
    read_info,
    shard_name,
    token_bytes,
    write_info,
    write_shard,
)
from llama_ray.data.sources import Corpus, Document, NotUTF8Error, SourceError, find, read, sample
from llama_ray.data.tokenizer import CONFIG_FILE, TOKENIZER_FILE, Tokenizer
from llama_ray.storage.paths import is_uri

TOKENIZER_SAMPLE_BYTES = 100_000_000
"""A tokenizer is trained on at most this much text: more changes few merges and takes long."""

_GROUP_BYTES = 4 * 1024 * 1024
_MAX_GROUPS = 4096
_PARTIAL = ".partial"


@dataclass(frozen=True)
class PrepareConfig:
    """What to make a dataset from, and where.

    Args:
        source: 'builtin' (source code of the standard library), a text or .jsonl file, a folder, a glob or a URI.
        output: Directory for the dataset, on storage that all nodes of the cluster share.
        vocab_size: Most entries that a tokenizer trained on the text may have; unused with `tokenizer`.
        tokenizer: A tokenizer.json, or a directory that holds one, to use instead of training one.
        validation_fraction: Share of the documents that goes to the validation split, at least one document.
        seed: Decides which documents are for validation, and which ones `max_bytes` leaves out.
        max_bytes: Use at most this many bytes of text, a random choice of documents; by default all.
        overwrite: Replace a dataset that `output` already holds.
    """

    source: str
    output: str
    vocab_size: int = 32000
    tokenizer: str | None = None
    validation_fraction: float = 0.01
    seed: int = 0
    max_bytes: int | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.validation_fraction < 1:
            raise ValueError(f"validation_fraction is {self.validation_fraction}, must lie between 0 and 1")
        if self.tokenizer is None and self.vocab_size < Tokenizer.SMALLEST_VOCABULARY:
            raise ValueError(
                f"vocab_size is {self.vocab_size}, must be at least {Tokenizer.SMALLEST_VOCABULARY} "
                "(256 bytes and 2 special tokens)"
            )
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}, must not be negative")
        if self.max_bytes is not None and self.max_bytes < 1:
            raise ValueError(f"max_bytes is {self.max_bytes}, must be at least 1")
        if is_uri(self.output):
            raise ValueError(f"output is {self.output!r}: give a directory on storage that all nodes share")


def prepare(config: PrepareConfig, log: Callable[[str], None] = print) -> DatasetInfo:
    """Makes the dataset that ``config`` describes, or finds that it is already there.

    The result depends on the configuration and the text alone, not on the number of workers. Documents that
    are not UTF-8 are skipped and counted (an error where the source is one file). Raises a ValueError
    (SourceError, TokenizerError, DatasetError) for anything the user can mend; what it began to write is
    removed then.
    """
    started = time.monotonic()
    output = Path(config.output)
    corpus = find(config.source, config.max_bytes, config.seed)
    given = None if config.tokenizer is None else _given_tokenizer(config.tokenizer)
    fingerprint = _fingerprint(config, corpus, given)
    found = _existing(output, fingerprint, config.overwrite)
    if found is not None:
        log(f"{output} already holds this dataset ({found.tokens('train'):,} training tokens): nothing to do")
        return found
    documents = _split(corpus, config.validation_fraction, config.seed)
    log(f"{len(corpus.documents):,} documents, {corpus.size / 1e6:.1f} MB from {config.source}")

    partial = output / _PARTIAL
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise DatasetError(f"cannot write to {output} ({error.strerror}): choose another output") from error
    try:
        tokenizer = given or _train_tokenizer(documents["train"], config, log)
        tokenizer.save(partial)
        splits = _tokenise(documents, tokenizer, partial, not corpus.single_file, log)
        info = DatasetInfo(
            source=config.source,
            seed=config.seed,
            fingerprint=fingerprint,
            vocab_size=tokenizer.vocab_size,
            tokenizer_fingerprint=tokenizer.fingerprint,
            token_bytes=token_bytes(tokenizer.vocab_size),
            splits=splits,
        )
        _publish(partial, output, info)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    log(
        f"{output}: {info.tokens('train'):,} training and {info.tokens('validation'):,} validation tokens, "
        f"vocabulary {info.vocab_size:,}, {time.monotonic() - started:.0f} s"
    )
    return info


def _given_tokenizer(path: str) -> Tokenizer:
    tokenizer = Tokenizer.load(path)
    tokenizer.encode("", bos=True, eos=True)  # documents need both: say now that one is missing
    return tokenizer


def _fingerprint(config: PrepareConfig, corpus: Corpus, tokenizer: Tokenizer | None) -> str:
    settings = asdict(config)
    # the same files under another path are the same corpus
    del settings["source"], settings["output"], settings["overwrite"]
    if tokenizer is not None:
        del settings["vocab_size"]
        settings["tokenizer"] = (tokenizer.fingerprint, tokenizer.bos_id, tokenizer.eos_id)
    content = json.dumps([FORMAT_VERSION, settings, corpus.fingerprint], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def _existing(output: Path, fingerprint: str, overwrite: bool) -> DatasetInfo | None:
    """The finished dataset in ``output`` if it is the one asked for; else makes sure that ``output`` may be used."""
    if not output.exists():
        return None
    if not output.is_dir():
        raise DatasetError(f"output {output} is a file: give a directory")
    foreign = next((path.name for path in output.iterdir() if not _ours(path.name)), None)
    if foreign is not None:
        raise DatasetError(f"output {output} holds other files ({foreign}): choose an empty or new directory")
    if not (output / INFO_FILE).exists():
        shutil.rmtree(output / _PARTIAL, ignore_errors=True)  # of a run that was killed
        return None
    if not overwrite:
        info = read_info(output)
        if info.fingerprint == fingerprint:
            return info
        raise DatasetError(
            f"{output} holds a dataset made from other text or settings: choose another --output, or give "
            "--overwrite to replace it"
        )
    return None


def _ours(name: str) -> bool:
    return name in (INFO_FILE, TOKENIZER_FILE, CONFIG_FILE, _PARTIAL) or (
        name.endswith(".bin") and name.startswith(tuple(f"{split}-" for split in SPLITS))
    )


def _split(corpus: Corpus, fraction: float, seed: int) -> dict[str, list[Document]]:
    """Train and validation documents, by a hash of each, with at least one on both sides."""
    if len(corpus.documents) < 2:
        raise SourceError(
            f"{corpus.source!r} has 1 document, but training and validation need one each: give more text "
            "(a file is cut into documents of 256 KiB, a .jsonl file by line)"
        )
    # another seed than the bare one: with max_bytes the chosen documents are those with the smallest draws
    draws = [document.draw(seed + 1) for document in corpus.documents]
    limit = min(max(fraction, min(draws)), sorted(draws)[-2])
    return {
        "train": [document for document, draw in zip(corpus.documents, draws, strict=True) if draw > limit],
        "validation": [
            document for document, draw in zip(corpus.documents, draws, strict=True) if draw <= limit
        ],
    }


def _train_tokenizer(
    documents: list[Document], config: PrepareConfig, log: Callable[[str], None]
) -> Tokenizer:
    chosen = sample(documents, TOKENIZER_SAMPLE_BYTES, config.seed + 2)
    size = sum(document.size for document in chosen) / 1e6
    log(f"training a tokenizer of {config.vocab_size:,} entries on {size:.1f} MB")
    started = time.monotonic()

    def texts() -> Iterator[str]:
        for document in chosen:
            try:
                yield from read(document)
            except NotUTF8Error:
                continue  # reported when it is tokenised

    tokenizer = Tokenizer.train(texts(), config.vocab_size)
    fewer = "" if tokenizer.vocab_size == config.vocab_size else ": the text gives no more"
    log(f"tokenizer: {tokenizer.vocab_size:,} entries in {time.monotonic() - started:.1f} s{fewer}")
    return tokenizer


def _tokenise(
    documents: dict[str, list[Document]],
    tokenizer: Tokenizer,
    directory: Path,
    skip_not_utf8: bool,
    log: Callable[[str], None],
) -> dict[str, tuple[Shard, ...]]:
    """One task and one shard for each group of documents, so the shards are the same on any cluster."""
    size = sum(document.size for part in documents.values() for document in part)
    groups = [
        {"file": shard_name(split, index), "documents": json.dumps(group)}
        for split in SPLITS
        for index, group in enumerate(_groups(documents[split], max(_GROUP_BYTES, size // _MAX_GROUPS)))
    ]
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # our own lines read better in a job's log
    write = functools.partial(
        _write_group,
        directory=str(directory),
        tokenizer_fingerprint=tokenizer.fingerprint,
        skip_not_utf8=skip_not_utf8,
    )
    rows = ray.data.from_items(groups, override_num_blocks=len(groups)).map(write).iter_rows()

    started = time.monotonic()
    shards: dict[str, Shard] = {}
    done = tokens = skipped = 0
    for row in rows:
        if row["error"]:
            raise SourceError(row["error"])
        shard = Shard(row["file"], row["tokens"], row["documents"])
        try:
            open_shard(directory / shard.file)
        except DatasetError as error:
            raise DatasetError(
                f"a worker's shard is not here; output must be on shared storage ({error})"
            ) from error
        shards[shard.file] = shard
        done += row["bytes"]
        tokens += shard.tokens
        skipped += row["skipped"]
        seconds = time.monotonic() - started
        log(
            f"tokenised {len(shards)} of {len(groups)} shards, {done / 1e6:.1f} of {size / 1e6:.1f} MB, "
            f"{tokens:,} tokens, {seconds:.0f} s"
        )
    if skipped:
        log(f"skipped {skipped:,} documents that are not UTF-8")
    splits = {
        split: tuple(shards[name] for name in sorted(shards) if name.startswith(split)) for split in SPLITS
    }
    for split, parts in splits.items():
        if not sum(shard.tokens for shard in parts):
            raise SourceError(f"no readable document is left for the {split} split: give more text in UTF-8")
    return splits


def _groups(documents: list[Document], size: int) -> Iterator[list[Document]]:
    """Consecutive documents of about ``size`` bytes together."""
    group: list[Document] = []
    filled = 0
    for document in documents:
        group.append(document)
        filled += document.size
        if filled >= size:
            yield group
            group, filled = [], 0
    if group:
        yield group


def _write_group(
    group: dict[str, str], directory: str, tokenizer_fingerprint: str, skip_not_utf8: bool
) -> dict[str, Any]:
    """Tokenises one group into its shard; runs in a Ray worker.

    An error that the user can mend comes back as a value: Ray would wrap it into a page of traceback.
    """
    # a task has one CPU; the tokenizer would start a thread for each of the machine
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = _loaded_tokenizer(directory, tokenizer_fingerprint)
    result: dict[str, Any] = {
        "file": group["file"],
        "tokens": 0,
        "documents": 0,
        "bytes": 0,
        "skipped": 0,
        "error": "",
    }

    def pieces() -> Iterator[Tokens]:
        for document in (Document(*fields) for fields in json.loads(group["documents"])):
            result["bytes"] += document.size
            try:
                texts = list(read(document))
            except NotUTF8Error:
                if not skip_not_utf8:
                    raise
                result["skipped"] += 1
                continue
            for text in texts:
                result["documents"] += 1
                yield np.array(tokenizer.encode(text, bos=True, eos=True), dtype=np.uint32)

    try:
        path = Path(directory, group["file"])
        result["tokens"] = write_shard(path, pieces(), token_bytes(tokenizer.vocab_size))
    except ValueError as error:
        result["error"] = str(error)
    except OSError as error:
        result["error"] = f"cannot write to {directory} on a worker: {error}"
    return result


@functools.lru_cache(maxsize=1)
def _loaded_tokenizer(directory: str, fingerprint: str) -> Tokenizer:
    tokenizer = Tokenizer.load(directory)
    if tokenizer.fingerprint != fingerprint:
        raise DatasetError(
            f"{directory} holds another tokenizer on a worker: output must be on shared storage"
        )
    return tokenizer


def _publish(partial: Path, output: Path, info: DatasetInfo) -> None:
    """Moves the finished files to their place, ``dataset.json`` last."""
    (output / INFO_FILE).unlink(missing_ok=True)
    files = {path.name for path in partial.iterdir()}
    for old in output.glob("*.bin"):
        if old.name not in files:
            old.unlink()
    for name in sorted(files):
        (partial / name).replace(output / name)
    write_info(output, info)
