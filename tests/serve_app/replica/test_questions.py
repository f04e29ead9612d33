"""What a question costs the replica that answers it."""

from __future__ import annotations

import asyncio
import tracemalloc
from pathlib import Path

from serve_app.replica.questions import reply
from serve_app.streams.messages import Failure
from serve_app.streams.questions import Score
from tests.serve_app.replica.test_served_engine import serve


def test_texts_are_put_together_with_their_long_context_one_by_one(model_dir: Path) -> None:
    served = serve(model_dir)
    tracemalloc.start()
    try:
        got = asyncio.run(reply(served, Score(["a" * 10**6] * 128, ["b"] * 128)))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
        served.stop()
    assert isinstance(got, Failure)
    assert "shorten the prompt" in got.message
    assert peak < 20 * 10**6
