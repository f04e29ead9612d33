"""The follower as replicas and API processes see it, over a real MLflow store."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from mlflow import MlflowClient

from serve_app.registry.exchange import Exchange
from serve_app.registry.facts import Change, Remembered
from serve_app.registry.messages import (
    ApiReport,
    EngineReport,
    ModelSpec,
    ModelVersion,
    ReplicaPlan,
    ReplicaReport,
    Table,
)
from serve_app.registry.record import FileStore, Record
from serve_app.registry.watch import SERVING_TAG

Register = Callable[..., None]


@asynccontextmanager
async def following(
    name: str, uri: str, folder: Path, poll_s: float = 0.05, ref: str | None = None, deployed: str = "1"
) -> AsyncIterator[Exchange]:
    def ignore(_: Sequence[Change] | ReplicaReport | Mapping[str, int]) -> None:
        pass

    exchange = Exchange(
        [ModelSpec(name, ref or f"models:/{name}@champion")],
        uri,
        record=Record([FileStore(folder)], application="default", tracking_uri=uri, deployed=deployed),
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


BAD = EngineReport("failed", "loss is nan")
READY = EngineReport("ready")


async def replica(exchange: Exchange, name: str, bad: str = "") -> None:
    """Poll as a replica that loads whatever is wanted, at once; the version `bad` fails."""
    plan = ReplicaPlan(0)
    while True:
        engines = {version.ref: BAD if version.ref == bad else READY for version in plan.wanted}
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


def test_a_notice_of_a_change_is_faster_than_the_next_look(
    register: Register, client: MlflowClient, store: str, tmp_path: Path
) -> None:
    register("notices", 2)
    client.set_registered_model_alias("notices", "champion", "1")

    async def move() -> None:
        async with following("notices", store, tmp_path, poll_s=600) as exchange, asyncio.timeout(30):
            polling = asyncio.create_task(replica(exchange, "notices"))
            await until_serves(exchange, 1)
            client.set_registered_model_alias("notices", "champion", "2")
            await exchange.look_now()
            await until_serves(exchange, 2)
            polling.cancel()

    asyncio.run(move())


def test_a_rejected_version_says_why_in_mlflow_and_is_tried_again_by_the_next_deployment(
    register: Register, client: MlflowClient, store: str, tmp_path: Path
) -> None:
    register("rejects", 2)
    bad = "models:/rejects/2"
    client.set_registered_model_alias("rejects", "champion", "1")

    async def reject() -> None:
        async with following("rejects", store, tmp_path) as exchange, asyncio.timeout(30):
            polling = asyncio.create_task(replica(exchange, "rejects", bad))
            table = await until_serves(exchange, 1)
            client.set_registered_model_alias("rejects", "champion", "2")
            while not (status := table.models[0].status(bad)) or status.state != "rejected":
                table = await exchange.table(ApiReport("api", table.revision))
            polling.cancel()

    async def states(deployed: str) -> list[str]:
        async with (
            following("rejects", store, tmp_path, deployed=deployed) as exchange,
            asyncio.timeout(30),
        ):
            table = await exchange.table(ApiReport("api"))
            while not table.models[0].status(bad):
                table = await exchange.table(ApiReport("api", table.revision))
            return [status.state for status in table.models[0].versions]

    asyncio.run(reject())
    assert client.get_model_version("rejects", "2").tags[SERVING_TAG] == "rejected: loss is nan"
    assert asyncio.run(states("1")) == ["serving", "rejected"]
    assert asyncio.run(states("2")) == ["serving", "loading"]


def first_plan(name: str, uri: str, folder: Path, ref: str | None = None) -> ReplicaPlan:
    """Return the first plan that says something."""

    async def ask() -> ReplicaPlan:
        async with following(name, uri, folder, ref=ref) as exchange, asyncio.timeout(30):
            while not (
                plan := await exchange.plan(ReplicaReport("r", "actor", "LlamaReplica", name))
            ).revision:
                pass
            return plan

    return asyncio.run(ask())


NOWHERE = "http://127.0.0.1:9"


@pytest.mark.parametrize(
    ("uri", "ref", "refusal"),
    [
        (
            "",
            "models:/nobody@champion",
            "models:/nobody@champion: no model 'nobody' is registered at sqlite:",
        ),
        ("", "models:/nobody", "'models:/nobody' is not a model reference; give models:/NAME/VERSION or"),
        (
            NOWHERE,
            "models:/nobody",
            "'models:/nobody' is not a model reference; give models:/NAME/VERSION or",
        ),
        (NOWHERE, "models:/a@champion", f"no MLflow server answers at {NOWHERE} ("),
    ],
)
def test_a_first_start_that_cannot_be_is_refused_with_the_reason(
    client: MlflowClient, store: str, tmp_path: Path, uri: str, ref: str, refusal: str
) -> None:
    plan = first_plan("nobody", uri or store, tmp_path, ref)
    assert (plan.wanted, str(plan.refusal).startswith(refusal)) == ((), True)


def test_a_directory_needs_no_registry(tmp_path: Path) -> None:
    (version,) = first_plan("mine", NOWHERE, tmp_path, str(tmp_path / "my-model")).wanted
    assert (version.ref, version.location) == ("my-model", str(tmp_path / "my-model"))


def test_what_served_last_serves_while_the_registry_is_away(tmp_path: Path) -> None:
    last = ModelVersion("away", "models:/away/7", "models:/away/7", 7, "run", 2.0)
    uri = "http://somebody:secret@127.0.0.1:9"
    record = Record([FileStore(tmp_path)], application="default", tracking_uri=uri, deployed="1")
    record.write("away", Remembered(last))

    async def ask() -> Table:
        async with following("away", uri, tmp_path) as exchange, asyncio.timeout(30):
            table = await exchange.table(ApiReport("api"))
            while not table.models[0].notice:
                table = await exchange.table(ApiReport("api", table.revision))
        return table

    (served,) = asyncio.run(ask()).models
    assert (served.current, served.versions[0].version) == (last.ref, last)
    assert re.fullmatch(
        rf"the registry is out of reach since .* UTC \(no MLflow server answers at {NOWHERE} \(.*"
        "serving version 7, the last one that served",
        str(served.notice),
    )
    assert first_plan("away", uri, tmp_path).wanted == (last,)
    assert "secret" not in "".join(file.read_text() for file in tmp_path.rglob("*.json"))
