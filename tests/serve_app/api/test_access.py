"""Keys: who gets in, what needs none, and what is said to the others."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from llama_ray.utils.errors import UserError
from serve_app.api.access import check_address, digest, read_keys
from serve_app.api.api import HttpOptions, create_api
from tests.serve_app.helpers import FixedFollower, LocalReplicas, local_client, table_of

KEY, OTHER = "sk-0123456789abcdefghij", "sk-abcdefghij0123456789"
BODY = {"model": "tiny", "prompt": "dog", "max_tokens": 2}
ORIGIN = "https://chat.example"


@pytest.fixture(scope="module")
def http(model_dir: Path) -> Iterator[TestClient]:
    replicas, follower = LocalReplicas(model_dir), FixedFollower(table_of(model_dir))
    options = HttpOptions(key_digests=(digest(OTHER), digest(KEY)), cors_origins=(ORIGIN,))
    with TestClient(create_api(lambda: local_client(follower, replicas), options)) as http:
        yield http
    replicas.stop()


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.mark.parametrize(
    "path", ["/v1/models", "/v1/models/tiny", "/ready", "/version", "/openapi.json", "/absent"]
)
def test_every_route_asks_for_a_key(http: TestClient, path: str) -> None:
    response = http.get(path)
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    error = response.json()["error"]
    assert (error["type"], error["code"]) == ("authentication_error", "no_api_key")
    assert http.get(path, headers=bearer(KEY)).status_code == (404 if path == "/absent" else 200)


@pytest.mark.parametrize(
    "path", ["/health", "/", "/docs", "/docs/swagger-ui-bundle.js", "/docs/swagger-ui.css"]
)
def test_health_and_the_pages_ask_for_none(http: TestClient, path: str) -> None:
    assert http.get(path).status_code == 200


@pytest.mark.parametrize(
    "value",
    [
        f"Bearer {KEY}x",
        f"Bearer {KEY[:-1]}",
        f"Bearer {digest(KEY)}",
        "Bearer \xff",
        "Bearer ",
        "Bearer",
        "",
        KEY,
        f"Basic {KEY}",
    ],
)
def test_another_key_gets_nothing_and_is_not_repeated(http: TestClient, value: str) -> None:
    response = http.post("/v1/completions", json=BODY, headers={"Authorization": value.encode("latin-1")})
    assert response.status_code == 401
    assert response.json()["error"]["code"] == "invalid_api_key"
    assert KEY[:-1] not in response.text


def test_each_key_gets_an_answer(http: TestClient) -> None:
    for key in (KEY, OTHER):
        assert http.post("/v1/completions", json=BODY, headers=bearer(key)).status_code == 200
    assert (
        http.post("/v1/completions", json=BODY, headers={"authorization": f"bearer  {KEY} "}).status_code
        == 200
    )


def test_pages_of_the_origins_that_are_named_may_use_the_api(http: TestClient) -> None:
    preflight = {
        "Origin": ORIGIN,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization",
    }
    response = http.options("/v1/completions", headers=preflight)
    assert response.status_code == 200
    assert response.headers["access-control-allow-origin"] == ORIGIN
    assert "authorization" in response.headers["access-control-allow-headers"].lower()
    # A browser shows a page the refusal only with this header, too.
    assert http.get("/v1/models", headers={"Origin": ORIGIN}).headers["access-control-allow-origin"] == ORIGIN
    foreign = http.get("/health", headers={"Origin": "https://evil.example"})
    assert "access-control-allow-origin" not in foreign.headers


def test_keys_come_from_a_file_of_hashes_and_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = subprocess.run(
        [sys.executable, "-m", "serve_app.keys", "alice"], capture_output=True, text=True, check=True
    )
    key = made.stderr.split()[-1]
    file = tmp_path / "keys"
    file.write_text(f"# who may ask\n\n{made.stdout}bob {digest(OTHER)}\n")
    assert read_keys(str(file)) == (digest(key), digest(OTHER))
    monkeypatch.setenv("LLAMA_RAY_API_KEYS", f" {KEY},{OTHER} ")
    assert read_keys(None) == (digest(KEY), digest(OTHER))
    assert read_keys(str(file)) == (digest(key), digest(OTHER), digest(KEY))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"alice {KEY}\n", "whose line 1 is no name with a SHA-256"),
        (f"{digest(KEY)}\n", "whose line 1 is no name with a SHA-256"),
        ("# nobody\n", "which has no keys"),
        (None, "cannot be read"),
    ],
)
def test_a_file_that_is_no_file_of_hashes_is_refused_without_showing_it(
    tmp_path: Path, text: str | None, message: str
) -> None:
    file = tmp_path / "keys"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        read_keys(str(file))
    assert KEY not in str(caught.value)


def test_a_key_that_could_be_guessed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_RAY_API_KEYS", f"{KEY} secret")
    with pytest.raises(UserError, match="6 characters in key 2; it must have at least 16") as caught:
        read_keys(None)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org"])
def test_a_public_address_needs_keys_or_a_word(host: str) -> None:
    with pytest.raises(UserError, match=f"would listen on {host} and ask for no key"):
        check_address(host, has_keys=False, allow_anonymous=False)
    check_address(host, has_keys=True, allow_anonymous=False)
    check_address(host, has_keys=False, allow_anonymous=True)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "localhost", "::1", None])
def test_this_machine_alone_needs_neither(host: str | None) -> None:
    check_address(host, has_keys=False, allow_anonymous=False)
