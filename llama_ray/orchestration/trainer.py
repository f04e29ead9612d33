"""A training run on a Ray cluster, from its checks to the registered model."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from llama_ray.data.inspection.examples import examples
from llama_ray.data.inspection.terminal import Style
from llama_ray.data.mixtures.sources import Given
from llama_ray.model.config import LlamaConfig
from llama_ray.orchestration.interrupts import request_stop, until_signal, withdraw_stop
from llama_ray.orchestration.launch import IF_THERE, LaunchConfig
from llama_ray.orchestration.publish import publish
from llama_ray.orchestration.report import describe_run, describe_version
from llama_ray.orchestration.run_evaluations import checkpoints_evaluated, promote_by_rule
from llama_ray.orchestration.run_record import Finished, RunRecord
from llama_ray.orchestration.training_job import TrainingJob, check_job, refuse_trained
from llama_ray.orchestration.worker import Ending, WorkerPlan
from llama_ray.orchestration.worker_group import run_workers
from llama_ray.storage import attempts, run_directory, store
from llama_ray.storage.attempts import Attempt
from llama_ray.storage.claim import claimed
from llama_ray.tracking.environment import secret_variables
from llama_ray.tracking.errors import TrackingError
from llama_ray.tracking.registry import PromotionDecision, Version, resolve_version
from llama_ray.tracking.runs import Run, Status
from llama_ray.tracking.tags import parent_tags, standard_tags
from llama_ray.tracking.versions import NotRegistered
from llama_ray.training.checkpointing.files import local_copy
from llama_ray.training.checkpointing.progress import load_progress
from llama_ray.training.config import Schedule, TrainConfig
from llama_ray.training.hosts.interrupt import Stopped
from llama_ray.utils.redact import redact

EXAMPLES_FILE = "examples.txt"
"""The artifact that shows what is learned of some examples."""


@dataclass(frozen=True)
class Outcome:
    """The result of a finished run.

    `epochs` says how often the run went through each source. `version` and `decision` are None if nothing was
    registered.
    """

    run_id: str
    checkpoint: str
    validation_loss: float
    epochs: dict[str, float]
    version: Version | None
    decision: PromotionDecision | None


def train_on_ray(model: LlamaConfig, config: TrainConfig, launch: LaunchConfig, data: Given) -> Outcome:
    """Train `model` on the prepared `data` with Ray Train, logged as one MLflow run, and register it.

    For `data` see `parse_sources`. Needs a Ray connection. Raises ValueError with one line for everything that can be
    checked without a worker, before one starts; TrainingError if the run failed and a restart would not help, or was
    the last one allowed; Stopped if SIGINT or SIGTERM made the workers save and end; TrackingError, which is a
    ValueError, if MLflow refuses the finished model. The MLflow run is then marked FAILED, or KILLED if it was stopped.
    Raises Superseded, and leaves the MLflow run alone, once a newer attempt goes on with the run.
    """
    job = check_job(model, config, launch, data)
    if launch.resume == IF_THERE and (outcome := _finished(job)):
        print(f"run {job.name} has finished already; nothing is left to do", flush=True)
        return outcome
    # A launch that nobody here can end is fenced off; one on this machine is more likely a mistake.
    take_over = launch.resume == IF_THERE and not attempts.lives_here(job.directory)
    with claimed(job.directory, take_over=take_over), attempts.attempt(job.directory) as attempt:
        with _mlflow_run(job, attempt) as run:
            where = f"checkpoints in {job.directory}, MLflow run {run.run_id} at {run.url or run.uri}"
            print(f"run {job.name}: {redact(where)}", flush=True)
            _show_examples(job, run)
            with checkpoints_evaluated(attempt, job.launch, job.evaluation, run, gpu=job.gpu):
                ending = _train(job, run, attempt)
                if ending.stopped_at is not None:
                    raise Stopped(ending.stopped_at)
            checkpoint = run_directory.checkpoint_of(job.directory, ending.step)
            try:
                outcome = _register(job, run, checkpoint, attempt)
            except TrackingError as error:
                raise TrackingError(f"{error}; the trained model is kept in {checkpoint}") from error
        _record_end(job, run, ending.step, outcome, attempt)
    return outcome


@contextmanager
def _mlflow_run(job: TrainingJob, attempt: Attempt) -> Iterator[Run]:
    """Open the MLflow run of `job`, and mark at the end how it ended, unless a newer attempt goes on with it."""
    if not job.launch.resume:
        # A launch of this name may have ended since it was checked.
        refuse_trained(job.launch, job.name)
    run = _resumed_run(job) or _new_run(job)
    try:
        attempt.check()
        _describe(run, job)
        run.log_config(_settings(job) | {"launch": vars(job.launch)})
        yield run
    except BaseException as error:
        stopped = isinstance(error, KeyboardInterrupt | SystemExit | Stopped)
        _finish(run, "KILLED" if stopped else "FAILED", attempt)
        raise
    _finish(run, "FINISHED", attempt)


def _finish(run: Run, status: Status, attempt: Attempt) -> None:
    if _may_change(attempt):
        run.finish(status)


def _may_change(attempt: Attempt) -> bool:
    """Return whether no newer attempt is known of; storage that does not answer tells of none."""
    try:
        return attempt.is_newest()
    except OSError:
        return True


def _resumed_run(job: TrainingJob) -> Run | None:
    record = RunRecord.read(job.directory) if job.launch.resume else None
    if not record:
        return None
    run = Run.attach(record.run_id)
    run.reopen()
    return run


def _new_run(job: TrainingJob) -> Run:
    most = job.launch.workers[1]
    settings = _settings(job)
    settings["model"]["num_parameters"] = job.model.num_parameters()
    return Run.create(
        experiment=job.launch.experiment,
        name=job.name,
        params=settings | {"world_size": job.launch.world_size},
        tags=standard_tags(world_size=most, device="gpu" if job.gpu else "cpu")
        | parent_tags(job.config.parent),
        description=describe_run(job.model, job.config, job.data, most),
    )


def _describe(run: Run, job: TrainingJob) -> None:
    """Tie the run to its data, or to more data if it resumes with other ones, and to its directory."""
    job.data.log_to(run)
    RunRecord.of(run).write(job.directory)


def _show_examples(job: TrainingJob, run: Run) -> None:
    """Print examples of a run that tunes, and keep them with it: what is learned of them must be seen to be right."""
    if job.config.task == "pretrain" or job.loader.position:
        return
    for line in examples(job.data.sources, job.config.seed, Style(colours=sys.stdout.isatty())):
        print(redact(line), flush=True)
    run.log_text("\n".join(examples(job.data.sources, job.config.seed, Style(colours=False))), EXAMPLES_FILE)


def _settings(job: TrainingJob) -> dict[str, dict[str, object]]:
    return {
        "model": job.model.to_dict(),
        "training": job.config.to_dict(),
        "data": job.data.params(),
    }


def _train(job: TrainingJob, run: Run, attempt: Attempt) -> Ending:
    """Run the workers, restarted after failures, until they end."""
    # An earlier launch of the same run may have left it.
    withdraw_stop(job.directory)
    most = job.launch.workers[1]
    plan = WorkerPlan(
        job.model, job.config, job.data.sources, attempt, most, run.run_id, run.uri, secret_variables()
    )

    def stop() -> None:
        # A request of an older attempt would stop the newer one.
        if _may_change(attempt):
            request_stop(job.directory)
            # Mark the run at once: `ray job stop` kills the driver after three seconds.
            run.finish("KILLED")

    return until_signal(lambda: run_workers(plan, job.launch, gpu=job.gpu), stop)


def _register(job: TrainingJob, run: Run, checkpoint: str, attempt: Attempt) -> Outcome:
    """Register the model of the last checkpoint, if the launch asks for that."""
    with local_copy(checkpoint) as local:
        progress = load_progress(local)
        # The last step validates, and so does a run without one.
        assert progress.validation_loss is not None
        version = decision = None
        if job.launch.register_as:
            version, decision = publish(
                run,
                local,
                name=job.launch.register_as,
                precision=job.config.precision,
                policy="never" if job.launch.promote_if else job.launch.promote,
                validation_loss=progress.validation_loss,
                data_fingerprint=job.data.fingerprint,
                tags={"step": str(progress.step), "tokens": str(progress.tokens)}
                | parent_tags(progress.parent),
                description=describe_version(job.model, job.data, progress, job.config.task),
                confirm=attempt.check,
            )
    if version and job.launch.promote_if and job.evaluation:
        attempt.check()
        decision = promote_by_rule(version, job.launch.promote_if, job.evaluation, run, gpu=job.gpu)
    assert progress.loader is not None
    epochs = job.loader.epochs_by_source(progress.loader["position"])
    return Outcome(run.run_id, checkpoint, progress.validation_loss, epochs, version, decision)


def _record_end(job: TrainingJob, run: Run, step: int, outcome: Outcome, attempt: Attempt) -> None:
    """Note that nothing is left to do, for a launch of the same command."""
    attempt.check()
    finished = Finished(
        step=step,
        checkpoint=store.name_of(outcome.checkpoint),
        validation_loss=outcome.validation_loss,
        epochs=outcome.epochs,
        register_as=job.launch.register_as,
        version=outcome.version.uri if outcome.version else None,
    )
    RunRecord.of(run, finished).write(job.directory)


def _finished(job: TrainingJob) -> Outcome | None:
    """Return what came of the run of `job`, if it has taken all steps and is registered as the launch asks."""
    record = RunRecord.read(job.directory)
    if record is None or record.finished is None:
        return None
    finished = record.finished
    loader = job.loader
    schedule = Schedule.of(job.config, loader.timetable, loader.windows_per_epoch, job.branched_at)
    if finished.step < schedule.total_steps or finished.register_as != job.launch.register_as:
        return None
    try:
        version = resolve_version(finished.version) if finished.version else None
    except NotRegistered:
        return None
    checkpoint = store.join(job.directory, finished.checkpoint)
    return Outcome(record.run_id, checkpoint, finished.validation_loss, finished.epochs, version, None)
