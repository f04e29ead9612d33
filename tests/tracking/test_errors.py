from __future__ import annotations

import sqlite3

import pytest
import requests
from botocore.exceptions import ClientError, EndpointConnectionError
from mlflow.exceptions import MlflowException, RestException
from mlflow.protos import databricks_pb2 as codes
from sqlalchemy.exc import IntegrityError, InterfaceError, OperationalError

from llama_ray.tracking.errors import TrackingError, is_passing, reported


def response(status: int) -> requests.Response:
    answer = requests.Response()
    answer.status_code = status
    return answer


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


def aws(status: int) -> ClientError:
    return ClientError({"Error": {}, "ResponseMetadata": {"HTTPStatusCode": status}}, "PutObject")  # type: ignore[typeddict-item]


OPERATIONAL = OperationalError("INSERT", None, sqlite3.OperationalError("database is locked"))


@pytest.mark.parametrize(
    "error",
    [
        MlflowException("connection refused"),
        MlflowException("busy", codes.REQUEST_LIMIT_EXCEEDED),
        MlflowException("away", codes.TEMPORARILY_UNAVAILABLE),
        MlflowException("a proxy's page", codes.ENDPOINT_NOT_FOUND),
        caused(MlflowException("x", codes.BAD_REQUEST), InterfaceError("INSERT", None, Exception("closed"))),
        caused(TrackingError("x"), MlflowException("connection refused")),
        OPERATIONAL,
        requests.ConnectionError("refused"),
        requests.HTTPError("503", response=response(503)),
        requests.HTTPError("429", response=response(429)),
        EndpointConnectionError(endpoint_url="http://s3"),
        aws(503),
        TimeoutError(),
        OSError(28, "No space left on device"),
    ],
    ids=repr,
)
def test_a_store_that_is_away_or_busy_is_asked_again(error: Exception) -> None:
    assert is_passing(error)


@pytest.mark.parametrize(
    "error",
    [
        RestException({"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "no such run"}),
        RestException({"error_code": "PERMISSION_DENIED", "message": "no"}),
        MlflowException("bad parameter", codes.INVALID_PARAMETER_VALUE),
        MlflowException("the experiment must be active", codes.INVALID_STATE),
        MlflowException("password", codes.UNAUTHENTICATED),
        caused(MlflowException("x", codes.BAD_REQUEST), IntegrityError("INSERT", None, Exception("twice"))),
        TrackingError("run 7 was deleted"),
        caused(TrackingError("x"), MlflowException("no", codes.PERMISSION_DENIED)),
        requests.HTTPError("403", response=response(403)),
        aws(403),
        PermissionError(13, "Permission denied"),
        ModuleNotFoundError("No module named 'boto3'"),
        TypeError("a bug"),
    ],
    ids=repr,
)
def test_a_store_that_refuses_is_not_asked_again(error: Exception) -> None:
    assert not is_passing(error)


def test_a_failure_is_one_line_with_what_failed_why_and_a_way_out() -> None:
    wrapped = caused(
        MlflowException("API request to http://u:hidden@h failed with ..."),
        ConnectionRefusedError(111, "refused"),
    )
    with (
        pytest.raises(TrackingError) as reason,
        reported("no server answers at http://u:hidden@h", "start one"),
    ):
        raise wrapped
    assert str(reason.value) == "no server answers at http://***@h ([Errno 111] refused); start one"
    with pytest.raises(TrackingError, match=r"^first$"), reported("x", "y"):
        raise TrackingError("first")
