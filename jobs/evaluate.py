"""Evaluate models: `python jobs/evaluate.py models:/demo@champion --text book.txt --tasks verse_next_line`."""

from __future__ import annotations

import json
import secrets
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from _cli import add_config, add_fields, from_flags, main, parse, split_commas
from _progress import ProgressLine
from _scorers import add_scorer_flags, at_endpoint, of_checkpoint
from jsonargparse import ArgumentParser, Namespace

from llama_ray.evaluation.comparison import compare
from llama_ray.evaluation.evaluate import EvaluationConfig, Questions, evaluate
from llama_ray.evaluation.results import Evaluation, EvaluationError
from llama_ray.evaluation.texts import located
from llama_ray.pretrained import fixed, load_shape
from llama_ray.storage import store
from llama_ray.storage.paths import absolute, existing, existing_ref, is_model_ref
from llama_ray.utils.errors import first_line, printable
from llama_ray.utils.redact import redact

if TYPE_CHECKING:
    from llama_ray.evaluation.promotion import Rule
    from llama_ray.tracking.versions import Version


class Job:
    """One call: what is asked, of which models, and what becomes of the scores."""

    def __init__(self, flags: Namespace) -> None:
        self._flags, self._line = flags, ProgressLine()
        flags.output = flags.output and _writable(absolute(flags.output))
        self._rule = flags.promote_if and _rule(flags.promote_if)
        self._refs = flags.refs if flags.endpoint else [fixed(existing_ref(ref)) for ref in flags.refs]
        if twice := next((ref for ref in self._refs if self._refs.count(ref) > 1), None):
            raise EvaluationError(f"{redact(twice)} is given twice; give each model once")
        if self._rule and (len(self._refs) > 1 or flags.endpoint or not is_model_ref(self._refs[0])):
            raise EvaluationError("promote_if needs one model, a registered version: models:/NAME/VERSION")
        config = from_flags(
            EvaluationConfig,
            flags,
            tasks=tuple(flags.tasks or ()),
            text=tuple(map(located, flags.text or ())),
            data=tuple(map(located, flags.data or ())),
            include_path=tuple(map(existing, flags.include_path or ())),
        )
        self._questions = Questions.read(self._same_windows(config), self._line.log)

    def run(self) -> None:
        """Evaluate each model, print a table, and keep the results."""
        evaluations: list[Evaluation] = []
        for ref in self._refs:
            evaluations.append(self._evaluate(ref))
            self._write(evaluations)
        self._line.log(compare(evaluations).text())
        if self._flags.mlflow:
            self._record(evaluations)

    def _same_windows(self, config: EvaluationConfig) -> EvaluationConfig:
        """Fix the windows of texts to what all models can read, so that their scores compare."""
        if self._flags.endpoint or not (config.text or config.data):
            return config
        limits = [load_shape(ref).max_seq_len for ref in self._refs]
        if self._flags.max_seq_len is not None:
            limits.append(self._flags.max_seq_len)
        context, stride = config.window(min(limits))
        return replace(config, context=context, stride=stride)

    def _evaluate(self, ref: str) -> Evaluation:
        opened = at_endpoint if self._flags.endpoint else of_checkpoint
        with opened(ref, self._flags) as (scorer, settings):
            evaluation = evaluate(scorer, self._questions, settings, self._line.show)
        self._line.log(f"{evaluation.model}: {len(evaluation.scores)} scores in {evaluation.seconds:.1f} s")
        return evaluation

    def _write(self, evaluations: list[Evaluation]) -> None:
        """Write what is finished to the output directory."""
        if (output := self._flags.output) is None:
            return
        results = json.dumps([asdict(each) for each in evaluations], indent=2, ensure_ascii=False)
        store.write_text(store.join(output, "results.json"), redact(results) + "\n")
        store.write_text(store.join(output, "results.md"), compare(evaluations).markdown())

    def _record(self, evaluations: list[Evaluation]) -> None:
        # MLflow takes seconds to import.
        from llama_ray.evaluation.promotion import promote_if
        from llama_ray.evaluation.recording import record, record_comparison
        from llama_ray.tracking.versions import resolve_version

        experiment = self._flags.experiment
        runs = [record(each, experiment=experiment) for each in evaluations]
        if len(evaluations) > 1:
            record_comparison(runs[-1], compare(evaluations))
        self._line.log(f"MLflow: {', '.join(run.run_id for run in runs)}")
        if self._rule is None:
            return

        def evaluate_champion(version: Version) -> Evaluation:
            evaluation = self._evaluate(version.uri)
            record(evaluation, experiment=experiment)
            return evaluation

        version = resolve_version(self._refs[0])
        decision = promote_if(self._rule, version, evaluations[0], evaluate_champion)
        self._line.log(f"{'promoted' if decision.promoted else 'not promoted'}: {decision.reason}")


def _writable(output: str) -> str:
    """Return `output` once a file was written there. Raises EvaluationError if that fails."""
    probe = store.join(output, f".write-test-{secrets.token_hex(4)}")
    try:
        store.make_directory(output)
        store.write_text(probe, "")
        store.delete(probe)
    except OSError as error:
        raise EvaluationError(
            f"output {printable(output)} cannot be written ({first_line(error)}); give another --output"
        ) from error
    return output


def _rule(text: str) -> Rule:
    from llama_ray.evaluation.promotion import Rule

    return Rule.parse(text)


def run() -> None:
    """Read the flags and run the job."""
    flags = parse(_parser())
    split_commas(flags, ["tasks"])
    Job(flags).run()


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="evaluate.py",
        usage="evaluate.py REF [REF ...] [--text SOURCE ...] [--data DIR ...] [--tasks NAME ...] [FLAG VALUE]...",
        description="Measure models on texts and tasks, side by side.",
    )
    add_config(parser)
    add = parser.add_argument
    add(
        "refs",
        nargs="+",
        type=str,
        help="Models: directories, .gguf files, models:/NAME/VERSION, hf://ORG/NAME; with --endpoint, its names.",
    )
    add_fields(parser, EvaluationConfig)
    add_scorer_flags(parser)
    add(
        "--mlflow",
        type=bool,
        default=True,
        help="Record each evaluation in MLflow, and in the tags of its version.",
    )
    add("--experiment", type=str, help="The MLflow experiment; by default that of the version's training.")
    add(
        "--promote_if",
        type=str,
        help="Make the version the champion if this holds: 'bits_per_byte < champion', 'acc > champion + 0.01'.",
    )
    return parser


if __name__ == "__main__":
    main(run)
