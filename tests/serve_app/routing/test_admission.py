"""How many requests may be under way: what replicas take and what may wait, over all processes of the API."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.errors import ApiError
from serve_app.routing.admission import Admission, QueueLimit


def admitted(admission: Admission, replicas: int, apis: int, most: int = 500) -> int:
    """Return how many requests get in at once."""
    with ExitStack() as held:
        for number in range(most):
            try:
                held.enter_context(admission.enter("m", replicas, apis))
            except ApiError:
                return number
    return most


@given(st.integers(0, 5), st.integers(1, 30), st.integers(1, 60), st.integers(1, 4))
def test_all_processes_together_hold_what_replicas_take_and_what_may_wait(
    replicas: int, ongoing: int, queued: int, apis: int
) -> None:
    whole = replicas * ongoing + queued
    together = sum(
        admitted(Admission({"m": QueueLimit(ongoing, queued)}), replicas, apis) for _ in range(apis)
    )
    # Less than one place for each process is lost; a process without a place would refuse everything.
    assert max(whole - apis, 0) < together <= max(whole, apis)


def test_places_are_free_again_and_models_do_not_share_them() -> None:
    admission = Admission({"m": QueueLimit(1, 1), "other": QueueLimit(1, 5)})
    for _ in range(3):
        with admission.enter("m", 1, 1), admission.enter("m", 1, 1):
            with pytest.raises(ApiError, match="the server's queue of requests is full") as caught:
                admission.enter("m", 1, 1)
            assert (caught.value.status, caught.value.retry_after_s) == (429, 1)
            with admission.enter("other", 1, 1):
                pass


def test_minus_one_is_no_limit() -> None:
    assert admitted(Admission({"m": QueueLimit(1, -1)}), 0, 1) == 500
