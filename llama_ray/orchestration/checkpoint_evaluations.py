"""Evaluations of a run's checkpoints beside its training: one at a time, of the newest that is due.

The driver starts them, because it outlives the workers and their restarts. It learns of checkpoints from the run's
directory and keeps the results there, so that a resumed run evaluates no step twice.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection
from concurrent.futures import Future
from dataclasses import dataclass

from llama_ray.evaluation.results import Evaluation, EvaluationError
from llama_ray.storage import run_directory, store
from llama_ray.utils.errors import one_line, printable
from llama_ray.utils.redact import redact

_RESULTS = "evaluations"
"""The directory of results in that of the run."""
_POLL_S = (2.0, 15.0)
"""Seconds between two looks for checkpoints, on a mounted path and on an object store."""
_CANCEL_S = 1.0
"""How long the end of a stopped run waits until an evaluation is cancelled."""
_LEAST_WAIT_S, _WAIT_OF_LONGEST = 600.0, 3.0
"""How long the end of a run waits for evaluations: at least so long, and so many times the longest one before."""


@dataclass(frozen=True)
class Measured:
    """The evaluation of the checkpoint of `step`, or why it failed."""

    step: int
    evaluation: Evaluation | None
    failure: str = ""


@dataclass(frozen=True)
class Running:
    """An evaluation at work."""

    future: Future[Measured]
    cancel: Callable[[], None]


Start = Callable[[frozenset[int], bool], Running]
"""Starts an evaluation of what is `due` after these steps; the flag says whether training has ended."""
Log = Callable[[int, Evaluation], None]
"""Takes a step and the evaluation of its checkpoint."""


def due(saved: Collection[int], every: int, before: Collection[int], ended: bool = False) -> int | None:
    """Return which of the steps with a checkpoint is to be evaluated after those in `before`; None if none is.

    Each multiple of `every` is due at the first checkpoint from it on. Of several only the last one counts, so that
    slow evaluations do not pile up. When training has `ended`, its last checkpoint is due in any case.
    """
    last = max(before, default=0)
    newer = [step for step in saved if step > last]
    interval = max((step // every for step in newer), default=0)
    if interval > last // every:
        return min(step for step in newer if step // every == interval)
    return max(newer, default=None) if ended else None


def saved_steps(directory: str) -> list[int]:
    """Return the steps that have a checkpoint in the run's directory."""
    names = (store.name_of(checkpoint) for checkpoint in run_directory.list_checkpoints(directory))
    return [step for name in names if (step := run_directory.checkpoint_step(name)) is not None]


class CheckpointEvaluations:
    """Evaluates checkpoints of the run in `directory` in a thread, until `finish` or `abandon`; neither raises."""

    def __init__(
        self,
        directory: str,
        every: int,
        start: Start,
        log: Log,
        *,
        has_room: bool = True,
        poll_s: float | None = None,
    ) -> None:
        """Give `log` the results of earlier launches, which may be lacking in MLflow, and each new one.

        Without room beside the workers, the evaluations begin when training has ended.
        """
        self._directory, self._every, self._start_one, self._log = directory, every, start, log
        self._has_room = has_room
        self._poll_s = poll_s or _POLL_S[0 if store.is_local(directory) else 1]
        self._before: set[int] = set()
        self._longest_s = 0.0
        self._changed = threading.Condition()
        self._ended = self._abandoned = False
        self._thread = threading.Thread(target=self._run, name="evaluations", daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Wait, within limits, until the last checkpoint and what else is due has been evaluated."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()
        _say("training has ended; its last checkpoint is evaluated")
        limit_s = max(_LEAST_WAIT_S, _WAIT_OF_LONGEST * self._longest_s)
        self._thread.join(limit_s)
        if self._thread.is_alive():
            _say(
                f"the evaluations of checkpoints are given up after {limit_s:,.0f} s; --resume goes on with them"
            )
        self.abandon()

    def abandon(self) -> None:
        """End without waiting for results; a resumed run evaluates what is due."""
        with self._changed:
            self._abandoned = True
            self._changed.notify_all()
        self._thread.join(_CANCEL_S)

    def _run(self) -> None:
        try:
            self._take_up()
            while self._wait():
                ended = self._ended
                try:
                    step = due(saved_steps(self._directory), self._every, self._before, ended)
                except OSError:
                    # Storage that does not answer now may do so at the next look.
                    if ended:
                        raise
                    continue
                if step is not None:
                    self._evaluate(step)
                elif ended:
                    return
        # Whatever it is, training goes on.
        except Exception as error:
            _say(f"checkpoints are not evaluated any more: {_reason(error)}")

    def _wait(self) -> bool:
        """Wait until there may be something to do; return False once nobody waits for results."""
        with self._changed:
            while True:
                self._changed.wait_for(lambda: self._ended or self._abandoned, self._poll_s)
                if self._abandoned or self._ended or self._has_room:
                    return not self._abandoned

    def _take_up(self) -> None:
        """Log the results of earlier launches of the run."""
        folder = store.join(self._directory, _RESULTS)
        for name in sorted(store.list_files(folder)):
            step = run_directory.checkpoint_step(name.removesuffix(".json"))
            text = store.read_text(store.join(folder, name)) if step is not None else None
            if step is None or text is None:
                continue
            self._before.add(step)
            try:
                self._log(step, Evaluation.from_json(text))
            except EvaluationError:
                _say(f"{name} in {folder} cannot be read; its step is not evaluated again")

    def _evaluate(self, step: int) -> None:
        """Start an evaluation when `step` is due, and log what comes of it."""
        began = time.monotonic()
        running = self._start_one(frozenset(self._before), self._ended)
        running.future.add_done_callback(self._notify)
        with self._changed:
            self._changed.wait_for(lambda: running.future.done() or self._abandoned)
        if not running.future.done():
            running.cancel()
            return
        self._longest_s = max(self._longest_s, time.monotonic() - began)
        measured = _result(running.future, step)
        self._before.add(measured.step)
        if measured.evaluation is None:
            _say(f"step {measured.step}  NOT EVALUATED, nothing else is affected: {measured.failure}")
        else:
            self._keep(measured.step, measured.evaluation)

    def _notify(self, future: Future[Measured]) -> None:
        with self._changed:
            self._changed.notify_all()

    def _keep(self, step: int, evaluation: Evaluation) -> None:
        """Show, log and store a result."""
        scores = "  ".join(f"{score.name} {score.value:.4f}" for score in evaluation.scores)
        _say(f"step {step}  evaluated in {evaluation.seconds:.1f} s  {scores}")
        self._log(step, evaluation)
        folder = store.join(self._directory, _RESULTS)
        try:
            store.make_directory(folder)
            file = store.join(folder, f"{run_directory.checkpoint_name(step)}.json")
            store.write_text(file, redact(evaluation.to_json()))
        except OSError as error:
            _say(f"the evaluation of step {step} is not kept in {folder}: {_reason(error)}")


def _result(future: Future[Measured], step: int) -> Measured:
    try:
        return future.result()
    # A node was lost, or the task did not even start there.
    except Exception as error:
        return Measured(step, None, _reason(error))


def _reason(error: BaseException) -> str:
    return printable(one_line(error))


def _say(line: str) -> None:
    print(line, flush=True)
