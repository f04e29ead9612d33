"""Calls that Ray Serve cancels at their other end, while this one waits for them."""

from __future__ import annotations

import asyncio
from pathlib import Path

from llama_ray.generation.sampling.params import SamplingParams
from serve_app.protocol.generation import GenerationRequest
from serve_app.registry.messages import ApiReport, Table
from serve_app.routing.client import Accepted
from serve_app.streams.messages import Answered, Submission
from tests.serve_app.helpers import FixedFollower, LocalReplicas, local_client, table_of


class Dropped(LocalReplicas):
    """Replicas whose first call is cancelled at their end, as by Ray Serve."""

    async def submit(self, deployment: str, submission: Submission) -> Answered:
        if not self.submissions:
            self.submissions.append(submission)
            raise asyncio.CancelledError
        return await super().submit(deployment, submission)


def test_a_call_that_the_other_end_cancels_is_made_again(model_dir: Path) -> None:
    replicas = Dropped(model_dir)
    request = GenerationRequest("tiny", ["a"], SamplingParams(max_tokens=5, ignore_eos=True))

    async def ask() -> int:
        async with local_client(FixedFollower(table_of(model_dir)), replicas) as client, asyncio.timeout(30):
            accepted, *lists = [event async for event in client.generate(request)]
            assert isinstance(accepted, Accepted)
            return sum(len(delta.token_ids) for event in lists if isinstance(event, list) for delta in event)

    assert asyncio.run(ask()) == 5
    replicas.stop()


class Cut(FixedFollower):
    """A follower whose first answer is cancelled on its way."""

    async def table(self, report: ApiReport) -> Table:
        if not self.reports:
            self.reports.append(report)
            raise asyncio.CancelledError
        return await super().table(report)


def test_the_table_comes_after_an_answer_of_the_follower_that_was_cancelled(model_dir: Path) -> None:
    replicas = Dropped(model_dir)

    async def table() -> Table:
        async with local_client(Cut(table_of(model_dir)), replicas) as client:
            return await client.table()

    assert asyncio.run(table()) == table_of(model_dir)
    replicas.stop()
