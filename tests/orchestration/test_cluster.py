from __future__ import annotations

import socket

import pytest

from llama_ray.orchestration.cluster import connect


@pytest.fixture
def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("127.0.0.1:PORT", "no Ray cluster answers there .*refused.*; start one with `ray start --head`"),
        ("localhost:PORT", "no Ray cluster answers there"),
        ("[::1]:PORT", "no Ray cluster answers there"),
        ("host.invalid:6379", "no Ray cluster answers there"),
        ("127.0.0.1:99999", "no Ray cluster answers there"),
        ("127.0.0.1:port", "no Ray cluster answers there"),
        ("nowhere", "no Ray cluster answers there"),
        ("ray://127.0.0.1:PORT", "it must be HOST:PORT of a cluster, auto or local"),
        ("ray://", "it must be HOST:PORT of a cluster, auto or local"),
        ("http://127.0.0.1:8265", "ray job submit --address"),
    ],
)
def test_an_address_without_a_cluster_is_refused_in_one_line_at_once(
    monkeypatch: pytest.MonkeyPatch, free_port: int, address: str, message: str
) -> None:
    address = address.replace("PORT", str(free_port))
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ValueError, match=message) as caught:
        connect()
    assert str(caught.value).startswith(f"RAY_ADDRESS is {address}")
    assert "\n" not in str(caught.value)
