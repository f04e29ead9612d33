"""One batch job from its checks to the finished file. Nothing of it is lost when it is killed and started again.

Ray Data carries the parts to a pool of actors with one engine each. Its own reading and writing are not used: a file
that Ray Data writes holds whatever rows came together, in no order and without a name that is the same after a restart,
and its checkpoints list rows in one place and data in another. Here a part is fixed by the input alone, and one rename
commits its rows.
"""

from __future__ import annotations

import logging
import os
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import ray
import ray.data
import torch
from ray.data import ActorPoolStrategy

from llama_ray.batch_inference.config import BatchConfig, BatchError, fingerprint
from llama_ray.batch_inference.output import Counts, Output, Record, committed
from llama_ray.batch_inference.replica import Replica, Setup
from llama_ray.batch_inference.rows import SMALLEST_PART, Part, Rows, find_rows
from llama_ray.orchestration.resources import check_workers, gpus, nodes, uses_gpu
from llama_ray.pretrained import resolve
from llama_ray.storage.paths import is_model_ref
from llama_ray.tracking.uri import tracking_uri
from llama_ray.tracking.versions import resolve_version
from llama_ray.utils.errors import first_line
from llama_ray.utils.integers import ceil_div

Log = Callable[[str], None]

_MAX_DEATHS = 15
"""So often the workers on one part may die before the job ends. Rows that kill a process are found after fewer, unless
there are many of them: `attempts` counts on from there when the job is started again."""
_MOST_PARTS_AT_ONCE = 8


