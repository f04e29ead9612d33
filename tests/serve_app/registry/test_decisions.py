from __future__ import annotations

import pytest

from serve_app.registry.decisions import HEARING_S
from serve_app.registry.facts import OutOfReach, Rejection, Remembered
from serve_app.registry.messages import ModelSpec, ReplicaPlan
from serve_app.registry.replicas import FORGET_S
from tests.serve_app.registry.helpers import SPEC, Application, ref, version


def test_nothing_is_said_before_the_registry_answers_and_the_first_ready_replica_serves() -> None:
    application = Application()
    application.replica("a")
    assert application.plan() == ReplicaPlan(0)
    application.registry(7)
    assert application.wanted == [7]
    application.replica("a", {7: "loading"})
    application.replica("b", {7: "ready"})
    assert application.served.current == ref(7)


def test_a_new_version_serves_once_every_replica_has_it_ready() -> None:
    application = Application.serving(7, "a", "b")
    application.registry(8)
    assert application.wanted == [7, 8]
    application.replica("a", {7: "ready", 8: "ready"})
    application.replica("b", {7: "ready", 8: "loading"})
    assert (application.served.current, application.state(8)) == (ref(7), "loading")
    application.replica("b", {7: "ready", 8: "ready"})
    assert (application.served.current, application.state(7)) == (ref(8), "previous")
    assert [(change.kind, change.version.number) for change in application.changes] == [
        ("ended", 7),
        ("current", 8),
    ]


def test_the_old_version_goes_when_all_apis_know_and_none_uses_it() -> None:
    application = Application.serving(7, "a")
    old = application.decisions.table.revision
    application.api("one", 7)
    application.api("two")
    application.registry(8)
    application.replica("a", {7: "ready", 8: "ready"})
    application.api("one", 7)
    application.api("api")
    assert (application.state(7), application.wanted) == ("previous", [8, 7])
    application.api("one")
    # The second may have begun a request since: it has the table from before the switch.
    application.api("two", revision=old)
    assert application.wanted == [8, 7]
    application.api("two")
    assert application.state(7) is None
    assert application.wanted == [8, 7]
    application.api("one")
    application.api("two")
    application.api("api")
    assert application.wanted == [8]


def test_a_version_that_fails_leaves_the_old_one_serving() -> None:
    application = Application.serving(7, "a", "b")
    application.registry(8)
    application.replica("a", {7: "ready", 8: "ready"})
    application.replica("b", {7: "ready", 8: "failed"}, reason="loss is nan")
    assert (application.served.current, application.wanted) == (ref(7), [7])
    status = application.status(8)
    assert status is not None
    assert (status.state, status.reason) == ("rejected", "loss is nan")
    application.replica("b", {7: "ready"})
    application.registry(8)
    assert application.wanted == [7]


def test_a_rejected_version_is_tried_again_after_the_alias_pointed_elsewhere() -> None:
    application = Application.serving(7, "a")
    application.registry(8)
    application.replica("a", {7: "ready", 8: "failed"})
    application.registry(7)
    assert application.state(8) is None
    application.registry(8)
    # The replica has not heard yet that the version was not wanted for a while.
    assert application.wanted == [7]
    application.replica("a", {7: "ready"})
    assert application.wanted == [7, 8]


@pytest.mark.parametrize("state", ["retrying", "too_large", "loading"])
def test_a_load_that_waits_shows_why(state: str) -> None:
    application = Application.serving(7, "a")
    application.registry(8)
    application.replica("a", {7: "ready", 8: state}, reason="the disk is full")
    status = application.status(8)
    assert status is not None
    assert (status.state, status.reason, application.wanted) == ("loading", "the disk is full", [7, 8])


def test_moving_back_to_a_warm_version_switches_with_the_next_look() -> None:
    application = Application.serving(7, "a", spec=ModelSpec("llama", SPEC.ref, keep_previous_s=60))
    application.registry(8)
    both = {7: "ready", 8: "ready"}
    application.wait(20, a=both)
    assert (application.served.current, application.wanted) == (ref(8), [8, 7])
    application.registry(7)
    assert application.served.current == ref(7)
    application.wait(70, a=both)
    assert application.wanted == [7]


def test_the_newest_alias_wins_while_another_version_loads() -> None:
    application = Application.serving(7, "a")
    application.registry(8)
    application.registry(9)
    assert application.wanted == [7, 9]
    application.registry(7)
    assert application.wanted == [7]


def test_a_replica_that_ended_is_not_waited_for() -> None:
    application = Application.serving(7, "a", "b")
    application.registry(8)
    both = {7: "ready", 8: "ready"}
    application.wait(FORGET_S - 2, a=both)
    assert application.served.current == ref(7)
    application.wait(3, a=both)
    assert application.served.current == ref(8)


def test_an_alias_that_is_deleted_changes_nothing_and_is_said() -> None:
    application = Application.serving(7, "a")
    application.registry(None)
    assert (application.served.current, application.wanted) == (ref(7), [7])
    assert application.served.notice == (
        "models:/llama@champion: 'llama' has no alias 'champion'; its aliases: none; serving version 7"
    )


def test_what_does_not_exist_is_refused_at_the_first_start() -> None:
    application = Application()
    application.registry(None)
    plan = application.plan()
    assert plan.wanted == ()
    assert plan.refusal == "models:/llama@champion: 'llama' has no alias 'champion'; its aliases: none"


