"""A real MLflow server behind a proxy that asks for a password or for certificates."""

from __future__ import annotations

import base64
import os
from pathlib import Path

import mlflow
import pytest

from llama_ray.tracking.errors import TrackingError
from llama_ray.tracking.runs import Run
from llama_ray.tracking.uri import connect
from tests.tracking.helpers import guarded, make_certificate

PASSWORD = "pw/1@Ü"
QUOTED = "pw%2F1%40%C3%9C"
BASIC = f"Basic {base64.b64encode(f'user:{PASSWORD}'.encode()).decode()}"


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_certificate(tmp_path_factory.mktemp("tls") / "both.pem")


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing set, and whatever a test leaves is taken back."""
    for name in ("URI", "USERNAME", "PASSWORD", "TOKEN"):
        monkeypatch.setenv(f"MLFLOW_TRACKING_{name}", "")
        monkeypatch.delenv(f"MLFLOW_TRACKING_{name}")


def look(uri: str) -> None:
    """Read something from the server, as any command does."""
    assert connect(uri).search_experiments(max_results=1)


def write(uri: str) -> Run:
    """What a run stores on a server: records, and an artifact."""
    run = Run.create(
        experiment="guarded",
        name="r",
        params={"from": uri},
        tags={"of": uri},
        description=f"at {uri}",
        uri=uri,
    )
    run.log_dataset(uri, fingerprint="f", source=uri, sizes={})
    run.log_config({"launch": {"output_dir": uri}})
    Run.attach(run.run_id, uri).set_tags({"again": uri})
    run.finish("FINISHED")
    return run


@pytest.mark.parametrize("inside", [True, False], ids=["in the URI", "in the environment"])
def test_a_password_opens_the_server_and_is_neither_shown_nor_stored(
    inside: bool,
    server: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    if not inside:
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "user")
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)
    with guarded(server, authorization=BASIC) as address:
        run = write(f"http://user:{QUOTED}@{address}" if inside else f"http://{address}")
        stored = connect(server).get_run(run.run_id)
        config = mlflow.artifacts.download_artifacts(
            run_id=run.run_id, artifact_path="config.yaml", tracking_uri=server
        )
    shown = "".join(capfd.readouterr()) + f"{run.uri} {run.url}"
    for text in (
        shown,
        str(stored.to_dictionary()),
        str(stored.inputs.to_dictionary()),
        Path(config).read_text(),
    ):
        assert "pw" not in text
    assert f"http://{address}/#/experiments/" in (run.url or "")


def test_a_password_without_a_user_is_not_shown_either(
    server: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "")
    with guarded(server, authorization=f"Basic {base64.b64encode(b':hidden').decode()}") as address:
        run = Run.create(
            experiment="guarded",
            name="r",
            params={},
            tags={},
            description="",
            uri=f"http://:hidden@{address}",
        )
        run.finish("FINISHED")
    assert "hidden" not in "".join(capfd.readouterr()) + str(run.url)


def test_a_token_opens_the_server(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "hidden")
    with guarded(server, authorization="Bearer hidden") as address:
        look(f"http://{address}")


def test_a_wrong_password_is_one_line_without_it(server: str) -> None:
    with guarded(server, authorization=BASIC) as address, pytest.raises(TrackingError) as refused:
        write(f"http://user:hidden@{address}")
    message = str(refused.value)
    assert "not authenticated" in message
    assert "hidden" not in message
    assert "\n" not in message


@pytest.mark.parametrize("uri", ["http://user:hidden@127.0.0.1:9", "http://hidden@127.0.0.1:9/mlflow"])
def test_a_server_that_is_away_is_one_line_without_the_password(uri: str) -> None:
    with pytest.raises(TrackingError, match=r"no MLflow server answers at .*refused") as refused:
        connect(uri)
    assert "hidden" not in str(refused.value)


@pytest.mark.filterwarnings("ignore:Unverified HTTPS request")
@pytest.mark.parametrize("setting", ["MLFLOW_TRACKING_SERVER_CERT_PATH", "MLFLOW_TRACKING_INSECURE_TLS"])
def test_a_certificate_of_the_server_is_known_or_not_asked_for(
    setting: str, server: str, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with guarded(server, certificate=certificate) as address:
        with pytest.raises(
            TrackingError, match=r"no MLflow server answers at https.*CERTIFICATE_VERIFY_FAILED"
        ):
            connect(f"https://{address}")
        monkeypatch.setenv(setting, "true" if setting.endswith("TLS") else str(certificate))
        look(f"https://{address}")


def test_a_certificate_of_the_client_opens_the_server(
    server: str, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_SERVER_CERT_PATH", str(certificate))
    with guarded(server, certificate=certificate, client_certificate=True) as address:
        with pytest.raises(TrackingError, match="no MLflow server answers"):
            connect(f"https://{address}")
        monkeypatch.setenv("MLFLOW_TRACKING_CLIENT_CERT_PATH", str(certificate))
        look(f"https://{address}")


def test_a_database_that_cannot_be_reached_is_one_line_without_its_password(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(
        TrackingError, match=r"no database answers at postgresql://\*\*\*@127.0.0.1:9/db"
    ) as refused:
        connect("postgresql://user:hidden@127.0.0.1:9/db")
    assert "\n" not in str(refused.value)
    assert os.environ.get("MLFLOW_TRACKING_PASSWORD") is None
