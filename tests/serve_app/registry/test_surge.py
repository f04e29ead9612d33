"""Versions that do not fit beside the one that serves: a standby loads them, and goes again."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app.registry.decisions import HEARING_S
from serve_app.registry.messages import ModelSpec, Standby
from serve_app.registry.replicas import FORGET_S
from serve_app.registry.surge import PLACING_S, ROUTABLE_S
from serve_app.routing.client import deployment_of
from tests.serve_app.registry.helpers import Application, ref
from tests.serve_app.registry.simulation import STANDBY, Simulation

SPEC = ModelSpec("llama", "models:/llama@champion", standby=Standby(STANDBY, 4, "1 GPU"))
NO_ROOM = "it needs 14.2 GiB"


def surging(*replicas: str) -> Application:
    """Version 7 serves from `replicas`, which have no room for version 8."""
    application = Application.serving(7, *replicas, spec=SPEC)
    application.registry(8)
    for name in replicas:
        application.replica(name, {7: "ready", 8: "too_large"}, reason=NO_ROOM)
    return application


def standby(application: Application) -> tuple[int, list[int | None]]:
    """How many replicas the standby is to have at least, and with which versions."""
    [replicas] = application.decisions.standby_replicas().values()
    return replicas, [version.number for version in application.plan(STANDBY).wanted]


def until_switched(application: Application, *replicas: str) -> None:
    """Version 8 is ready on replicas of the standby, and serves as soon as Ray Serve knows them."""
    for name in replicas:
        application.replica(name, {8: "ready"}, deployment=STANDBY)
    assert application.served.current == ref(7)
    for _ in range(round(ROUTABLE_S)):
        application.now += 1
        application.settle()
    application.settle()
    assert application.served.current == ref(8)


def test_a_version_that_does_not_fit_is_loaded_by_as_many_new_replicas_and_serves_then() -> None:
    application = surging("a", "b")
    assert standby(application) == (2, [8])
    assert application.plan(STANDBY).optional
    application.replica("x", {8: "ready"}, deployment=STANDBY)
    application.replica("y", {8: "loading"}, deployment=STANDBY)
    assert application.served.current == ref(7)
    until_switched(application, "x", "y")
    assert deployment_of(application.decisions.table, ref(8)) == STANDBY
    assert deployment_of(application.decisions.table, ref(7)) == SPEC.deployment


def test_the_others_load_it_once_nobody_uses_the_old_version_and_the_standby_goes() -> None:
    application = surging("a")
    until_switched(application, "x")
    application.api("api", 7)
    application.replica("a", {7: "ready", 8: "too_large"})
    # What only it has comes first, also for a replica that starts now.
    assert application.wanted == [7, 8]
    for _ in range(3):
        application.api("api")
    assert application.wanted == [8]
    old = application.decisions.table.revision
    application.replica("a", {8: "ready"})
    assert deployment_of(application.decisions.table, ref(8)) == SPEC.deployment
    # A process of the API that has the old table sends requests there still.
    application.api("api", revision=old)
    assert standby(application) == (1, [8])
    # It has sent one, which waits for a place.
    application.api("api", 8, asked=STANDBY)
    assert standby(application) == (1, [8])
    application.api("api", 8)
    assert standby(application) == (0, [])
    assert (application.served.current, application.wanted) == (ref(8), [8])


def test_a_version_that_fails_on_a_new_replica_is_rejected() -> None:
    application = surging("a")
    application.replica("x", {8: "failed"}, reason="loss is nan", deployment=STANDBY)
    application.api("api")
    assert (application.state(8), standby(application)) == ("rejected", (0, []))
    assert (application.served.current, application.wanted) == (ref(7), [7])


def test_what_a_surge_waits_for_is_said_and_nothing_is_stopped() -> None:
    application = surging("a", "b")
    loading = application.status(8)
    assert loading is not None
    assert loading.reason == f"does not fit beside {ref(7)} ({NO_ROOM}); new replicas load it"
    for _ in range(round(PLACING_S)):
        application.now += 1
        for name in "ab":
            application.replica(name, {7: "ready", 8: "too_large"}, reason=NO_ROOM)
        application.replica("x", {8: "loading"}, deployment=STANDBY)
    waiting = application.status(8)
    assert waiting is not None
    assert waiting.state == "loading"
    assert waiting.reason == (
        f"does not fit beside {ref(7)} ({NO_ROOM}), and no node has 1 GPU free for 1 of 2 new replicas; free that, or "
        "add a node"
    )
    assert (application.served.current, application.wanted) == (ref(7), [7, 8])
    application.replica("x", {8: "too_large"}, reason="it needs 99 GiB", deployment=STANDBY)
    larger = application.status(8)
    assert larger is not None
    assert str(larger.reason).endswith("and not into a new replica: it needs 99 GiB")


def test_a_canary_that_does_not_fit_waits_and_starts_nothing() -> None:
    application = Application.serving(7, "a", spec=replace(SPEC, canary_alias="challenger"))
    application.registry(7, canary=8)
    application.replica("a", {7: "ready", 8: "too_large"}, reason=NO_ROOM)
    assert standby(application) == (0, [])
    status = application.status(8)
    assert status is not None
    assert (status.state, status.reason) == ("loading", NO_ROOM)


def test_a_model_without_standby_waits_for_room() -> None:
    application = Application.serving(7, "a", spec=replace(SPEC, standby=None))
    application.registry(8)
    application.replica("a", {7: "ready", 8: "too_large"}, reason=NO_ROOM)
    assert application.decisions.standby_replicas() == {}
    assert application.wanted == [7, 8]


def test_an_alias_that_moves_on_during_a_surge_takes_the_new_replicas() -> None:
    application = surging("a")
    application.registry(9)
    application.replica("a", {7: "ready", 9: "too_large"})
    application.replica("x", {8: "loading"}, deployment=STANDBY)
    assert standby(application) == (1, [9])
    application.registry(7)
    application.api("api")
    assert standby(application) == (0, [])


def test_moving_back_serves_the_old_version_from_where_it_is() -> None:
    application = surging("a")
    until_switched(application, "x")
    application.registry(7)
    assert application.served.current == ref(7)
    for _ in range(5):
        application.replica("a", {7: "ready"})
        application.api("api")
    assert (standby(application), application.wanted) == ((0, []), [7])


def test_a_surge_outlives_the_follower() -> None:
    application = surging("a")
    remembered = application.decisions.remembered()["llama"]
    again = Application(SPEC, remembered)
    assert standby(again) == (1, [8])
    again.registry(8)
    again.replica("x", {8: "ready"}, deployment=STANDBY)
    assert again.served.current == ref(7)
    again.wait(HEARING_S, a={7: "ready", 8: "too_large"})
    until_switched(again, "x")


EVENT = st.one_of(
    st.tuples(st.just("alias"), st.integers(1, 4)),
    st.tuples(st.just("restart"), st.just(0)),
    st.tuples(st.just("request"), st.just(0)),
    st.tuples(st.just("answer"), st.integers(0, 3)),
    st.tuples(st.just("kill"), st.integers(0, 3)),
    st.tuples(st.just("pass"), st.integers(1, 4)),
)


@settings(max_examples=60, deadline=None)
@pytest.mark.parametrize("keep_previous_s", [0, 5])
@given(events=st.lists(EVENT, max_size=25), replicas=st.integers(1, 2))
def test_whatever_happens_requests_find_their_version_and_in_the_end_it_is_the_aliases(
    keep_previous_s: float, events: list[tuple[str, int]], replicas: int
) -> None:
    simulation = Simulation(replace(SPEC, keep_previous_s=keep_previous_s), replicas)
    simulation.run_until_serving(1)
    for event, number in events:
        simulation.happen(event, number)
        simulation.step()
    simulation.answer_all()
    for _ in range(round(8 * FORGET_S)):
        simulation.step()
    assert simulation.is_at_rest


@pytest.mark.parametrize("then", [1, 3])
def test_an_alias_may_move_on_at_any_moment_of_a_surge(then: int) -> None:
    for first in range(24):
        for second in (0, 1, 8, 16):
            simulation = Simulation(SPEC, 1)
            simulation.run_until_serving(1)
            moves = [("alias", then), ("pass", second), ("alias", 2)]
            for event, number in [("alias", 2), ("pass", first), ("request", 0), *moves]:
                simulation.happen(event, number)
                simulation.step()
            simulation.answer_all()
            for _ in range(round(8 * FORGET_S)):
                simulation.step()
            assert simulation.is_at_rest, (first, second)