AWAY = OutOfReach("2026-11-27 12:00:00 UTC", "no MLflow server answers at http://mlflow:5000")


def test_a_registry_out_of_reach_refuses_only_where_nothing_is_recorded() -> None:
    application = Application()
    application.decisions.heard("llama", AWAY)
    application.settle()
    assert application.plan().refusal == AWAY.reason
    application.registry(7)
    assert application.plan().refusal is None
    assert application.wanted == [7]


def test_what_served_last_serves_again_without_the_registry_and_says_so() -> None:
    application = Application(remembered=Remembered(version(7)))
    assert (application.wanted, application.served.current) == ([7], ref(7))
    application.decisions.heard("llama", AWAY)
    application.settle()
    assert application.served.notice == (
        "the registry is out of reach since 2026-11-27 12:00:00 UTC (no MLflow server answers at http://mlflow:5000); "
        "serving version 7, the last one that served"
    )


def test_a_follower_that_comes_back_hears_all_replicas_before_it_switches_or_drops() -> None:
    application = Application(remembered=Remembered(version(7), previous=(version(6),)))
    application.registry(8)
    application.replica("a", {6: "ready", 7: "ready", 8: "ready"})
    assert (application.served.current, application.wanted) == (ref(7), [7, 8, 6])
    application.replica("b", {7: "ready", 8: "loading"})
    application.wait(HEARING_S + 1, a={7: "ready", 8: "ready"}, b={7: "ready", 8: "loading"})
    assert (application.served.current, application.wanted) == (ref(7), [7, 8])


def test_a_follower_that_comes_back_keeps_what_the_alias_meant_before_it_has_heard_all() -> None:
    application = Application(remembered=Remembered(version(7), previous=(version(6),)))
    application.registry(6)
    # Some request may use it: who does is not known yet.
    application.registry(7)
    assert application.wanted == [7, 6]
    application.wait(HEARING_S + 1, a={6: "ready", 7: "ready"})
    assert application.wanted == [7]


def test_a_restart_of_the_follower_does_not_try_a_rejected_version_again() -> None:
    rejected = Rejection(version(8), "loss is nan")
    application = Application(remembered=Remembered(version(7), rejected=(rejected,)))
    application.registry(8)
    application.wait(20, a={7: "ready"})
    assert (application.wanted, application.state(8)) == ([7], "rejected")
    assert application.decisions.remembered()["llama"].rejected == (rejected,)


def test_a_canary_serves_beside_and_ends_with_its_alias() -> None:
    application = Application.serving(7, "a")
    application.registry(7, canary=8)
    assert (application.wanted, application.served.canary) == ([7, 8], None)
    application.replica("a", {7: "ready", 8: "ready"})
    assert (application.served.current, application.served.canary) == (ref(7), ref(8))
    assert application.state(8) == "canary"
    application.registry(7)
    assert application.served.canary is None
    assert application.state(8) == "previous"
    application.wait(3, a={7: "ready", 8: "ready"})
    assert application.wanted == [7]


def test_a_canary_that_is_promoted_serves_at_once() -> None:
    application = Application.serving(7, "a")
    application.registry(7, canary=8)
    application.replica("a", {7: "ready", 8: "ready"})
    before = application.decisions.table.revision
    application.registry(8, canary=8)
    assert application.served.current == ref(8)
    assert application.served.canary is None
    assert (application.state(8), application.state(7)) == ("serving", "previous")
    assert application.decisions.table.revision == before + 1


def test_a_canary_that_fails_does_not_touch_the_champion() -> None:
    application = Application.serving(7, "a")
    application.registry(7, canary=8)
    application.replica("a", {7: "ready", 8: "failed"}, reason="loss is nan")
    assert (application.served.current, application.state(8), application.wanted) == (ref(7), "rejected", [7])
    assert application.served.canary is None


def test_what_no_replica_can_load_any_longer_gives_way() -> None:
    application = Application(remembered=Remembered(version(7)))
    application.registry(8)
    application.wait(HEARING_S, a={7: "failed", 8: "loading"})
    assert [(change.kind, change.version.number) for change in application.changes] == [("lost", 7)]
    application.replica("a", {7: "failed", 8: "ready"})
    assert (application.served.current, application.wanted) == (ref(8), [8])


def test_a_silent_replica_is_stuck_while_others_are_heard() -> None:
    application = Application.serving(7, "a", "b")
    application.wait(59, a={7: "ready"})
    assert application.decisions.take_stuck(application.now) == []
    application.wait(1, a={7: "ready"})
    assert [report.actor for report in application.decisions.take_stuck(application.now)] == ["actor-b"]
    assert application.decisions.take_stuck(application.now) == []


def test_nobody_is_stuck_where_the_follower_itself_was_cut_off() -> None:
    application = Application.serving(7, "a", "b")
    application.now += 100
    application.api("api")
    assert application.decisions.take_stuck(application.now) == []


def test_apis_that_poll_are_counted() -> None:
    application = Application.serving(7, "a")
    application.api("two")
    assert application.decisions.table.apis == 2
    application.wait(FORGET_S + 1, a={7: "ready"})
    assert application.decisions.table.apis == 1
