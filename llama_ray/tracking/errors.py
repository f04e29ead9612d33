"""Errors of MLflow and of its stores: as one line for the user, and whether they pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus

from mlflow.exceptions import MlflowException
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError

from llama_ray.utils.errors import UserError, first_line
from llama_ray.utils.redact import redact

_PASSING_CODES = frozenset(
    {
        "ABORTED",
        "CANCELLED",
        "DEADLINE_EXCEEDED",
        # A proxy answers so while its server is away; MLflow itself says RESOURCE_DOES_NOT_EXIST.
        "ENDPOINT_NOT_FOUND",
        "INTERNAL_ERROR",
        "REQUEST_LIMIT_EXCEEDED",
        "RESOURCE_CONFLICT",
        "RESOURCE_EXHAUSTED",
        "TEMPORARILY_UNAVAILABLE",
    }
)
_REASON_CHARACTERS = 200
_LASTING_OS_ERRORS = (PermissionError, FileNotFoundError, NotADirectoryError, IsADirectoryError)


class TrackingError(UserError):
    """A tracking server, run, model or reference that does not exist or cannot be used."""


@contextmanager
def reported(what: str, way_out: str) -> Iterator[None]:
    """Raise whatever fails in the block as a TrackingError: `WHAT (REASON); WAY OUT`."""
    try:
        yield
    except TrackingError:
        raise
    # Stores of artifacts raise the exceptions of their own libraries.
    except Exception as error:
        raise TrackingError(f"{what} ({reason(error)}); {way_out}") from error


def reason(error: BaseException) -> str:
    """Return in a few words what has failed, which clients wrap in several exceptions."""
    innermost = error
    if not isinstance(error, MlflowException) or error.error_code == "INTERNAL_ERROR":
        while innermost.__cause__ or innermost.__context__:
            innermost = innermost.__cause__ or innermost.__context__ or innermost
    text = _telling_line(innermost)
    return text if len(text) <= _REASON_CHARACTERS else f"{text[:_REASON_CHARACTERS]}..."


def _telling_line(error: BaseException) -> str:
    """Return the first line that is not a heading: MLflow lists under it what failed for each file of a download."""
    lines = redact(str(error)).strip().splitlines()
    return next((line for line in lines if not line.endswith(":") and line[:1] != "#"), first_line(error))


def is_passing(error: BaseException) -> bool:
    """Whether the same call may succeed later: a store that is away or busy, not one that refuses."""
    if isinstance(error, TrackingError):
        return error.__cause__ is not None and is_passing(error.__cause__)
    if isinstance(error, MlflowException):
        cause = error.__cause__
        return is_passing(cause) if isinstance(cause, DBAPIError) else error.error_code in _PASSING_CODES
    if isinstance(error, DBAPIError):
        return error.connection_invalidated or isinstance(error, OperationalError | InterfaceError)
    status = _http_status(error)
    if status is not None:
        return status >= HTTPStatus.INTERNAL_SERVER_ERROR or status in (
            HTTPStatus.REQUEST_TIMEOUT,
            HTTPStatus.TOO_MANY_REQUESTS,
        )
    if isinstance(error, OSError):
        return not isinstance(error, _LASTING_OS_ERRORS)
    # Clients of object stores have classes of their own, such as EndpointConnectionError and ReadTimeoutError.
    names = [kind.__name__ for kind in type(error).__mro__]
    return any("Connection" in name or "Timeout" in name for name in names)


def _http_status(error: BaseException) -> int | None:
    """Return the status that the exception of an HTTP client has: of requests, or of botocore."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    else:
        status = getattr(response, "status_code", None)
    return status if isinstance(status, int) else None
