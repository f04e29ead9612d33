"""Runs of several sources and stages: the same global batches however they are divided, resumed and prolonged."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_ray.data.dataset.batch import Batch
from llama_ray.data.mixtures.mixture import Mixture, cut
from llama_ray.data.mixtures.order import Order, Source
from llama_ray.data.mixtures.stages import Segment, Stage, segments
from llama_ray.data.mixtures.timetable import Timetable
from llama_ray.data.mixtures.weights import shares
from tests.data.mixtures.runs import CLUSTERS, SIZES, STAGES, WEIGHTS, WINDOW, Cluster, close, loaders, take


@st.composite
def plans(draw: st.DrawFn) -> list[Stage]:
    steps = sorted(draw(st.sets(st.integers(1, 12), max_size=4)))
    weights = st.none() | st.fixed_dictionaries(
        {"web": st.integers(1, 3)}, optional={"code": st.integers(0, 2), "math": st.just(1)}
    )
    return [
        Stage(
            from_step=step,
            weights=draw(weights),
            seq_len=draw(st.sampled_from([None, 8, 4, 2, 1])),
            batch_tokens=draw(st.sampled_from([None, 12 * WINDOW, 24 * WINDOW])),
        )
        for step in steps
    ]


@settings(deadline=None, max_examples=12)
@given(stages=plans(), seed=st.integers(0, 99), cluster=st.sampled_from(CLUSTERS))
def test_steps_take_the_windows_of_the_order_one_after_the_other(
    mixture: Mixture, stages: list[Stage], seed: int, cluster: Cluster
) -> None:
    """No token is left out or taken twice at the border of a step or a stage, whatever the length of sequences."""
    workers = loaders(mixture, cluster, stages, seed)
    steps = [take(workers) for _ in range(14)]
    close(workers)
    timetable = workers[0].timetable
    order = Order([Source(*item) for item in SIZES.items()], timetable.phases(), seed)
    sources, windows = order.windows(0, timetable.position_after(14))
    starts = 1000 * sources + WINDOW * windows
    expected = (starts[:, None] + np.arange(WINDOW)).ravel().tolist()
    assert [token for rows in steps for row in rows for token in row] == expected
    for step, rows in enumerate(steps, 1):
        assert {len(row) for row in rows} == {timetable.segment(step).seq_len}


@settings(deadline=None, max_examples=12)
@given(
    stages=plans(),
    changes=st.lists(st.tuples(st.integers(1, 5), st.sampled_from(CLUSTERS)), min_size=1, max_size=3),
)
def test_a_run_goes_on_as_if_undisturbed_on_any_workers(
    mixture: Mixture, stages: list[Stage], changes: list[tuple[int, Cluster]]
) -> None:
    undisturbed = loaders(mixture, CLUSTERS[0], stages)
    workers = loaders(mixture, CLUSTERS[2], stages)
    assert take(workers) == take(undisturbed)
    for steps, cluster in changes:
        position = workers[0].state_dict()
        close(workers)
        workers = loaders(mixture, cluster, stages)
        for worker in workers:
            assert worker.load_state_dict(position)
            assert worker.state_dict() == position
        for _ in range(steps):
            assert take(workers) == take(undisturbed)
    close(workers)
    assert workers[0].state_dict() == undisturbed[0].state_dict()


@settings(deadline=None, max_examples=12)
@given(stages=plans(), done=st.integers(0, 12), ahead=plans())
def test_the_plan_may_change_ahead_of_the_position(
    mixture: Mixture, stages: list[Stage], done: int, ahead: list[Stage]
) -> None:
    """Also with a source that is new; the steps that are done, and those up to the change, stay what they were."""
    before = loaders(mixture, CLUSTERS[0], stages)
    past = [take(before) for _ in range(done)]
    changed = [stage for stage in stages if stage.from_step <= done]
    changed += [stage for stage in ahead if stage.from_step > done]
    more = Mixture(mixture.datasets | {"a-new-one": mixture.datasets["code"]}, WEIGHTS | {"a-new-one": 0.0})
    changed += [Stage(from_step=14, weights={"a-new-one": 1})]
    resumed, fresh = loaders(more, CLUSTERS[0], changed), loaders(more, CLUSTERS[0], changed)
    resumed[0].load_state_dict(before[0].state_dict())
    assert [take(fresh) for _ in range(done)] == past
    assert [take(resumed) for _ in range(done, 15)] == [take(fresh) for _ in range(done, 15)]


@pytest.mark.parametrize(
    ("number", "change", "message"),
    [
        (0, {"seq_len": 2}, r"a stage from step 3 \(seq_len 4.*this run has one from step 3 \(seq_len 2"),
        (
            1,
            {"weights": {"web": 1}},
            r"from step 4 \(seq_len 4, weights math 0.5, web 0.5\); this run .* web 1\)",
        ),
        (1, {"from_step": 5}, "from step 4 .* from step 5"),
        (
            2,
            {"from_step": 6},
            "only this run has a stage from step 6, which is behind step 6 of the checkpoint",
        ),
        (
            1,
            {"from_step": 7},
            "only the checkpoint was trained with a stage from step 4, which is behind step 6",
        ),
    ],
)
def test_a_plan_that_changes_behind_the_position_is_refused(
    mixture: Mixture, number: int, change: dict[str, int], message: str
) -> None:
    before = loaders(mixture, CLUSTERS[0], STAGES)
    for _ in range(6):
        take(before)
    stages = [*STAGES[:number], replace(STAGES[number], **change)]
    [worker] = loaders(mixture, CLUSTERS[0], stages)
    with pytest.raises(
        ValueError, match=f"{message}.*add one from step 7 on, or give --allow_other_data"
    ) as error:
        worker.load_state_dict(before[0].state_dict())
    assert "\n" not in str(error.value)


def test_a_stage_begins_where_the_plan_says_after_another_global_batch(mixture: Mixture) -> None:
    """The steps are those of the plan; what they hold follows from the windows that were taken."""
    before = loaders(mixture, CLUSTERS[0], STAGES)
    for _ in range(5):
        take(before)
    [worker] = loaders(mixture, Cluster(1, 6, 1), STAGES)
    worker.load_state_dict(before[0].state_dict())
    assert (worker.position, worker.timetable.position_after(6)) == (60, 66)
    rows = [take([worker]) for _ in range(6, 10)]
    assert [len(step) for step in rows] == [6 * 2, 24 * 4, 24 * 4, 24]
    assert {token // 1000 for row in rows[-1] for token in row} == {1}
    [again] = loaders(mixture, Cluster(1, 6, 1), STAGES)
    again.load_state_dict(worker.state_dict())
    assert take([again]) == take([worker])


def test_other_data_begin_at_their_first_window_in_the_stage_of_the_step(mixture: Mixture) -> None:
    [worker] = loaders(mixture, CLUSTERS[0], STAGES)
    worker.start_after(8)
    assert worker.position == 0
    assert {token // 1000 for row in take([worker]) for token in row} == {1}
    [again] = loaders(mixture, CLUSTERS[0], STAGES)
    assert again.load_state_dict(worker.state_dict())
    assert take([again]) == take([worker])


@settings(deadline=None, max_examples=50)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 9)), min_size=1, max_size=5),
    windows=st.integers(0, 500),
    done=st.integers(0, 40),
)
def test_the_steps_of_a_timetable_take_what_it_says(
    sizes: list[tuple[int, int]], windows: int, done: int
) -> None:
    parts, from_step = [], 1
    for steps, size in sizes:
        parts.append(Segment(from_step, size, WINDOW, {}))
        from_step += steps
    fresh = Timetable(parts)
    position, step = 0, 0
    while position + fresh.segment(step + 1).windows <= windows:
        position, step = position + fresh.segment(step + 1).windows, step + 1
        assert fresh.position_after(step) == position
    assert fresh.steps_within(windows) == step
    begun = [start for part, start in zip(parts, fresh.starts, strict=True) if part.from_step <= done]
    resumed = Timetable(parts, done, fresh.position_after(done), begun)
    assert resumed.steps_within(windows) == max(step, done)
    assert resumed.starts == fresh.starts


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        (
            [Stage(from_step=5), Stage(from_step=5)],
            "the stage from step 5 comes after one from step 5; write",
        ),
        (
            [Stage(from_step=5, seq_len=3)],
            "the stage from step 5 has seq_len 3; it must divide 8, the seq_len",
        ),
        ([Stage(from_step=5, seq_len=16)], "the stage from step 5 has seq_len 16; it must divide 8"),
        ([Stage(from_step=5, batch_tokens=9)], "step 5 has batch_tokens 9; it must be a multiple of 8"),
        (
            [Stage(from_step=5, weights={"wob": 1})],
            "a weight for 'wob'; the sources are code, math, web; correct",
        ),
    ],
)
def test_a_stage_that_cannot_be_is_refused(stages: list[Stage], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        segments(Segment(1, 4, WINDOW, shares(WEIGHTS)), stages, SIZES)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"from_step": 0}, "stages.from_step is 0; it must be at least 1"),
        ({"from_step": 2, "weights": {"a": 0}}, "the weights of a are all 0"),
        ({"from_step": 2, "seq_len": 0}, "stages.seq_len is 0; it must be at least 1"),
    ],
)
def test_a_stage_with_a_value_out_of_range_is_refused(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Stage(**settings)


def test_workers_that_cannot_share_a_step_are_told_the_numbers_that_can(mixture: Mixture) -> None:
    [*_, worker] = loaders(mixture, Cluster(5, 1, 1), [Stage(from_step=2, batch_tokens=2 * WINDOW)])
    worker.next_global_batch()
    with pytest.raises(
        ValueError, match=r"of 2 sequences from step 2 on cannot be shared by 5 workers; 1, 2 would"
    ):
        worker.next_global_batch()


def test_short_sequences_can_be_shared_by_more_workers_than_there_are_windows(mixture: Mixture) -> None:
    stages = [Stage(from_step=1, seq_len=2, batch_tokens=2 * WINDOW)]
    alone, many = loaders(mixture, Cluster(1, 8, 1), stages), loaders(mixture, Cluster(8, 1, 1), stages)
    for _ in range(9):
        rows = take(many)
        assert len(rows) == 8
        assert rows == take(alone)


def test_a_micro_batch_of_short_sequences_has_no_more_tokens(mixture: Mixture) -> None:
    [worker] = loaders(mixture, Cluster(1, 3, 4), [Stage(from_step=1, seq_len=2)])
    assert [batch.inputs.shape for batch in worker.next_global_batch()] == [(12, 2)] * 4


def test_rows_know_their_source(mixture: Mixture) -> None:
    [worker] = loaders(mixture, Cluster(1, 12, 1), [Stage(from_step=2, seq_len=2)])
    for _ in range(3):
        [batch] = worker.next_global_batch()
        assert batch.sources is not None
        assert torch.equal(batch.sources, batch.inputs[:, 0] // 1000)


def test_documents_of_rows_that_are_cut_begin_where_they_did() -> None:
    starts = torch.tensor([[0, 0, 2, 2, 2, 5, 6, 6], [0, 0, 0, 0, 0, 0, 0, 0]], dtype=torch.int32)
    rows = torch.arange(16).reshape(2, 8)
    parts = cut(Batch(rows, rows + 1, starts, torch.tensor([4, 7])), 4, 1, 3)
    assert parts.starts is not None
    assert parts.sources is not None
    assert parts.inputs.tolist() == [[4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]
    assert parts.starts.tolist() == [[0, 1, 2, 2], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert parts.starts.dtype == torch.int32
    assert parts.sources.tolist() == [4, 7, 7]


def test_without_weights_sources_are_weighted_by_size(mixture: Mixture) -> None:
    by_size = Mixture(mixture.datasets).shares(WINDOW)
    assert by_size == shares({name: float(size) for name, size in SIZES.items()})


def test_repetitions_are_counted_by_source(mixture: Mixture) -> None:
    [worker] = loaders(mixture, Cluster(1, 12, 1), [Stage(from_step=3, weights={"math": 1})])
    epochs = worker.epochs_by_source(worker.timetable.position_after(4))
    assert epochs["math"] == pytest.approx(24 / 5)
    assert 17 * epochs["code"] + 40 * epochs["web"] == pytest.approx(24)
