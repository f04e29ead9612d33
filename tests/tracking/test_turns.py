"""Promotions of several processes at once, as threads with clients of their own."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
from mlflow import MlflowClient

from llama_ray.tracking.errors import TrackingError
from llama_ray.tracking.registry import promote, resolve_version
from llama_ray.tracking.turns import turn


def registered(uri: str, name: str, losses: list[float] | None = None) -> MlflowClient:
    client = MlflowClient(uri)
    client.create_registered_model(name)
    for loss in losses or []:
        tags = {"validation_loss": str(loss), "data_fingerprint": "books"}
        client.create_model_version(name, "s3://nowhere/model", tags=tags)
    return client


def test_of_several_promotions_at_once_the_best_version_wins(server: str) -> None:
    client = registered(server, "crowded", [1.0, 2.0, 3.0])
    with ThreadPoolExecutor(3) as together:
        list(together.map(partial(promote, "crowded", policy="if_better", uri=server), (3, 2, 1)))
    assert resolve_version("models:/crowded@champion", server).version == 1
    assert client.get_registered_model("crowded").tags == {}


def test_nobody_else_has_a_turn_meanwhile(store: str) -> None:
    client = registered(store, "alone")
    inside, entered = [], threading.Event()

    def take() -> None:
        with turn(client, "alone", poll_s=0.01):
            inside.append("second")

    second = threading.Thread(target=take)
    with turn(client, "alone", poll_s=0.01):
        second.start()
        entered.wait(0.1)
        inside.append("first")
    second.join()
    assert inside == ["first", "second"]


def test_the_claim_of_a_dead_process_does_not_stand_for_ever(store: str) -> None:
    client = registered(store, "haunted")
    client.set_registered_model_tag("haunted", "turn.00", "its process is gone")
    with pytest.raises(TrackingError, match="try again"), turn(client, "haunted", poll_s=0.01, wait_s=0.05):
        pass
    with turn(client, "haunted", poll_s=0.01, stale_s=0.05):
        pass
    assert client.get_registered_model("haunted").tags == {}
