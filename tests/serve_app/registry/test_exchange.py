"""The follower as replicas and API processes see it, over a real MLflow store."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from mlflow import MlflowClient

from serve_app.registry.exchange import Exchange
from serve_app.registry.facts import Change
from serve_app.registry.messages import (
    ApiReport,
    EngineReport,
    ModelSpec,
    ReplicaPlan,
    ReplicaReport,
    Table,
)
from serve_app.registry.record import FileStore, Record
from serve_app.registry.watch import SERVING_TAG

Register = Callable[..., None]


@asynccontextmanager
async def following(
    name: str, uri: str, folder: Path, poll_s: float = 0.05, ref: str | None = None
) -> AsyncIterator[Exchange]:
    def ignore(_: Sequence[Change] | ReplicaReport | Mapping[str, int]) -> None:
        pass

    exchange = Exchange(
        [ModelSpec(name, ref or f"models:/{name}@champion")],
        uri,
        record=Record([FileStore(folder)], application="default", tracking_uri=uri, deployed="1"),
        registry_poll_s=poll_s,
        stuck_after_s=60,
        on_changes=ignore,
        on_stuck=ignore,
        on_standby=ignore,
    )
    try:
        yield exchange
    finally:
        await exchange.stop()


async def replica(exchange: Exchange, name: str) -> None:
    """Poll as a replica that loads whatever is wanted, at once."""
    plan = ReplicaPlan(0)
    while True:
        engines = {version.ref: EngineReport("ready") for version in plan.wanted}
        plan = await exchange.plan(ReplicaReport("r", "actor", "LlamaReplica", name, plan.revision, engines))


async def until_serves(exchange: Exchange, number: int) -> Table:
    """Poll as an API process does, until version `number` serves."""
    table = await exchange.table(ApiReport("api"))
    while not (current := table.models[0].current) or not current.endswith(f"/{number}"):
        table = await exchange.table(ApiReport("api", table.revision))
    return table


def test_a_moved_alias_is_followed(
    register: Register, client: MlflowClient, store: str, tmp_path: Path
) -> None:
    register("follows", 2)
    client.set_registered_model_alias("follows", "champion", "1")

    async def move() -> Table:
        async with following("follows", store, tmp_path) as exchange, asyncio.timeout(30):
            polling = asyncio.create_task(replica(exchange, "follows"))
            await until_serves(exchange, 1)
            client.set_registered_model_alias("follows", "best", "2")
            client.set_registered_model_alias("follows", "champion", "2")
            table = await until_serves(exchange, 2)
            polling.cancel()
        return table

    table = asyncio.run(move())
    status = table.models[0].status("models:/follows/2")
    assert status is not None
    assert (status.aliases, status.version.validation_loss) == (("best", "champion"), 2.0)
    assert client.get_model_version("follows", "2").tags[SERVING_TAG] == "serving"
    assert SERVING_TAG not in client.get_model_version("follows", "1").tags
