"""Checkpoints written beside the training: it waits for a copy in host memory, a thread does the rest.

What is copied and not yet written is bounded (see HostCopies), so a worker with more than that waits longer.

Every worker writes its own files to the run's directory, straight where that is a mounted path, by way of a local
directory where it is an object store. Ray Train's own checkpoint store is not used: its snapshot of what it holds is
not written atomically, and a run that it describes wrongly cannot be started again. Here the directory itself says
which checkpoints are whole.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from copy import deepcopy
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from llama_ray.data.tokenizer import Tokenizer
from llama_ray.model.checkpoint import hf_name, save_config, write_json
from llama_ray.model.llama import Llama
from llama_ray.storage import run_directory, store
from llama_ray.training.checkpointing.host_copy import HostCopies
from llama_ray.training.checkpointing.state import Part, Progress, own_part, plain_parameters
from llama_ray.training.checkpointing.tensor_file import write_tensors
from llama_ray.training.config import TrainConfig
from llama_ray.training.parallel.parallelize import rank, world_size
from llama_ray.utils.errors import first_line

_INDEX = "model.safetensors.index.json"
_COPIES_ON_CPU_MIB = 512


@dataclass(frozen=True)
class Saved:
    """What became of a checkpoint. `error` says why it was not stored, None where it was."""

    step: int
    directory: str
    stall_s: float
    """How long training waited."""
    write_s: float
    """From the start of the copy until the checkpoint was complete."""
    error: str | None


class Checkpointer:
    """Saves a run's state below the directory `run`, one checkpoint at a time, on every worker alike."""

    def __init__(
        self,
        run: str,
        model: Llama,
        optimizer: torch.optim.Optimizer,
        tokenizer: Tokenizer,
        config: TrainConfig,
    ) -> None:
        self.run, self.keep = run, config.keep_checkpoints
        self._model, self._optimizer, self._tokenizer = model, optimizer, tokenizer
        # The thread must not talk on the group that trains; and NCCL cannot carry what it says.
        self._group = _gloo_group(config.collective_timeout_s)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._on_gpu = next(model.parameters()).is_cuda
        limit = config.checkpoint_copies_mib or (None if self._on_gpu else _COPIES_ON_CPU_MIB)
        self._copies = HostCopies(None if limit is None else limit * 2**20, pinned=self._on_gpu)
        self._stall_s = 0.0
        self._writing: Future[Saved] | None = None
        self._told: list[Saved] = []
        self.failures_in_a_row = 0
        """Counted when a write is waited for, so the same on every worker at the same step."""

    def save(self, progress: Progress) -> None:
        """Start a checkpoint of this moment; waits for the one before, then for the copy. All workers call it."""
        start = time.monotonic()
        self.wait()
        part = own_part(self._model, self._optimizer, rank(), world_size())
        self._copies.begin()
        self._writing = self._thread.submit(self._write, part, deepcopy(progress), start)
        for pieces in part.values():
            self._copies.send(piece.tensor for piece in pieces.values())
        if self._on_gpu:
            torch.cuda.synchronize()  # else the next step would wait for the copies, and the stall would not show
        self._stall_s = time.monotonic() - start

    def finished(self) -> list[Saved]:
        """What has been written, or has failed, since the last call. Workers may learn of it at different steps."""
        if self._writing is not None and self._writing.done():
            self.wait()
        told, self._told = self._told, []
        return told

    def wait(self) -> None:
        """Until nothing is being written."""
        if self._writing is not None:
            saved, self._writing = replace(self._writing.result(), stall_s=self._stall_s), None
            self.failures_in_a_row = self.failures_in_a_row + 1 if saved.error else 0
            self._told.append(saved)

    def close(self) -> None:
        """Let the thread end."""
        self._thread.shutdown(wait=False)

    def _write(self, part: Part, progress: Progress, start: float) -> Saved:
        directory = store.join(self.run, checkpoint_name(progress.step))
        error: str | None = None
        files: dict[str, dict[str, Any]] = {}
        try:
            if rank() == 0:
                error = _failure(lambda: _clear(directory))
            self._barrier()
            if error is None:
                error = _failure(lambda: files.update(self._write_files(directory, part)))
        finally:
            self._copies.end()  # after a failure, training must not wait for room
        whole = {
            name: file
            for file, pieces in part.items()
            for name, piece in pieces.items()
            if piece.whole and file.startswith("model-")
        }
        reports = self._gather((error, files, whole))
        error = next((e for e, _, _ in reports if e), None)
        if rank() == 0:
            if error is None:
                error = _failure(lambda: self._complete(directory, progress, reports))
            if error is not None:
                _failure(lambda: run_directory.remove_checkpoint(directory))  # a full disk needs the room
        error = self._broadcast(error)
        return Saved(progress.step, directory, 0.0, time.monotonic() - start, error)

    def _write_files(self, directory: str, part: Part) -> dict[str, dict[str, Any]]:
        """Write this worker's files, and those that describe the model on rank 0. Returns what the marker records."""
        with _local(directory) as local:
            digests = {
                file: write_tensors(local / file, pieces, self._copies.receive())
                for file, pieces in part.items()
            }
            mine = list(part)
            if rank() == 0:
                self._tokenizer.save(local)
                dtype = next(self._model.parameters()).dtype
                bos, eos = self._tokenizer.bos_id, self._tokenizer.eos_id
                save_config(self._model.config, dtype, local, bos_id=bos, eos_id=eos)
                mine += [p.name for p in local.glob("*.json")]
            return {
                name: _store(local / name, store.join(directory, name), digests.get(name)) for name in mine
            }

    def _complete(self, directory: str, progress: Progress, reports: list[Any]) -> None:
        files = {name: record for _, mine, _ in reports for name, record in mine.items()}
        weights = {name: file for _, _, whole in reports for name, file in whole.items()}
        if set(weights) >= {hf_name(name) for name, _ in plain_parameters(self._model)}:
            # No tensor is in pieces: with an index it is a checkpoint that transformers opens.
            with _local(directory) as local:
                total = sum(p.nbytes for p in self._model.parameters())
                content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weights.items()))}
                write_json(local / _INDEX, content)
                files[_INDEX] = _store(local / _INDEX, store.join(directory, _INDEX))
        store.write_text(
            store.join(directory, run_directory.MARKER), progress.marker(dict(sorted(files.items())))
        )
        _failure(lambda: prune(self.run, progress.step, self.keep))

    def _barrier(self) -> None:
        if self._group is not None:
            dist.barrier(self._group)

    def _gather(self, mine: Any) -> list[Any]:
        if self._group is None:
            return [mine]
        everyone: list[Any] = [None] * world_size()
        dist.all_gather_object(everyone, mine, self._group)
        return everyone

    def _broadcast(self, value: Any) -> Any:
        if self._group is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, 0, self._group)
        return box[0]


