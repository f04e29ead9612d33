"""One batch job from its checks to the finished file. Killed and started again, it loses nothing.

Ray Data carries partitions to a pool of actors with one engine each. Its own reading and writing are not used: a file
that Ray Data writes holds whatever rows came together, in no order and under a name that changes with a restart, and
its checkpoints list rows in one place and data in another. Here a partition depends only on the input, and one rename
commits its answers.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from llama_ray.batch_inference.config import BatchConfig, BatchError, checkpoint_fingerprint
from llama_ray.batch_inference.output import JobRecord, Output
from llama_ray.batch_inference.partition_file import Counts, finished_files
from llama_ray.batch_inference.partitions import Partition, partition_input
from llama_ray.batch_inference.pool import PoolSize, answer_partitions
from llama_ray.batch_inference.replica import ReplicaConfig
from llama_ray.orchestration.resources import nodes
from llama_ray.pretrained import fixed, resolve
from llama_ray.storage.paths import is_model_ref
from llama_ray.tracking.environment import open_variables, secret_variables
from llama_ray.utils.integers import ceil_div
from llama_ray.utils.redact import redact

Log = Callable[[str], None]


class BatchJob:
    """A job whose input and output have been examined: it is new, partly done, or `finished`.

    Needs no Ray connection until `run`. Raises a ValueError (BatchError, StorageError, SourceError, CheckpointError)
    for anything that the user can mend.
    """

    def __init__(self, config: BatchConfig) -> None:
        self.config = config
        ref = config.checkpoint
        # An alias may move while the job runs, or before it is started again.
        self._ref = fixed(ref)
        self._adapters = {name: fixed(adapter) for name, adapter in config.adapters.items()}
        self.output = Output(config.output)
        size, earlier = self.output.size(), None if config.overwrite else self.output.record()
        if size is not None and earlier is None and not config.overwrite:
            raise BatchError(
                f"output {config.output} exists and is not a batch job's; choose another --output, or give --overwrite"
            )
        self.input = partition_input(config.input, self.output.owns)
        self.record = JobRecord(self._made_from(earlier))
        self.finished: Counts | None = None
        # An existing output is removed only when the job can run.
        self._replaces_output = config.overwrite
        if earlier is not None:
            self._continue(earlier, size)
        elif not config.overwrite:
            self.output.start(self.record)  # Raises here if the output cannot be written.

    @property
    def remaining(self) -> list[Partition]:
        """The partitions that are not finished yet."""
        if self._replaces_output:
            return list(self.input.partitions)
        done = finished_files(self.output.partitions_directory(self.record))
        return [partition for partition in self.input.partitions if partition.file not in done]

    def run(self, log: Log, progress: Log) -> Counts:
        """Answer what remains and write the output; needs a Ray connection. Raises BatchError.

        `log` receives lines, `progress` a line that replaces its predecessor.
        """
        if self.finished:
            return self.finished
        started = time.monotonic()
        partitions = self.remaining
        # Sized first: a job that the cluster cannot run replaces nothing.
        size = self._pool_size(len(partitions)) if partitions else None
        if self._replaces_output:
            self.output.start(self.record)
            self._replaces_output = False
        total, left = self.input.num_rows, sum(partition.num_rows for partition in partitions)
        kept = total - left
        log(
            f"{total:,} rows in {redact(self.config.input)}"
            + (f", {kept:,} of them answered before" if kept else "")
        )
        if size is not None:
            log(f"{size.replicas} {'replica' if size.replicas == 1 else 'replicas'}, loading the model")
            self._answer(partitions, size, lambda c: progress(_progress(c, kept, total, started)))
        self.finished = self.output.finish(self.record, self.input.partitions)
        log(
            f"{redact(self.config.output)}: {self.finished.rows:,} rows, {self.finished.errors:,} of them errors, "
            f"{self.finished.prompt_tokens:,} prompt and {self.finished.generated_tokens:,} generated tokens; "
            f"{left:,} rows in {time.monotonic() - started:.1f} s"
        )
        return self.finished

    def _continue(self, earlier: JobRecord, size: int | None) -> None:
        """Take up the job that `earlier` describes, whose output has `size` bytes. Raises BatchError if it differs."""
        output = self.config.output
        _check_same_job(output, earlier, self.record)
        if earlier.counts is None:
            return
        if size is None:  # It was complete once, and deleted since.
            self._replaces_output = True
        elif size != earlier.size_bytes:
            raise BatchError(
                f"output {output} has {size} bytes, not the {earlier.size_bytes} that were written; it was changed "
                "afterwards; choose another --output, or give --overwrite"
            )
        else:
            self.finished = earlier.counts

    def _pool_size(self, num_partitions: int) -> PoolSize:
        config = self.config
        size = PoolSize.of(config.device, config.replicas, config.engine.tensor_parallel)
        return replace(size, replicas=min(size.replicas, num_partitions))

    def _answer(
        self, partitions: Sequence[Partition], size: PoolSize, on_progress: Callable[[Counts], None]
    ) -> None:
        config = self.config
        replica_config = ReplicaConfig(
            checkpoint=self._ref,
            directory=self.output.partitions_directory(self.record),
            params=config.params,
            seed=self.record.made_from["seed"],
            prompt_field=config.prompt_field,
            replicas_on_node=ceil_div(size.replicas, max(1, nodes())),
            engine={
                "device": size.device,
                "dtype": config.dtype and getattr(torch, config.dtype),
                **asdict(config.engine),
            },
            adapters=self._adapters,
            secrets=secret_variables() if self._uses_registry else {},
        )
        counts = Counts()
        for result in answer_partitions(
            partitions,
            size,
            replica_config,
            config.engine.max_num_seqs,
            open_variables() if self._uses_registry else {},
        ):
            counts += result
            on_progress(counts)

    @property
    def _uses_registry(self) -> bool:
        draft = self.config.engine.draft_model or ""
        return any(is_model_ref(ref) for ref in (self._ref, draft, *self._adapters.values()))

    def _made_from(self, earlier: JobRecord | None) -> dict[str, Any]:
        seed = self.config.seed
        if seed is None and earlier is not None:
            seed = earlier.made_from.get("seed")
        if seed is None:
            seed = secrets.randbits(63)
        checkpoint = checkpoint_fingerprint(resolve(self._ref))
        adapters = {name: checkpoint_fingerprint(resolve(ref)) for name, ref in self._adapters.items()}
        return self.config.made_from(self.input.fingerprint, checkpoint, adapters, seed)


def _check_same_job(output: str, earlier: JobRecord, now: JobRecord) -> None:
    for name in sorted(earlier.made_from.keys() | now.made_from.keys()):
        old, new = earlier.made_from.get(name), now.made_from.get(name)
        if old != new:
            values = "" if name in ("input", "checkpoint") else f" ({old}, now {new})"
            state = "made" if earlier.counts else "partly made"
            raise BatchError(
                f"output {output} was {state} with another {name}{values}; choose another --output, or give "
                "--overwrite to start from scratch"
            )


def _progress(counts: Counts, kept: int, total: int, started: float) -> str:
    seconds = time.monotonic() - started
    return (
        f"{kept + counts.rows:,} of {total:,} rows, {counts.errors:,} errors, "
        f"{counts.generated_tokens / seconds:,.0f} tokens/s, {seconds:.0f} s"
    )
