"""Run tasks of lm-evaluation-harness by name, and return their scores."""

from __future__ import annotations

import functools
import json
import logging
import math
import random
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np

from llama_ray.evaluation.harness.hub import is_offline, offline_unless_reached
from llama_ray.evaluation.results import EvaluationError, Score, fingerprint
from llama_ray.evaluation.scoring import Report, Scorer, no_report
from llama_ray.utils.errors import one_line
from llama_ray.utils.fields import shown

BUNDLED = Path(__file__).parent.parent / "tasks"
"""The tasks that ship with the project and need no network."""

_BOOTSTRAP_ITERS = 1000
"""For the standard errors of metrics that have no formula; lm_eval's 100,000 take longer than the model."""
# What decides a task's numbers beside its documents, the model and the versions of software.
_SETTINGS = (
    "description",
    "doc_to_choice",
    "doc_to_target",
    "doc_to_text",
    "fewshot_delimiter",
    "filter_list",
    "generation_kwargs",
    "metric_list",
    "num_fewshot",
    "output_type",
    "repeats",
    "target_delimiter",
)


@dataclass(frozen=True)
class TaskSettings:
    """How tasks are presented; the fields are those of `EvaluationConfig`."""

    num_fewshot: int | None = None
    limit: int | None = None
    include_path: tuple[str, ...] = ()
    apply_chat_template: bool = False
    fewshot_as_multiturn: bool = True
    system_instruction: str | None = None
    seed: int = 1234


def run_tasks(
    scorer: Scorer, tasks: Sequence[str], settings: TaskSettings, report: Report = no_report
) -> list[Score]:
    """Return the scores of tasks, groups or tags of lm_eval, in their order.

    Names are looked for in `settings.include_path`, then among the bundled tasks, then among those of lm_eval, which
    need the Hugging Face hub. Raises EvaluationError for an unknown name, for a task whose data cannot be had, and for
    one that the model cannot answer.
    """
    _check_folders(settings.include_path)
    # Your own task files may name data on the hub.
    needs_hub = bool(settings.include_path) or not set(tasks) <= set(bundled_tasks())
    with offline_unless_reached(needed=needs_hub):
        return _run(scorer, tasks, settings, report)


def _run(scorer: Scorer, tasks: Sequence[str], settings: TaskSettings, report: Report) -> list[Score]:
    _import_quietly()
    from lm_eval.evaluator import evaluate

    from llama_ray.evaluation.harness.model import HarnessModel

    manager = _manager(settings.include_path, False)
    if missing := _missing(manager, tasks):
        manager = _manager(settings.include_path, True)
    if unknown := [name for name in tasks if name not in manager.all_tasks and not Path(name).is_file()]:
        raise EvaluationError(
            f"tasks has {shown(unknown[0])}, which is no task; choose among the bundled ones "
            f"({', '.join(bundled_tasks())}), lm_eval's (`lm-eval ls tasks`) or your own (--include_path)"
        )
    try:
        # Its progress bars and notes are no results.
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            found = evaluate(
                lm=HarnessModel(scorer, report, settings.seed),
                task_dict=_loaded(manager, tasks, settings),
                limit=settings.limit,
                bootstrap_iters=_BOOTSTRAP_ITERS,
                system_instruction=settings.system_instruction,
                apply_chat_template=settings.apply_chat_template,
                fewshot_as_multiturn=settings.fewshot_as_multiturn and settings.apply_chat_template,
            )
    except EvaluationError:
        raise
    except Exception as error:
        # lm_eval, datasets and the user's own task files raise anything.
        raise EvaluationError(_why(error, missing)) from error
    return _scores(dict(found or {}), settings)


# To read lm_eval's own task files takes seconds, and several models are asked the same.
@functools.lru_cache(maxsize=2)
def _manager(include_path: tuple[str, ...], defaults: bool) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=[str(BUNDLED), *include_path], include_defaults=defaults)


def _loaded(manager: Any, tasks: Sequence[str], settings: TaskSettings) -> Any:
    """Load tasks and seed what draws, as `lm_eval.simple_evaluate` does it."""
    random.seed(settings.seed)
    np.random.seed(settings.seed)
    loaded = manager.load(list(tasks))
    for task in loaded["tasks"].values():
        default = task.get_config("num_fewshot")
        # A task that says 0 means it.
        if settings.num_fewshot is not None and default != 0:
            task.set_config(key="num_fewshot", value=settings.num_fewshot)
        elif default is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=settings.seed)
    return loaded