def prune(run: str, step: int, keep: int) -> None:
    """Delete all checkpoints of `run` up to `step` but the newest `keep` and the one with the best validation loss.

    Two that followed the same validation have the same loss; the earlier one is nearer to what was measured.
    """
    done = [c for c in run_directory.list_checkpoints(run) if store.name_of(c) <= checkpoint_name(step)]
    losses: dict[str, float] = {}
    for checkpoint in done:
        loss = (run_directory.read_marker(checkpoint) or {}).get("validation_loss")
        if loss is not None:
            losses[checkpoint] = loss
    best = min(losses, key=lambda c: (losses[c], c), default=None)
    for checkpoint in done[keep:]:
        if checkpoint != best:
            run_directory.remove_checkpoint(checkpoint)


def latest_valid_checkpoint(run: str, timeout_s: int) -> str | None:
    """The newest checkpoint of `run` with every byte as it was written, found by all workers together.

    The workers share the reading of the files. A damaged checkpoint is passed over with a warning, and loses its
    marker, so that nothing counts it among the good ones again.
    """
    group = _gloo_group(timeout_s)
    candidates = run_directory.list_checkpoints(run)
    if group is not None:  # one list for all: a directory may look different from another machine
        box = [candidates]
        dist.broadcast_object_list(box, 0, group)
        candidates = box[0]
    for checkpoint in candidates:
        wrong = run_directory.missing_or_cut(checkpoint)
        if wrong is None:
            files = sorted((run_directory.read_marker(checkpoint) or {"files": {}})["files"])
            wrong = run_directory.altered(checkpoint, files[rank() :: world_size()])
        verdict = torch.tensor(int(wrong is not None))
        if group is not None:
            dist.all_reduce(verdict, group=group)
        if not verdict.item():
            return checkpoint
        if rank() == 0:
            store.delete(store.join(checkpoint, run_directory.MARKER))
    return None


@contextlib.contextmanager
def local_copy(checkpoint: str) -> Iterator[Path]:
    """A directory with the files of `checkpoint`: itself on a mounted path, else a copy that is deleted afterwards."""
    if store.is_local(checkpoint):
        yield Path(store.open_storage(checkpoint)[1])
        return
    with tempfile.TemporaryDirectory() as local:
        store.download(checkpoint, Path(local))
        yield Path(local)


def checkpoint_name(step: int) -> str:
    """The directory name of a step's checkpoint; names sort as steps do."""
    return f"step_{step:08d}"


def _gloo_group(timeout_s: int) -> dist.ProcessGroup | None:
    if not dist.is_initialized():
        return None
    group: dist.ProcessGroup = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
    return group


def _clear(directory: str) -> None:
    # After a crash: files of other workers would be taken for part of this checkpoint.
    run_directory.remove_checkpoint(directory)
    store.make_directory(directory)


def _failure(write: Callable[[], object]) -> str | None:
    """Run `write`; what went wrong, in one line."""
    try:
        write()
    except (OSError, ValueError) as e:
        return first_line(e)
    return None


@contextlib.contextmanager
def _local(directory: str) -> Iterator[Path]:
    """Where to write files for `directory`: itself, or a place to upload from."""
    if store.is_local(directory):
        yield Path(store.open_storage(directory)[1])
    else:
        with tempfile.TemporaryDirectory() as temporary:
            yield Path(temporary)


def _store(file: Path, target: str, sha256: str | None = None) -> dict[str, Any]:
    """Make sure that `file` is at `target` for good; its entry in the marker."""
    record = {"bytes": file.stat().st_size, "sha256": sha256 or store.sha256(str(file))}
    if store.is_local(target):
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    else:
        store.upload(file, target)
    return record
