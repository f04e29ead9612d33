"""What a training run evaluates: its checkpoints on the way, and the version that it registers."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

from llama_ray.evaluation.evaluate import EvaluationConfig, Questions
from llama_ray.evaluation.harness.run import bundled_tasks
from llama_ray.evaluation.promotion import Rule, promote_if
from llama_ray.evaluation.recording import metrics, record
from llama_ray.evaluation.results import Evaluation, EvaluationError
from llama_ray.evaluation.texts import located
from llama_ray.orchestration.checkpoint_evaluations import CheckpointEvaluations
from llama_ray.orchestration.evaluation_tasks import Room, evaluate_on_cluster, start_newest
from llama_ray.orchestration.launch import LaunchConfig
from llama_ray.orchestration.run_data import RunData
from llama_ray.storage.attempts import Attempt
from llama_ray.tracking.buffer import BufferedRun
from llama_ray.tracking.registry import PromotionDecision, Version
from llama_ray.tracking.runs import Run
from llama_ray.utils.errors import first_line

_HARNESS = "lm_eval"
_NO_TASKS = "none"


def evaluation_config(launch: LaunchConfig, data: RunData, max_seq_len: int) -> EvaluationConfig | None:
    """Return what the run of a model with `max_seq_len` measures; None if it evaluates nothing.

    By default these are the bundled tasks, if lm_eval is installed, and bits per byte of the validation documents.
    Raises ValueError for what cannot be measured.
    """
    if launch.evaluate_every is None and launch.promote_if is None:
        return None
    tasks = _tasks(launch.evaluate_tasks)
    texts = tuple(map(located, launch.evaluate_text))
    data_texts = () if texts else _validation_texts(data)
    if not (tasks or texts or data_texts):
        raise EvaluationError(
            "there is nothing to evaluate: the data are no text, and evaluate_tasks is none, or lm_eval is not "
            "installed; give --evaluate_text FILE"
        )
    config = EvaluationConfig(
        tasks=tasks, text=texts, data=data_texts, limit=launch.evaluate_limit, context=launch.evaluate_context
    )
    # The champion is measured in the windows of this model.
    context, stride = config.window(max_seq_len)
    config = replace(config, context=context, stride=stride)
    names = [corpus.name for corpus in Questions.read(config).corpora]
    if launch.promote_if is not None and not set(tasks) - set(bundled_tasks()):
        _check_names(Rule.parse(launch.promote_if), [*names, *tasks])
    return config


def _tasks(given: tuple[str, ...]) -> tuple[str, ...]:
    if given == (_NO_TASKS,):
        return ()
    installed = importlib.util.find_spec(_HARNESS) is not None
    if given and not installed:
        raise EvaluationError(
            f"evaluate_tasks needs {_HARNESS}, which is not installed; pip install 'llama-ray[eval]', or give "
            f"--evaluate_tasks {_NO_TASKS}"
        )
    return given or (tuple(bundled_tasks()) if installed else ())


def _check_names(rule: Rule, measured: list[str]) -> None:
    """Raise EvaluationError for a rule about a text or task that is not among the `measured` ones."""
    for condition in rule.conditions:
        name, slash, _ = condition.metric.rpartition("/")
        if slash and name not in measured:
            raise EvaluationError(
                f"promote_if names {condition.metric}, but what is measured is {', '.join(measured)}; name one of them"
            )


@contextmanager
def checkpoints_evaluated(
    attempt: Attempt, launch: LaunchConfig, config: EvaluationConfig | None, run: Run, *, gpu: bool
) -> Iterator[None]:
    """Evaluate checkpoints during the block, into `run`; at its end what is due, unless the block raises."""
    if launch.evaluate_every is None or config is None:
        yield
        return
    workers = launch.workers[1]
    has_room = Room.beside(workers, gpu=gpu) is not None
    if not has_room:
        print(
            f"the cluster has no CPU beside those of {workers} workers, so checkpoints are evaluated when training has "
            "ended; for earlier evaluations add nodes or give a lower --world_size",
            flush=True,
        )
    curves = BufferedRun(run.run_id, run.uri, may_send=attempt.is_newest)
    evaluations = CheckpointEvaluations(
        attempt.run,
        launch.evaluate_every,
        partial(start_newest, attempt.run, launch.evaluate_every, config, workers, gpu),
        lambda step, found: curves.log_metrics(metrics(found), step),
        has_room=has_room,
    )
    try:
        yield
        evaluations.finish()
    finally:
        evaluations.abandon()
        curves.close()


def promote_by_rule(
    version: Version, rule: str, config: EvaluationConfig, run: Run, *, gpu: bool
) -> PromotionDecision:
    """Evaluate `version`, and make it the champion if `rule` holds; see `promote_if`.

    What cannot be evaluated is not promoted. Raises TrackingError.
    """

    def measure(one: Version) -> Evaluation:
        evaluation = evaluate_on_cluster(one.uri, config, gpu=gpu)
        record(evaluation, uri=run.uri)
        return evaluation

    try:
        return promote_if(Rule.parse(rule), version, measure(version), measure, run.uri)
    except EvaluationError as error:
        return PromotionDecision(False, f"version {version.version} was not evaluated: {first_line(error)}")


def _validation_texts(data: RunData) -> tuple[str, ...]:
    """Return the sources whose validation documents are text, each location once."""
    named = {
        source.location: source.name for source in data.sources if data.infos[source.name].task == "pretrain"
    }
    if len(named) == 1:
        return tuple(f"validation={location}" for location in named)
    return tuple(f"{name}={location}" for location, name in named.items())
