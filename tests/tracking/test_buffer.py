"""A tracking server that goes away while a run logs to it, and comes back."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow import MlflowClient

from llama_ray.tracking.buffer import BufferedRun
from llama_ray.tracking.runs import Run


def points(run: Run) -> list[tuple[int, float]]:
    history = MlflowClient(run.uri).get_metric_history(run.run_id, "loss")
    return [(point.step, point.value) for point in sorted(history, key=lambda p: p.timestamp)]


def test_points_arrive_in_order_and_once(new_run: Callable[..., Run]) -> None:
    run = new_run()
    first = BufferedRun(run.run_id, run.uri)
    for step in range(1, 6):
        first.log_metrics({"loss": step / 2}, step)
    assert first.close()
    # A restart from step 3 logs steps 4 and 5 a second time.
    again = BufferedRun(run.run_id, run.uri)
    for step in range(4, 9):
        again.log_metrics({"loss": step / 2}, step)
    assert again.close()
    assert points(run) == [(step, step / 2) for step in range(1, 9)]


def test_an_outage_delays_points_and_never_blocks_logging(new_run: Callable[..., Run], store: str) -> None:
    run = new_run()
    buffered = BufferedRun(run.run_id, run.uri, retry_s=(0.05, 0.1))
    buffered.log_metrics({"loss": 1.0}, 1)
    while buffered.unsent():
        time.sleep(0.01)
    database = Path(store.removeprefix("sqlite:///"))
    with sqlite3.connect(database) as outage:
        outage.execute("ALTER TABLE metrics RENAME TO away")
    start = time.monotonic()
    for step in range(2, 500):
        buffered.log_metrics({"loss": float(step)}, step)
    assert time.monotonic() - start < 1
    kept = buffered.unsent()
    assert len(kept) >= 498
    with sqlite3.connect(database) as outage:
        outage.execute("ALTER TABLE away RENAME TO metrics")
    assert buffered.close(timeout_s=60)
    assert points(run) == [(step, float(step)) for step in range(1, 500)]


def test_points_kept_in_a_checkpoint_are_logged_after_a_crash(new_run: Callable[..., Run]) -> None:
    run = new_run()
    run.log_metrics({"loss": 1.0}, 1)
    after = BufferedRun(run.run_id, run.uri)
    after.restore([[1, 1000, {"loss": 1.0}], [2, 2000, {"loss": 2.0}]])
    after.log_metrics({"loss": 3.0}, 3)
    assert after.close()
    history = {p.step: p for p in MlflowClient(run.uri).get_metric_history(run.run_id, "loss")}
    assert [history[s].value for s in (1, 2, 3)] == [1.0, 2.0, 3.0]
    assert history[2].timestamp == 2000


def test_an_action_sees_the_points_logged_before_it(new_run: Callable[..., Run]) -> None:
    run = new_run()
    buffered = BufferedRun(run.run_id, run.uri)
    seen: list[int] = []
    buffered.log_metrics({"loss": 1.0}, 1)
    buffered.do("curve", lambda r: seen.append(len(r.history("loss"))))
    buffered.log_metrics({"loss": 2.0}, 2)
    assert buffered.close()
    assert seen[-1] >= 1


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What the buffer has logged about what MLflow refused."""
    return lambda: [record.getMessage() for record in caplog.records if "refused" in record.getMessage()]


def test_only_what_mlflow_refuses_is_lost_and_that_is_said_once_at_the_end(
    new_run: Callable[..., Run], said: Callable[[], list[str]]
) -> None:
    run = new_run()
    buffered = BufferedRun(run.run_id, run.uri, retry_s=(60, 60))
    for step in range(1, 200):
        buffered.log_metrics({"loss?" if step == 100 else "loss": float(step)}, step)
    buffered.do("forbidden", lambda r: r.set_tags({"not a name?": "x"}))
    buffered.do("broken", lambda r: r.log_file(Path("/nowhere/at/all"), "profile"))
    buffered.do("good", lambda r: r.log_text("x", "inside.txt"))
    assert not buffered.close(timeout_s=30)
    assert points(run) == [(step, float(step)) for step in range(1, 200) if step != 100]
    assert "inside.txt" in [file.path for file in MlflowClient(run.uri).list_artifacts(run.run_id)]
    [message] = said()
    assert message.startswith(f"MLflow refused 3 points and artifacts of run {run.run_id} (")
    assert "loss?" in message


def test_a_run_that_was_deleted_is_not_asked_for_ever(
    new_run: Callable[..., Run], said: Callable[[], list[str]]
) -> None:
    run = new_run()
    buffered = BufferedRun(run.run_id, run.uri, retry_s=(60, 60))
    buffered.log_metrics({"loss": 1.0}, 1)
    while buffered.unsent():
        time.sleep(0.01)
    MlflowClient(run.uri).delete_run(run.run_id)
    buffered.log_metrics({"loss": 2.0}, 2)
    while buffered.unsent():
        time.sleep(0.01)
    buffered.log_metrics({"loss": 3.0}, 3)
    assert buffered.unsent() == []
    assert not buffered.close(timeout_s=30)
    [message] = said()
    assert f"MLflow refused 2 points and artifacts of run {run.run_id}" in message


def test_whoever_may_not_send_any_more_drops_everything_in_silence(
    new_run: Callable[..., Run], said: Callable[[], list[str]]
) -> None:
    run = new_run()
    allowed = [True]
    buffered = BufferedRun(run.run_id, run.uri, may_send=lambda: allowed[0])
    buffered.log_metrics({"loss": 1.0}, 1)
    while buffered.unsent():
        time.sleep(0.01)
    allowed[0] = False
    buffered.log_metrics({"loss": 2.0}, 2)
    buffered.do("curve", lambda r: r.log_text("", "curve"))
    buffered.close()
    assert points(run) == [(1, 1.0)]
    assert not MlflowClient(run.uri).list_artifacts(run.run_id)
    assert said() == []