def bundled_tasks() -> list[str]:
    """Return the names of the tasks that ship with the project."""
    return sorted(file.stem for file in BUNDLED.glob("*.yaml"))


def _scores(found: Mapping[str, Any], settings: TaskSettings) -> list[Score]:
    scores = []
    for task, metrics in found["results"].items():
        for key, value in metrics.items():
            metric, comma, kind = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = metrics.get(f"{metric}_stderr,{kind}")
            values = _values(found, task, metric, kind, float(value))
            scores.append(
                Score(
                    task,
                    metric if kind == "none" else key,
                    float(value),
                    float(stderr) if isinstance(stderr, int | float) and math.isfinite(stderr) else None,
                    _samples(found, task),
                    higher_is_better=bool(found["higher_is_better"].get(task, {}).get(metric, True)),
                    fingerprint=_fingerprint(found, task, settings),
                    values=values,
                )
            )
    return scores


def _values(found: Mapping[str, Any], task: str, metric: str, kind: str, mean: float) -> tuple[float, ...]:
    """Return what each document adds to a metric that is a mean; nothing for other metrics."""
    values = [
        sample[metric]
        for sample in found["samples"].get(task, ())
        if sample["filter"] == kind and metric in sample
    ]
    if not values or not all(isinstance(value, int | float) for value in values):
        return ()
    return tuple(map(float, values)) if math.isclose(math.fsum(values) / len(values), mean) else ()


def _samples(found: Mapping[str, Any], task: str) -> int:
    if task in found["n-samples"]:
        return int(found["n-samples"][task]["effective"])
    return sum(_samples(found, each) for each in found["group_subtasks"].get(task, ()))


def _fingerprint(found: Mapping[str, Any], task: str, settings: TaskSettings) -> str:
    """Return a digest of a task's documents and of how they are presented; of a group, those of its tasks."""
    if task not in found["n-samples"]:
        return fingerprint(
            [_fingerprint(found, each, settings) for each in found["group_subtasks"].get(task, ())]
        )
    config = found["configs"][task]
    documents = sorted({(s["doc_id"], s["doc_hash"], s["target_hash"]) for s in found["samples"][task]})
    return fingerprint(
        {
            "version": str(found["versions"].get(task)),
            "documents": documents,
            # Functions come as their source, as far as lm_eval can read it.
            "config": json.loads(json.dumps({name: config.get(name) for name in _SETTINGS}, default=str)),
            "chat": settings.apply_chat_template and settings.fewshot_as_multiturn + 1,
            "system": settings.system_instruction,
            "seed": settings.seed,
        }
    )


def _check_folders(folders: Sequence[str]) -> None:
    for folder in folders:
        if not Path(folder).is_dir():
            raise EvaluationError(f"include_path is {shown(folder)}; it must be a folder of task files")


def _missing(manager: Any, tasks: Sequence[str]) -> list[str]:
    """Return which of `tasks`, and of what their groups consist of, `manager` does not know."""
    wanted = [name for name in tasks if not Path(name).is_file()]
    for name in wanted:
        entry = manager.task_index.get(name)
        members = ((entry and entry.cfg) or {}).get("task")
        # Those of a group; of a task it is the name.
        for member in members if isinstance(members, list) else ():
            each = member.get("task") if isinstance(member, dict) else member
            wanted += [each] if isinstance(each, str) and each not in wanted else []
    return [name for name in wanted if name not in manager.task_index]


def _import_quietly() -> None:
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise EvaluationError(
            f"tasks need lm-eval ({one_line(error)}); install it with `pip install 'llama-ray[eval]'`, or measure "
            "--text and --data, which need nothing"
        ) from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)


def _why(error: Exception, missing: Sequence[str]) -> str:
    reason = f"{type(error).__name__}: {one_line(error)}"
    if missing and is_offline():
        return (
            f"the data of {', '.join(missing)} are on the Hugging Face hub, which this machine does not reach, and not "
            f"in its cache ({shown(reason)}); give bundled tasks ({', '.join(bundled_tasks())}), or unset "
            "HF_HUB_OFFLINE where there is a network"
        )
    return f"lm_eval cannot run the tasks: {reason}"
