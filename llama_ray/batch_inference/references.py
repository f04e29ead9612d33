"""The log-probabilities of a reference model for preference tuning, computed by a batch job and kept with the data."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import pairwise

import numpy as np

from llama_ray.batch_inference.config import BatchConfig, BatchError
from llama_ray.batch_inference.job import BatchJob, Log
from llama_ray.data.dataset.files import DatasetFiles, Place
from llama_ray.data.dataset.info import SPLITS
from llama_ray.data.dataset.locations import open_files
from llama_ray.data.dataset.references import REFERENCE_FILE, read_references, write_references
from llama_ray.generation.sampling.params import SamplingParams
from llama_ray.model.weights_hash import weights_hash
from llama_ray.pretrained import open_pretrained
from llama_ray.storage import store

_WORK = "reference-work-"
"""How the names of files begin that are there only until all answers are."""


def ensure_references(locations: Sequence[str], model: str, log: Log) -> None:
    """Let each dataset of pairs at `locations` have the log-probabilities of `model`; needs a Ray connection.

    What is there is used again. Raises BatchError where it belongs to other weights, and what `BatchJob` raises. Killed
    and started again, nothing that was answered is computed twice.
    """
    with ExitStack() as stack:
        weights = weights_hash(open_pretrained(model, stack, check_weights=False))
    for location in locations:
        files = open_files(location)
        found = read_references(files)
        if found is None:
            _compute(files, model, weights, log)
        elif found.weights != weights:
            raise BatchError(
                f"{location} holds the log-probabilities of another reference, {found.model}; init_from must be that "
                f"one; to tune {model}, delete {REFERENCE_FILE} there, or prepare the pairs in another directory"
            )


def _compute(files: DatasetFiles, model: str, weights: str, log: Log) -> None:
    # Answers of another model may lie there, of a job that was cut off.
    requests, answers = (
        store.join(files.location, f"{_WORK}{name}.jsonl") for name in ("requests", weights[:16])
    )
    with store.replacing(requests) as stream:
        for split, shard, ids, learned in _documents(files):
            # What is before the first learned token is not reported.
            report = {"prompt_logprobs_start": int(learned.argmax())}
            row = {"split": split, "shard": shard, "token_ids": ids.tolist(), "sampling_params": report}
            stream.write(json.dumps(row).encode() + b"\n")
    params = SamplingParams(max_tokens=0, prompt_logprobs=0)
    config = BatchConfig(checkpoint=model, input=requests, output=answers, params=params, seed=0)
    log(f"log-probabilities of the reference {model} for {files.location}")
    BatchJob(config).run(log, lambda line: None)
    write_references(files, weights, model, _sums(files, answers))
    for name in store.list_files(files.location):
        if name.startswith(_WORK):
            store.delete(store.join(files.location, name))


def _documents(files: DatasetFiles) -> Iterator[tuple[str, int, np.ndarray, np.ndarray]]:
    """Yield split, shard, the token ids and which are learned of each document, up to its last learned token."""
    for split in SPLITS:
        for number, shard in enumerate(files.info.splits[split]):
            borders = [*files.starts(split, number).tolist(), shard.tokens]
            for start, stop in pairwise(borders):
                [span] = files.read(split, [Place(number, start, stop)])
                assert span.learned is not None
                end = int(np.flatnonzero(span.learned)[-1]) + 1
                yield split, number, span.tokens[:end], span.learned[:end]


def _sums(files: DatasetFiles, answers: str) -> dict[str, list[list[float]]]:
    """Return the log-probability of what is learned of each document, by split and shard."""
    sums: dict[str, list[list[float]]] = {split: [[] for _ in files.info.splits[split]] for split in SPLITS}
    filesystem, path = store.open_storage(answers)
    with filesystem.open_input_stream(path) as stream:
        # One by one: those of many pairs are too large for memory.
        lines = (json.loads(line) for line in io.BufferedReader(stream))
        for (split, shard, ids, learned), answer in zip(_documents(files), lines, strict=True):
            if "error" in answer:
                raise BatchError(f"an answer in {files.location} cannot be scored: {answer['error']}")
            entries = answer["completions"][0]["prompt_logprobs"]
            reported = learned[len(ids) - len(entries) :]
            sums[split][shard].append(
                sum(entry["logprob"] for entry, counts in zip(entries, reported, strict=True) if counts)
            )
    return sums
