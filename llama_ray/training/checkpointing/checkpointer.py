"""Checkpoints written while training continues: it waits for a copy in host memory, and a thread does the rest.

The copies that are not written yet are bounded (see `HostCopies`), so a worker with more state waits longer.

Every worker writes its own files to the run's directory: directly on a mounted path, by way of a local directory to an
object store. Ray Train's own checkpoint store is not used: it does not write the snapshot of its contents atomically,
and a run whose snapshot is damaged cannot be started again. Here the directory itself says which checkpoints are
complete.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from copy import deepcopy
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch

from llama_ray.data.tokenizing.tokenizer import Tokenizer
from llama_ray.model.config_files import config_files, write_json
from llama_ray.model.llama import Llama
from llama_ray.model.parameter_names import hf_name
from llama_ray.storage import run_directory, store
from llama_ray.storage.atomic import write_text
from llama_ray.storage.attempts import Attempt, Superseded
from llama_ray.training.checkpointing.catalog import prune
from llama_ray.training.checkpointing.files import commit, make_empty, staging
from llama_ray.training.checkpointing.host_copy import HostCopies
from llama_ray.training.checkpointing.progress import FileRecord, Progress
from llama_ray.training.checkpointing.state import RankFiles, plain_parameters, rank_files
from llama_ray.training.checkpointing.tensor_file import write_tensors
from llama_ray.training.config import TrainConfig
from llama_ray.training.errors import TrainingError
from llama_ray.training.hosts.group import HostGroup
from llama_ray.training.parallel.process_group import rank, world_size
from llama_ray.utils.errors import first_line

MAX_CONSECUTIVE_FAILURES = 3
"""A run ends after this number of checkpoints in a row that could not be stored."""
_INDEX = "model.safetensors.index.json"
_COPIES_ON_CPU_MIB = 512


@dataclass(frozen=True)
class CheckpointResult:
    """A checkpoint that was stored, or was not: `error` then says why, and is None otherwise."""

    step: int
    directory: str
    stall_s: float
    """How long training waited."""
    write_s: float
    """From the start of the copy until the checkpoint was complete."""
    error: str | None


class NoCheckpointer:
    """Stands in for `Checkpointer` in a run that writes no checkpoints."""

    def save(self, progress: Progress) -> None:
        """Do nothing."""

    def save_progress(self, progress: Progress) -> None:
        """Do nothing."""

    def take_results(self) -> list[CheckpointResult]:
        """Return nothing."""
        return []

    def wait(self) -> None:
        """Return at once."""

    def close(self) -> None:
        """Do nothing."""


class Checkpointer:
    """Saves the state of a run in the directory of `attempt`, one checkpoint at a time; every worker has one.

    Once a newer attempt has begun, no marker is written, nothing is deleted, and the next call raises Superseded.
    """

    def __init__(
        self,
        attempt: Attempt,
        model: Llama,
        optimizer: torch.optim.Optimizer,
        tokenizer: Tokenizer,
        config: TrainConfig,
        adapter_files: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """`adapter_files` are those that make a checkpoint of adapters an adapter, by name; see `adapter_texts`."""
        self.run, self.keep = attempt.run, config.keep_checkpoints
        self._attempt = attempt
        self._model, self._optimizer, self._tokenizer = model, optimizer, tokenizer
        self._adapter_files = adapter_files
        self._group = HostGroup(config.collective_timeout_s)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._on_gpu = next(model.parameters()).is_cuda
        limit = config.checkpoint_copies_mib or (None if self._on_gpu else _COPIES_ON_CPU_MIB)
        self._copies = HostCopies(None if limit is None else limit * 2**20, pinned=self._on_gpu)
        self._stall_s = 0.0
        self._writing: Future[CheckpointResult] | None = None
        self._results: list[CheckpointResult] = []
        # Counted in `wait`, so the same on every worker at the same step.
        self._consecutive_failures = 0
        self._last_step = 0
        self._superseded: str | None = None

    def save(self, progress: Progress) -> None:
        """Start a checkpoint of the current state; every worker must call it.

        Waits until the previous one is written and this one is copied to host memory. Raises TrainingError if the
        last MAX_CONSECUTIVE_FAILURES checkpoints could not be stored, and Superseded.
        """
        start = time.monotonic()
        self.wait()
        self._end_if_superseded()
        files = rank_files(self._model, self._optimizer, rank(), world_size())
        self._copies.begin()
        self._last_step = progress.step
        self._writing = self._thread.submit(self._write, files, deepcopy(progress), start)
        for shards in files.values():
            self._copies.send(shard.tensor for shard in shards.values())
        if self._on_gpu:
            # Otherwise the next step would wait for the copies, and `stall_s` would not show it.
            torch.cuda.synchronize()
        self._stall_s = time.monotonic() - start
        if self._consecutive_failures >= MAX_CONSECUTIVE_FAILURES:
            raise TrainingError(
                f"{MAX_CONSECUTIVE_FAILURES} checkpoints in a row could not be stored in {self.run}; the last good "
                "one is still there: make room or correct the permissions, and --resume"
            )

    def save_progress(self, progress: Progress) -> None:
        """Record what was measured without a step since a checkpoint; every worker must call it.

        Only the marker of that checkpoint is replaced: until it is, the old one stands. Without the checkpoint in this
        run's directory the state is saved.
        """
        checkpoint = self._directory(progress.step)
        marker = self._group.broadcast(run_directory.read_marker(checkpoint))
        if marker is None:
            self.save(progress)
        elif rank() == 0:
            self._attempt.check()
            self._write_marker(checkpoint, progress, marker["files"])

    def take_results(self) -> list[CheckpointResult]:
        """Return the results since the last call. Workers may learn of one at different steps."""
        if self._writing is not None and self._writing.done():
            self.wait()
        results, self._results = self._results, []
        return results

    def wait(self) -> None:
        """Wait until no checkpoint is being written."""
        if self._writing is not None:
            result, self._writing = replace(self._writing.result(), stall_s=self._stall_s), None
            self._consecutive_failures = self._consecutive_failures + 1 if result.error else 0
            self._results.append(result)

    def close(self) -> None:
        """End the thread; call `wait` before. Raises as `save` does, if the last checkpoint could not be stored."""
        self._thread.shutdown(wait=False)
        self._end_if_superseded()
        if self._consecutive_failures:
            raise TrainingError(
                f"the checkpoint of step {self._last_step} could not be stored in {self.run}; make room or correct "
                "the permissions, and --resume to go on from the one before"
            )

    def _end_if_superseded(self) -> None:
        if self._superseded:
            raise Superseded(self._superseded)

    def _directory(self, step: int) -> str:
        number = self._attempt.number if self._attempt.apart else None
        return store.join(self.run, run_directory.checkpoint_name(step, number))

    def _write(self, files: RankFiles, progress: Progress, start: float) -> CheckpointResult:
        """Write one checkpoint, in the thread of each worker; all workers come to the same result."""
        directory = self._directory(progress.step)
        reports = self._group.gather(self._write_own_files(directory, files))
        error = next((report.error for report in reports if report.error), None)
        superseded: str | None = None
        if rank() == 0:
            try:
                if error is None:
                    error = _failure(lambda: self._complete(directory, progress, reports))
                if error is not None:
                    # A full disk needs the room.
                    _failure(lambda: self._remove(directory))
            except Superseded as newer:
                error = superseded = str(newer)
        error, self._superseded = self._group.broadcast((error, superseded))
        return CheckpointResult(progress.step, directory, 0.0, time.monotonic() - start, error)

    def _write_own_files(self, directory: str, files: RankFiles) -> _Report:
        """Write this worker's files, and on rank 0 also those that describe the model."""
        error: str | None = None
        records: dict[str, FileRecord] = {}
        try:
            if rank() == 0:
                error = _failure(lambda: make_empty(directory))
            self._group.barrier()
            if error is None:
                error = _failure(lambda: records.update(self._store_files(directory, files)))
        finally:
            # After a failure, training must not wait for room.
            self._copies.end()
        whole_weights = {
            name: file
            for file, shards in files.items()
            for name, shard in shards.items()
            if shard.is_whole and file.startswith("model-")
        }
        return _Report(error, records, whole_weights)

    def _store_files(self, directory: str, files: RankFiles) -> dict[str, FileRecord]:
        with staging(directory) as local:
            digests = {
                file: write_tensors(local / file, shards, self._copies.receive())
                for file, shards in files.items()
            }
            names = list(files)
            if rank() == 0:
                texts = self._describing_files()
                for name, text in texts.items():
                    write_text(local / name, text)
                names += texts
            return {
                name: commit(local / name, store.join(directory, name), digests.get(name)) for name in names
            }

    def _describing_files(self) -> dict[str, str]:
        """Return the text by file name of the tokenizer and the model's configuration."""
        dtype = next(self._model.parameters()).dtype
        bos, eos = self._tokenizer.bos_id, self._tokenizer.all_eos_ids(self._model.config.vocab_size)
        config = config_files(self._model.config, dtype, bos_id=bos, eos_id=eos)
        return self._tokenizer.files() | config | dict(self._adapter_files)

    def _complete(self, directory: str, progress: Progress, reports: list[_Report]) -> None:
        """Write the marker, which makes the directory a checkpoint, and delete old checkpoints; on rank 0."""
        records = {name: record for report in reports for name, record in report.records.items()}
        weight_map = {name: file for report in reports for name, file in report.whole_weights.items()}
        if set(weight_map) >= {hf_name(name) for name, _ in plain_parameters(self._model)}:
            # No weight is sharded: with an index, transformers opens the checkpoint.
            with staging(directory) as local:
                total = sum(p.nbytes for p in self._model.parameters())
                content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
                write_json(local / _INDEX, content)
                records[_INDEX] = commit(local / _INDEX, store.join(directory, _INDEX))
        self._attempt.check()
        self._write_marker(directory, progress, dict(sorted(records.items())))
        _failure(lambda: self._remove_what_is_old(directory, progress.step))

    def _write_marker(self, directory: str, progress: Progress, files: Mapping[str, FileRecord]) -> None:
        marker = progress.marker(store.name_of(self.run), self._attempt.number, files)
        store.write_text(store.join(directory, run_directory.MARKER), marker)

    def _remove_what_is_old(self, directory: str, step: int) -> None:
        """Delete what earlier attempts wrote of the checkpoint `directory` of `step`, and the checkpoints before it."""
        self._attempt.check()
        for other in run_directory.checkpoints_of(self.run, step):
            if other != directory:
                run_directory.remove_checkpoint(other)
        prune(self.run, step, self.keep)

    def _remove(self, directory: str) -> None:
        self._attempt.check()
        run_directory.remove_checkpoint(directory)


@dataclass(frozen=True)
class _Report:
    """What one worker has written, for rank 0."""

    error: str | None
    records: Mapping[str, FileRecord]
    whole_weights: Mapping[str, str]
    """Name of a weight -> file, for the weights that the worker holds as a whole."""


def _failure(action: Callable[[], object]) -> str | None:
    """Run `action`; return in one line what went wrong, None if nothing did."""
    try:
        action()
    except (OSError, ValueError) as error:
        return first_line(error)
    return None
