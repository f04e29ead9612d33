"""A Ray actor's work: one engine that is kept full with the rows of several partitions at once."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from llama_ray.batch_inference import partition_file
from llama_ray.batch_inference.attempts import MAX_SOLO_ATTEMPTS, Attempts
from llama_ray.batch_inference.engine_loop import EngineCrashed, EngineLoop, EngineLost
from llama_ray.batch_inference.partition_file import Counts
from llama_ray.batch_inference.partitions import Partition, read_lines
from llama_ray.batch_inference.pending_row import PendingRow
from llama_ray.batch_inference.shared_lock import SharedLock
from llama_ray.generation.engine import Engine
from llama_ray.generation.sampling.params import SamplingParams
from llama_ray.orchestration.resources import cpu_threads
from llama_ray.storage.store import StorageError
from llama_ray.utils.errors import first_line
from llama_ray.utils.redact import RedactedRepr

_log = logging.getLogger(__name__)


@dataclass(frozen=True, repr=False)
class ReplicaConfig(RedactedRepr):
    """What a replica needs to know. `directory` receives the answers; `engine` has `Engine.from_pretrained` options.

    `secrets` are environment variables that Ray must not show.
    """

    checkpoint: str
    directory: str
    params: SamplingParams
    seed: int
    prompt_field: str
    replicas_on_node: int
    engine: dict[str, Any] = field(default_factory=dict)
    adapters: dict[str, str] = field(default_factory=dict)
    secrets: dict[str, str] = field(default_factory=dict, repr=False)


class Replica:
    """Answers partitions. Several threads call it at once, so that the engine stays full while a partition ends.

    Errors that the user can mend are returned as a value: Ray would wrap an exception into a page of traceback.
    """

    def __init__(self, config: ReplicaConfig) -> None:
        os.environ.update(config.secrets)
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # The engine uses the cores.
        self._config = config
        self._failure = ""
        if config.engine.get("device") == "cpu":
            torch.set_num_threads(cpu_threads(config.replicas_on_node))
        try:
            self._engine = EngineLoop(
                lambda: Engine.from_pretrained(config.checkpoint, adapters=config.adapters, **config.engine)
            )
        except ValueError as error:
            self._failure = f"a worker cannot load the model: {error}"
        self._lock = SharedLock()

    def __call__(self, item: dict[str, str]) -> dict[str, Any]:
        """Answer and commit `item["partition"]`; return its counts, or why it failed."""
        partition = Partition.from_json(item["partition"])
        counts, failure = Counts(), self._failure
        if not failure:
            try:
                counts = self._answer(partition)
            except ValueError as error:
                failure = str(error)
        return {"partition": partition.index, "failure": failure, **vars(counts)}

    def _answer(self, partition: Partition) -> Counts:
        config = self._config
        rows = [
            PendingRow.read(line, config.prompt_field, config.params, config.seed, config.adapters)
            for line in read_lines(partition)
        ]
        with self._write_errors():
            attempts = Attempts(config.directory, partition)
            if attempts.may_share:
                self._run_together(rows, attempts)
            else:
                self._run_one_by_one(rows, attempts)
        output = [row.output() for row in rows]
        counts = Counts(
            rows=len(output),
            errors=sum("error" in row for row in output),
            prompt_tokens=sum(row.prompt_tokens for row in rows if not row.error),
            generated_tokens=sum(
                len(completion["token_ids"]) for row in output for completion in row.get("completions", ())
            ),
        )
        with self._write_errors():
            partition_file.commit(config.directory, partition, output, counts)
            attempts.delete()
        return counts

    def _run_together(self, rows: list[PendingRow], attempts: Attempts) -> None:
        with self._lock.shared():
            attempts.begin_shared()
            for row in rows:
                self._submit(row)
            crashed = [row for row in rows if not self._wait(row)]
        if not crashed:
            return
        # One of them may be the cause, so each is tried where it cannot harm another.
        with self._lock.exclusive():
            for row in crashed:
                self._submit(row)
                if not self._wait(row):
                    row.error = f"{row.error} (twice: the second time with no other row in it)"

    def _run_one_by_one(self, rows: list[PendingRow], attempts: Attempts) -> None:
        """Fallback after the process died repeatedly: slow, but it finds the row that kills it."""
        with self._lock.exclusive():
            for row in rows:
                number = row.line.row
                if row.params is None:
                    continue
                if attempts.is_fatal(number):
                    row.error = f"the process died {MAX_SOLO_ATTEMPTS} times while this row ran alone"
                    continue
                attempts.begin_solo(number)
                self._submit(row)
                self._wait(row)
                attempts.survived(number)

    def _submit(self, row: PendingRow) -> None:
        if row.params is None:
            return
        row.error, row.answer = "", None
        try:
            row.prompt_tokens, row.answer = self._engine.submit(row.prompt, row.params, row.adapter)
        except EngineLost:  # For example, the crash has ruined the CUDA context: only a new process helps.
            _log.exception("this worker ends, Ray starts another")
            os._exit(1)
        except Exception as error:  # Any error belongs to this row alone; the others go on.
            row.error = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"

    def _wait(self, row: PendingRow) -> bool:
        """Wait for the row's answer, if it has been submitted. Return False if the engine crashed first."""
        if row.answer is None:
            return True
        try:
            candidates = row.answer.result()
        except EngineCrashed as error:
            row.error = str(error)
            return False
        row.error = next((c.error for c in candidates if c.error), "")
        return True

    @contextmanager
    def _write_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StorageError(
                f"a worker cannot write to {self._config.directory} ({first_line(error)}); the output must be on "
                "storage that all nodes share"
            ) from error