class BatchJob:
    """A job whose input was read through and whose output was looked at: new, half done, or `finished`.

    Needs no Ray connection until `run`. Raises a ValueError (BatchError, StorageError, SourceError, CheckpointError)
    for anything the user can mend.
    """

    def __init__(self, config: BatchConfig) -> None:
        self.config = config
        ref = config.checkpoint
        # an alias may move while the job runs, or before it is started again
        self._ref = resolve_version(ref).uri if is_model_ref(ref) else ref
        self.output = Output(config.output)
        size, found = self.output.size(), None if config.overwrite else self.output.record()
        if found is None and size is not None and not config.overwrite:
            raise BatchError(
                f"output {config.output} exists and is not a batch job's: choose another --output, or give --overwrite"
            )
        self.rows: Rows = find_rows(config.input, self.output.owns)
        self.record = Record(self._made_from(found))
        self.finished: Counts | None = None
        # What is there is removed only when the job can run; a new output shows here that it can be written.
        self._replaces = config.overwrite
        if found is not None:
            _check_same(config.output, found, self.record)
            if found.counts and size is None:  # complete once, and deleted since
                self._replaces = True
            elif found.counts and found.size_bytes != size:
                raise BatchError(
                    f"output {config.output} has {size} bytes, {found.size_bytes} were written: it was changed "
                    "afterwards; choose another --output, or give --overwrite"
                )
            else:
                self.finished = found.counts
        elif not config.overwrite:
            self.output.start(self.record)

    @property
    def remaining(self) -> list[Part]:
        """The parts that nobody has finished yet."""
        if self._replaces:
            return list(self.rows.parts)
        done = committed(self.output.parts_of(self.record))
        return [part for part in self.rows.parts if part.file not in done]

    def run(self, log: Log, progress: Log) -> Counts:
        """Answers what is left and puts the output together; needs a Ray connection.

        `log` takes lines, `progress` one that replaces the one before. Raises BatchError.
        """
        if self.finished:
            return self.finished
        started = time.monotonic()
        parts = self.remaining
        if parts:
            gpu = self._gpu()
            replicas = min(self._replicas(gpu=gpu), len(parts))
        if self._replaces:
            self.output.start(self.record)
            self._replaces = False
        left = sum(part.rows for part in parts)
        kept = self.rows.count - left
        again = f", {kept:,} of them answered before" if kept else ""
        log(f"{self.rows.count:,} rows in {self.config.input}{again}")
        if parts:
            log(f"{replicas} {'replica' if replicas == 1 else 'replicas'}, loading the model")
            counts = Counts()
            for result in self._results(parts, replicas, gpu=gpu):
                counts += result
                progress(_line(counts, kept, self.rows.count, time.monotonic() - started))
        finished = self.output.finish(self.record, self.rows.parts).counts
        assert finished is not None
        log(
            f"{self.config.output}: {finished.rows:,} rows, {finished.errors:,} of them errors, "
            f"{finished.prompt_tokens:,} prompt and {finished.generated_tokens:,} generated tokens; "
            f"{left:,} rows in {time.monotonic() - started:.1f} s"
        )
        self.finished = finished
        return finished

    def _results(self, parts: list[Part], replicas: int, *, gpu: bool) -> Iterator[Counts]:
        """Has `parts` answered and committed -> the counts of each, in the order in which they are finished."""
        at_once = min(_MOST_PARTS_AT_ONCE, 1 + ceil_div(2 * self.config.engine.max_num_seqs, SMALLEST_PART))
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False  # our own line reads better in a job's log
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        results = (
            ray.data.from_items([{"part": part.to_json()} for part in parts], override_num_blocks=len(parts))
            .map(
                Replica,  # type: ignore[arg-type]  # ray's stubs know functions only
                fn_constructor_args=(self._setup(replicas, gpu=gpu),),
                compute=ActorPoolStrategy(
                    size=replicas,
                    max_tasks_in_flight_per_actor=at_once,
                    max_concurrent_calls_per_actor=at_once,
                    enable_true_multi_threading=True,
                ),
                num_cpus=1,
                num_gpus=self.config.engine.tensor_parallel if gpu else None,
                scheduling_strategy="SPREAD",
                max_restarts=-1,
                max_task_retries=_MAX_DEATHS,
                runtime_env={"env_vars": self._environment()},
            )
            .iter_rows()
        )
        try:
            for result in results:
                if result["failure"]:
                    raise BatchError(result["failure"])
                yield Counts(**{name: result[name] for name in vars(Counts())})
        except ray.exceptions.RayActorError as error:
            raise BatchError(
                f"the workers on one part died {_MAX_DEATHS + 1} times ({first_line(error)}); finished parts "
                "are kept, start again to go on; if memory was short, with a smaller --max_num_seqs"
            ) from error

    def _gpu(self) -> bool:
        gpu = self.config.device != "cpu" and uses_gpu()
        if self.config.device == "cuda" and not gpu:
            raise BatchError(
                "device is cuda, but this cluster has no GPU; give --device cpu, or add GPU nodes"
            )
        return gpu

    def _replicas(self, *, gpu: bool) -> int:
        count, each = self.config.replicas, self.config.engine.tensor_parallel if gpu else 1
        if count is None:
            count = max(1, gpus() // each if gpu else nodes())
        check_workers(count, gpu=gpu, flag="replicas", each=each)
        return count

    def _setup(self, replicas: int, *, gpu: bool) -> Setup:
        config = self.config
        return Setup(
            checkpoint=self._ref,
            directory=self.output.parts_of(self.record),
            params=config.params,
            seed=self.record.made_from["seed"],
            prompt_field=config.prompt_field,
            replicas_on_node=ceil_div(replicas, max(1, nodes())),
            engine={
                "device": "cuda" if gpu else "cpu",
                "dtype": config.dtype and getattr(torch, config.dtype),
                **asdict(config.engine),
            },
        )

    def _environment(self) -> dict[str, str]:
        """What workers need to find a registered model: the driver's environment does not reach them."""
        refs = (self._ref, self.config.engine.draft_model or "")
        if not any(is_model_ref(ref) for ref in refs):
            return {}
        mlflow = {k: v for k, v in os.environ.items() if k.startswith("MLFLOW_")}
        return mlflow | {"MLFLOW_TRACKING_URI": tracking_uri()}

    def _made_from(self, found: Record | None) -> dict[str, Any]:
        seed = self.config.seed
        if seed is None and found is not None:
            seed = found.made_from.get("seed")
        if seed is None:
            seed = secrets.randbits(63)
        return self.config.made_from(self.rows.fingerprint, fingerprint(resolve(self._ref)), seed)


def _check_same(output: str, found: Record, now: Record) -> None:
    for name in sorted(found.made_from.keys() | now.made_from.keys()):
        old, new = found.made_from.get(name), now.made_from.get(name)
        if old != new:
            values = "" if name in ("input", "checkpoint") else f" ({old}, now {new})"
            state = "made" if found.counts else "partly made"
            raise BatchError(
                f"output {output} was {state} with another {name}{values}: choose another --output, or give "
                "--overwrite to start from nothing"
            )


def _line(counts: Counts, kept: int, total: int, seconds: float) -> str:
    return (
        f"{kept + counts.rows:,} of {total:,} rows, {counts.errors:,} errors, "
        f"{counts.generated_tokens / seconds:,.0f} tokens/s, {seconds:.0f} s"
    )
