from __future__ import annotations

import pickle

import pytest

from llama_ray.utils.errors import UserError, first_line
from llama_ray.utils.fields import shown
from llama_ray.utils.redact import redact

SECRETS = [
    ("http://user:pw-1@host:5000/x", "http://***@host:5000/x"),
    ("https://pw-1@host", "https://***@host"),
    ("http://:pw-1@host", "http://***@host"),
    ("http://user:p@pw-1@host/a", "http://***@host/a"),
    ("http://user:#pw-1@host/a", "http://***@host/a"),
    ("http://user:/pw-1?x@host", "http://***@host"),
    ("postgresql+psycopg2://user:pw-1@host/db?sslmode=require", "postgresql+psycopg2://***@host/db?sslmode=require"),
    ("s3://KEY:pw-1/x+y=@bucket/runs?region=x", "s3://***@bucket/runs?region=x"),
    ("s3://bucket/runs?access_key=pw-1&region=x", "s3://bucket/runs?access_key=***&region=x"),
    ("s3://b/runs?scheme=http&endpoint_override=a%3Apw-1%40h:1", "s3://b/runs?scheme=http&endpoint_override=***@h:1"),
    ("https://h/x?X-Amz-Credential=pw-1/2&X-Amz-Signature=pw-1", "https://h/x?X-Amz-Credential=***&X-Amz-Signature=***"),
    ("abfs://container@host/x?sig=pw-1", "abfs://container@host/x?sig=***"),
    ("abfs://:pw-1@host/x", "abfs://***@host/x"),
    ("mssql+pyodbc:///?odbc_connect=DRIVER%3Dx%3BPWD%3Dpw-1", "mssql+pyodbc:///?odbc_connect=***"),
    ("DefaultEndpointsProtocol=https;AccountKey=pw-1==", "DefaultEndpointsProtocol=https;AccountKey=***"),
    ("'http://u:pw-1@h', \"http://v:pw-1@i\"", "'http://***@h', \"http://***@i\""),
]  # fmt: skip


@pytest.mark.parametrize(("text", "shown"), SECRETS)
def test_secrets_of_uris_are_hidden_anywhere_in_a_text(text: str, shown: str) -> None:
    assert redact(f"no server at {text} (refused)") == f"no server at {shown} (refused)"
    assert redact(redact(text)) == redact(text) == shown


@pytest.mark.parametrize(
    "text",
    [
        "http://host:5000/#/experiments/1",
        "s3://bucket/user@example.org/runs?region=us-east-1&scheme=http",
        "sqlite:////home/a@b/mlflow.db",
        "http://[::1]:5000/x",
        "models:/tiny@champion",
        "max_tokens=3; top_k is 5; it must be 1 (key=value)",
        '{"a":"http://h:5000","b":"x@y"}',
        "",
    ],
)
def test_a_text_without_secrets_stays_as_it_is(text: str) -> None:
    assert redact(text) == text


def test_a_value_that_is_cut_shows_no_secret() -> None:
    assert "hidden" not in shown(f"s3://key:hidden{'x' * 100}@bucket/runs")


def test_errors_of_the_user_and_quoted_messages_have_no_secrets() -> None:
    error = UserError("no server at http://u:pw-1@host")
    assert str(pickle.loads(pickle.dumps(error))) == "no server at http://***@host"
    assert first_line(OSError("x\nhttp://u:pw-1@host")) == "x"
    assert first_line(OSError("http://u:pw-1@host\nx")) == "http://***@host"
