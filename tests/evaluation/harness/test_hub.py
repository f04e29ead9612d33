from __future__ import annotations

import os
import socket

import pytest

from llama_ray.evaluation.harness.hub import is_offline, offline_unless_reached

VARIABLES = ("HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE", "HF_EVALUATE_OFFLINE")


@pytest.fixture(autouse=True)
def _no_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*VARIABLES, "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


def hub_is_switched_off() -> bool:
    constants = pytest.importorskip("huggingface_hub.constants")
    return bool(constants.HF_HUB_OFFLINE)


def test_a_process_can_download_after_an_evaluation_that_needed_no_network() -> None:
    before = hub_is_switched_off()
    with offline_unless_reached(needed=False):
        assert is_offline()
        assert hub_is_switched_off()
    assert not is_offline()
    assert hub_is_switched_off() == before
    assert not set(VARIABLES) & set(os.environ)


def test_what_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with offline_unless_reached(needed=True):
        assert is_offline()
    assert os.environ["HF_HUB_OFFLINE"] == "1"


def test_the_hub_is_used_where_it_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        with offline_unless_reached(needed=True):
            assert not is_offline()
    with offline_unless_reached(needed=True):
        assert is_offline()
