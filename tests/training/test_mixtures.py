"""A run over several sources and stages, on one worker: its losses, its positions, its checks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llama_ray.data.mixtures.sources import DataSource
from llama_ray.data.mixtures.stages import Stage
from llama_ray.model.config import LlamaConfig
from llama_ray.storage.run_directory import checkpoint_name
from llama_ray.training.checkpointing.progress import Progress, load_progress
from llama_ray.training.config import Schedule, TrainConfig
from llama_ray.training.elastic import for_workers
from llama_ray.training.hosts.interrupt import Interrupt, Stopped
from llama_ray.training.loop import train
from llama_ray.training.parallel.process_group import world_size
from llama_ray.training.reporting.observer import Console, Metrics
from tests.token_data import write_dataset
from tests.training.helpers import CPU, FinishedRun, Recorder, in_processes, losses, losses_after

SEQ_LEN = 32
STAGES = (
    Stage(from_step=1, seq_len=8),
    Stage(from_step=4, seq_len=SEQ_LEN, weights={"web": 1}),
    Stage(from_step=7, weights={"code": 1, "web": 1}, batch_tokens=16 * SEQ_LEN),
)
CONFIG = TrainConfig(
    max_steps=10, batch_size=8, learning_rate=3e-3, log_every=1, validate_every=5, checkpoint_every=5,
    precision="fp32", stages=STAGES,
)  # fmt: skip


@pytest.fixture(scope="module")
def sources(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[DataSource, ...]:
    other = write_dataset(tmp_path_factory.mktemp("data") / "other")
    return DataSource("code", str(dataset), 0.25), DataSource("web", str(other), 0.75)


def run(
    tiny: LlamaConfig,
    sources: tuple[DataSource, ...],
    directory: Path,
    config: TrainConfig = CONFIG,
    **options: Any,
) -> FinishedRun:
    recorder = Recorder()
    progress = train(
        tiny, config, sources, device=CPU, observer=recorder, output_dir=str(directory), **options
    )
    return FinishedRun(recorder, progress, directory)


@pytest.fixture(scope="module")
def mixed(
    tiny: LlamaConfig, sources: tuple[DataSource, ...], tmp_path_factory: pytest.TempPathFactory
) -> FinishedRun:
    return run(tiny, sources, tmp_path_factory.mktemp("run"))


def test_the_loss_of_each_source_is_logged_where_the_step_has_it(mixed: FinishedRun) -> None:
    points = mixed.recorder.points
    assert all("loss/train/code" in points[step] for step in (1, 2, 3, 7, 8, 9, 10))
    for step in (4, 5, 6):
        assert points[step]["loss/train/web"] == pytest.approx(points[step]["loss/train"], rel=1e-6)
        assert "loss/train/code" not in points[step]
    found = mixed.recorder.validations[10]
    # Both sources have as many validation tokens.
    of_sources = [found["loss/validation/code"], found["loss/validation/web"]]
    assert sum(of_sources) / 2 == pytest.approx(found["loss/validation"])


def test_progress_counts_what_each_stage_takes(mixed: FinishedRun) -> None:
    assert mixed.progress.tokens == (6 * 8 + 4 * 16) * SEQ_LEN
    last = mixed.recorder.points[10]
    assert last["progress/tokens"] == mixed.progress.tokens
    assert last["progress/epoch/web"] > last["progress/epoch/code"] > 0
    assert last["loss/train"] < mixed.recorder.points[1]["loss/train"] - 0.5
    assert 0 < last["throughput/mfu"] < 1


def test_a_resumed_mixture_has_the_same_losses_to_the_bit(
    mixed: FinishedRun, tiny: LlamaConfig, sources: tuple[DataSource, ...], tmp_path: Path
) -> None:
    resumed = run(tiny, sources, tmp_path, resume_from=mixed.checkpoint(5))
    assert losses(resumed.recorder) == losses_after(5, losses(mixed.recorder))
    assert load_progress(tmp_path / checkpoint_name(10)) == load_progress(mixed.checkpoint(10))


def test_a_run_is_prolonged_with_a_stage_and_a_source_that_are_new(
    mixed: FinishedRun, tiny: LlamaConfig, sources: tuple[DataSource, ...], tmp_path: Path
) -> None:
    more = (DataSource("books", sources[1].location, 0.0), *sources)
    stages = (*STAGES, Stage(from_step=9, weights={"books": 1}))
    config = replace(CONFIG, stages=stages, max_steps=12)
    prolonged = run(tiny, more, tmp_path, config, resume_from=mixed.checkpoint(5)).recorder
    # The learning rate follows the new length of the run, the data do not.
    assert prolonged.points[7].keys() == mixed.recorder.points[7].keys() | {"progress/epoch/books"}
    assert {name for name in prolonged.points[12] if name.startswith("loss/train/")} == {"loss/train/books"}


def test_a_finished_run_is_validated_again_with_a_source_that_is_new(
    mixed: FinishedRun, tiny: LlamaConfig, sources: tuple[DataSource, ...], tmp_path: Path
) -> None:
    more = (DataSource("books", sources[1].location, 0.0), *sources)
    again = run(tiny, more, tmp_path, resume_from=mixed.checkpoint(10)).recorder
    assert "loss/validation/books" in again.validations[10]


def test_a_stage_that_has_begun_cannot_be_changed(
    mixed: FinishedRun, tiny: LlamaConfig, sources: tuple[DataSource, ...]
) -> None:
    config = replace(CONFIG, stages=(STAGES[0], replace(STAGES[1], weights={"code": 1}), STAGES[2]))
    with pytest.raises(
        ValueError, match=r"stage from step 4 .*weights web 1.*weights code 1.* from step 6 on"
    ):
        train(tiny, config, sources, device=CPU, observer=Console(), resume_from=mixed.checkpoint(5))


def test_a_limit_of_repetitions_is_kept_when_the_run_is_planned(
    tiny: LlamaConfig, sources: tuple[DataSource, ...]
) -> None:
    config = replace(CONFIG, max_steps=2000, max_repetitions=5)
    with pytest.raises(
        ValueError,
        match=r"max_repetitions is 5; up to step 2,000 the run goes \d+\.\d\d times through source code",
    ):
        train(tiny, config, sources, device=CPU, observer=Console())
    scarce = (replace(sources[0], max_repetitions=0.01), sources[1])
    with pytest.raises(ValueError, match=r"max_repetitions is 0.01; up to step 10 the run goes 0.\d\d times"):
        train(tiny, CONFIG, scarce, device=CPU, observer=Console())


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        (Stage(from_step=4, seq_len=12), "the stage from step 4 has seq_len 12; it must divide 32"),
        (Stage(from_step=4, weights={"wiki": 1}), "a weight for 'wiki'; the sources are code, web"),
        (Stage(from_step=1000), "the stage from step 1000 comes after the run, which has 10 steps"),
        (Stage(from_step=4, batch_tokens=10**6 * SEQ_LEN), "one step takes 1,000,000 samples from step 4 on"),
    ],
)
def test_a_stage_that_cannot_be_trained_is_refused_before_the_first_step(
    tiny: LlamaConfig, sources: tuple[DataSource, ...], stage: Stage, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        train(tiny, replace(CONFIG, stages=(stage,)), sources, device=CPU, observer=Console())


def test_sources_with_different_tokenizers_are_refused(
    tiny: LlamaConfig, sources: tuple[DataSource, ...], tmp_path: Path
) -> None:
    other = DataSource("other", str(write_dataset(tmp_path / "other", vocab_size=300)), 1.0)
    with pytest.raises(
        ValueError, match=r"source other \(.*other\) has another tokenizer .* than source code"
    ):
        train(tiny, CONFIG, (*sources, other), device=CPU, observer=Console())


def test_a_run_that_resumes_in_another_stage_is_compiled_as_it_was_before(
    tiny: LlamaConfig, sources: tuple[DataSource, ...], tmp_path: Path
) -> None:
    stage = Stage(from_step=2, batch_tokens=8 * CONFIG.batch_size * SEQ_LEN)
    config = replace(CONFIG, max_steps=20_000, stages=(stage,))
    said: list[str] = []

    class Reasons(Recorder):
        def started(self, schedule: Schedule, progress: Progress, layout: str) -> None:
            said.append(layout)
            super().started(schedule, progress, layout)

    for resume_from in (None, tmp_path / checkpoint_name(2)):
        with pytest.raises(Stopped):
            train(
                tiny, config, sources, device=CPU, observer=Reasons(), output_dir=str(tmp_path),
                resume_from=resume_from, poll_interrupt=lambda: Interrupt.STOP,
            )  # fmt: skip
    assert said[0] == said[1]


def on_workers(model: LlamaConfig, sources: tuple[DataSource, ...], resume_from: Path) -> dict[int, Metrics]:
    recorder = Recorder()
    config = for_workers(CONFIG, world_size(), planned=1)
    train(model, config, sources, device=CPU, observer=recorder, resume_from=resume_from)
    return recorder.points


def test_a_run_goes_on_with_more_workers_and_sees_the_same_samples(
    mixed: FinishedRun, tiny: LlamaConfig, sources: tuple[DataSource, ...]
) -> None:
    """Over the border of a stage, whose global batch is another one."""
    for points in in_processes(2, on_workers, tiny, sources, mixed.checkpoint(5)):
        for step in range(6, 11):
            names = {name for name in points[step] if name.startswith(("loss/", "progress/"))}
            assert {"loss/train", "loss/train/web", "progress/epoch/web"} <= names
            ours, theirs = (
                {name: run[step][name] for name in names} for run in (points, mixed.recorder.points)
            )
            assert ours == pytest.approx(theirs, abs=1e-4)


def test_the_console_shows_the_validation_loss_of_each_source(capsys: pytest.CaptureFixture[str]) -> None:
    of_sources = {"loss/validation/code": 1.25, "loss/validation/web": 2.75}
    Console().validated(10, {"loss/validation": 2.0, "validation/perplexity": 7.389, **of_sources}, None)
    assert capsys.readouterr().out == (
        "step 10  validation loss 2.0000  perplexity 7.39  code 1.2500  web 2.7500\n"
    )
