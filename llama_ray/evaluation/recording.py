"""An evaluation in MLflow: a run with tables, the metrics of the model, the tags of its version; and read back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from llama_ray.evaluation.comparison import Comparison
from llama_ray.evaluation.figures import comparison_figure
from llama_ray.evaluation.results import Evaluation, EvaluationError
from llama_ray.storage.paths import is_model_ref
from llama_ray.tracking.endings import ended
from llama_ray.tracking.measurements import (
    Measurement,
    experiment_of,
    log_measurements,
    log_table,
    read_artifact,
    replace_section,
    replace_tags,
)
from llama_ray.tracking.runs import Run
from llama_ray.tracking.tags import standard_tags
from llama_ray.tracking.versions import Version, resolve_version
from llama_ray.utils.redact import redact

DEFAULT_EXPERIMENT = "llama-ray"
_TAGS, _METRICS = "evaluation.", "scores/"
"""Before the names of a version's tags, and before those of metrics: MLflow sorts groups of charts by name, and losses
come first."""
_FILE, _TABLE = "evaluation.json", "scores.json"

Table = Mapping[str, Sequence[object]]
"""Columns of equal length, by name."""


def record(
    evaluation: Evaluation,
    *,
    experiment: str | None = None,
    tables: Mapping[str, Table] | None = None,
    uri: str | None = None,
) -> Run:
    """Log `evaluation` as a finished MLflow run, and to the version that was evaluated, if it is a registered one.

    The run belongs to `experiment`, by default to that of the run which trained the version. Its table of scores, and
    the further `tables` by name, are shown by the UI; `evaluation.json` has everything. The tags `evaluation.*` of the
    version, and the table in its description, are those of its last evaluation. Raises TrackingError.
    """
    version = resolve_version(evaluation.model, uri) if is_model_ref(evaluation.model) else None
    experiment = experiment or (version and experiment_of(version, uri)) or DEFAULT_EXPERIMENT
    run = Run.create(
        experiment=experiment,
        name=f"evaluation of {_short(evaluation.model)}",
        params={"model": evaluation.model, **evaluation.settings},
        tags={
            **standard_tags(world_size=1, device=str(evaluation.settings.get("device") or "cpu")),
            "evaluation.model": evaluation.model,
            "evaluation.fingerprint": evaluation.settings_fingerprint,
        },
        description=describe(evaluation),
        uri=uri,
    )
    with ended(run):
        _log(run, evaluation, version, tables or {})
    if version:
        replace_tags(version, _TAGS, _tags(evaluation, run), uri)
        replace_section(version, "Evaluation", describe(evaluation), uri)
    return run


def record_comparison(run: Run, comparison: Comparison) -> None:
    """Store the table and the picture of `comparison` as artifacts of `run`. Raises TrackingError."""
    log_table(run, comparison.columns(), "comparison_scores.json")
    run.log_text(comparison.markdown(), "comparison.md")
    run.log_figure(comparison_figure(comparison), "comparison.png")


def recorded(version: Version, uri: str | None = None) -> Evaluation | None:
    """Return the last evaluation of `version`; None without one that can still be read."""
    text = read_artifact(version.tags.get(f"{_TAGS}run_id", ""), _FILE, uri)
    try:
        return Evaluation.from_json(text) if text else None
    except EvaluationError:
        return None


def metrics(evaluation: Evaluation) -> dict[str, float]:
    """Return what a run shows of the scores: `scores/TASK/METRIC` -> value, and `..._stderr` where one is known."""
    return {one.metric: one.value for one in _measurements(evaluation)}


def describe(evaluation: Evaluation) -> str:
    """Return the scores as a Markdown table, for people."""
    lines = [
        f"Scores of `{evaluation.model}`.",
        "",
        "| task | metric | score | standard error | samples |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {score.task} | {score.metric} {'↑' if score.higher_is_better else '↓'} | {score.value:.4f} "
        f"| {'' if score.stderr is None else f'{score.stderr:.4f}'} | {score.samples:,} |"
        for score in evaluation.scores
    ]
    return "\n".join(lines)


def _log(run: Run, evaluation: Evaluation, version: Version | None, tables: Mapping[str, Table]) -> None:
    step = version.tags.get("step", "") if version else ""
    log_measurements(run, _measurements(evaluation), version, int(step) if step.isdecimal() else 0)
    run.log_text(redact(evaluation.to_json()), _FILE)
    log_table(run, _scores_table(evaluation), _TABLE)
    for name, table in tables.items():
        log_table(run, table, f"{name}.json")


def _measurements(evaluation: Evaluation) -> list[Measurement]:
    found = []
    for score in evaluation.scores:
        name = _METRICS + score.name
        found.append(Measurement(name, score.value, score.task, score.fingerprint))
        if score.stderr is not None:
            found.append(Measurement(f"{name}_stderr", score.stderr, score.task, score.fingerprint))
    return found


def _scores_table(evaluation: Evaluation) -> Table:
    scores = evaluation.scores
    return {
        "task": [score.task for score in scores],
        "metric": [score.metric for score in scores],
        "score": [score.value for score in scores],
        "standard error": [score.stderr for score in scores],
        "samples": [score.samples for score in scores],
        "better": ["higher" if score.higher_is_better else "lower" for score in scores],
        "fingerprint": [score.fingerprint for score in scores],
    }


def _tags(evaluation: Evaluation, run: Run) -> dict[str, str]:
    """Return the tags of a version: of each metric also the first score without its task, such as `bits_per_byte`."""
    first = {score.metric: repr(float(score.value)) for score in reversed(evaluation.scores)}
    scores = {f"{score.task}.{score.metric}": repr(float(score.value)) for score in evaluation.scores}
    return first | scores | {"fingerprint": evaluation.settings_fingerprint, "run_id": run.run_id}


def _short(model: str) -> str:
    return "/".join(redact(model).removeprefix("models:/").rstrip("/").split("/")[-2:])
