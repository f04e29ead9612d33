"""Evaluate one model: texts, prepared data and tasks, as a configuration names them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from llama_ray.evaluation.bits import DEFAULT_CONTEXT, check_windows, measure
from llama_ray.evaluation.results import Evaluation, EvaluationError, Score, Setting
from llama_ray.evaluation.scoring import Report, Scorer
from llama_ray.evaluation.texts import Corpus, Notice, check_names, read_data, read_text
from llama_ray.utils.fields import check_fields, limits

Progress = Callable[[str], None]
"""Takes a line that replaces its predecessor."""


def _silent(line: str) -> None:
    """Say nothing."""


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What to measure, and how.

    Raises EvaluationError if there is nothing to measure, and ValueError for numbers out of range.

    Args:
        tasks: Tasks, groups or tags of lm-evaluation-harness: bundled ones, its own, or yours (include_path).
        text: Texts for bits per byte and perplexity: a file, folder, glob, URI or `builtin`, or NAME=SOURCE.
        data: Prepared data, or NAME=LOCATION: bits per byte and perplexity of the validation split.
        context: Tokens that a window of text holds; None takes 2048 or, if that is less, the model's limit.
        stride: New tokens of a window after the first: each token sees at least context - stride tokens before it; None
            takes half of context.
        num_fewshot: Examples before each question; None leaves it to the task.
        limit: Documents of each task, text and data, the first ones; None takes all.
        apply_chat_template: Ask tasks in the chat template of the model.
        fewshot_as_multiturn: With the chat template, few-shot examples are turns of the conversation.
        system_instruction: With or without the chat template, what stands before each prompt.
        include_path: Folders with your own task files, which go before others of the same name.
        seed: Of few-shot examples that are drawn, and of tasks that sample.
    """

    tasks: tuple[str, ...] = ()
    text: tuple[str, ...] = ()
    data: tuple[str, ...] = ()
    context: int | None = field(default=None, metadata=limits(1))
    stride: int | None = field(default=None, metadata=limits(1))
    num_fewshot: int | None = field(default=None, metadata=limits(0))
    limit: int | None = field(default=None, metadata=limits(1))
    apply_chat_template: bool = False
    fewshot_as_multiturn: bool = True
    system_instruction: str | None = None
    include_path: tuple[str, ...] = ()
    seed: int = field(default=1234, metadata=limits(0))

    def __post_init__(self) -> None:
        check_fields(self)
        if not (self.tasks or self.text or self.data):
            raise EvaluationError(
                "there is nothing to measure; give --text FILE, --data DIR or --tasks NAME (bundled: "
                "see docs/evaluation.md)"
            )

    def window(self, max_seq_len: int) -> tuple[int, int]:
        """Return `context` and `stride` for a model with this limit. Raises EvaluationError for what it cannot read."""
        context = min(DEFAULT_CONTEXT, max_seq_len) if self.context is None else self.context
        stride = max(context // 2, 1) if self.stride is None else self.stride
        check_windows(context, stride, max_seq_len)
        return context, stride


@dataclass(frozen=True)
class Questions:
    """A configuration with its texts read: what several models are asked."""

    config: EvaluationConfig
    corpora: tuple[Corpus, ...]

    @classmethod
    def read(cls, config: EvaluationConfig, notice: Notice = _silent) -> Questions:
        """Read all texts. Raises ValueError for what cannot be read, and for two of one name."""
        check_names((*config.text, *config.data), config.tasks)
        texts = [read_text(text, config.limit, notice) for text in config.text]
        return cls(config, (*texts, *(read_data(data, config.limit) for data in config.data)))


def evaluate(
    scorer: Scorer,
    questions: Questions,
    settings: dict[str, Setting] | None = None,
    progress: Progress = _silent,
) -> Evaluation:
    """Return the scores of a model; `settings` are noted beside them.

    Raises EvaluationError for what cannot be measured.
    """
    config = questions.config
    context, stride = config.window(scorer.max_seq_len)
    started = time.monotonic()
    scores: list[Score] = []
    if questions.corpora:
        scores += measure(scorer, questions.corpora, context, stride, _report(progress, "texts"))
    if config.tasks:
        # Only here, because it needs lm_eval.
        from llama_ray.evaluation.harness.run import TaskSettings, run_tasks

        task_settings = TaskSettings(
            num_fewshot=config.num_fewshot,
            limit=config.limit,
            include_path=config.include_path,
            apply_chat_template=config.apply_chat_template,
            fewshot_as_multiturn=config.fewshot_as_multiturn,
            system_instruction=config.system_instruction,
            seed=config.seed,
        )
        scores += run_tasks(scorer, config.tasks, task_settings, _report(progress, "tasks"))
    noted: dict[str, Setting] = {
        "tasks": ",".join(config.tasks),
        "text": ",".join(config.text),
        "data": ",".join(config.data),
        "num_fewshot": config.num_fewshot,
        "limit": config.limit,
        "apply_chat_template": config.apply_chat_template,
        **({"context": context, "stride": stride} if questions.corpora else {}),
        **(settings or {}),
    }
    return Evaluation(scorer.model, tuple(scores), time.monotonic() - started, noted)


def _report(progress: Progress, name: str) -> Report:
    started = time.monotonic()

    def report(done: int, total: int) -> None:
        progress(f"{name}: {done:,} of {total:,} requests, {time.monotonic() - started:.0f} s")

    return report
