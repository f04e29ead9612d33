"""OpenAI's error object, and what is said about a body that pydantic refuses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel
from starlette.responses import JSONResponse

INTERNAL_ERROR = "internal error; the server's log has the details"
CLIENT_GONE = 499
"""Status, in logs and metrics only, of a request whose client did not wait for the answer; nginx's number."""
_MAX_MISTAKES = 5
"""Mistakes of a body that are named; the others are counted."""
_MAX_MESSAGE, _MAX_NAME = 1000, 100
"""Characters of a message and of the name of a field, both of which may hold what the client has sent."""
_ERROR_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class ErrorBody(BaseModel):
    """Why a request failed. `param` is the field at fault and `code` a name for programs; both may be null."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(BaseModel):
    """The body of every response that reports an error, and of an error event within a stream."""

    error: ErrorBody


class ApiError(Exception):
    """Ends a request with an HTTP status and OpenAI's error object; `retry_after_s` becomes a header."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        message, param = cut(message, _MAX_MESSAGE), param and cut(param, _MAX_NAME)
        super().__init__(message)
        self.status, self.retry_after_s = status, retry_after_s
        kind = _ERROR_TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
        self.response = ErrorResponse(error=ErrorBody(message=message, type=kind, param=param, code=code))


def error_response(error: ApiError, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """Return the response that reports `error`, with further `headers`."""
    retry = {} if error.retry_after_s is None else {"Retry-After": str(error.retry_after_s)}
    return JSONResponse(error.response.model_dump(), error.status, {**retry, **(headers or {})})


def bad_request(param: str | None, message: str) -> ApiError:
    """Return the 400 for a field that has a wrong value; `param` None if no single field is at fault."""
    return ApiError(400, message, param=param)


def validation_error(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """Return the 400 for a body that pydantic refuses, with all mistakes in one line."""
    field = next((error["loc"][1] for error in errors if len(error["loc"]) > 1), None)
    messages = [_message(error) for error in errors[:_MAX_MISTAKES]]
    if more := len(errors) - len(messages):
        messages.append(f"and {more:,} more")
    return bad_request(field if isinstance(field, str) else None, "; ".join(messages))


def cut(text: str, limit: int = _MAX_NAME) -> str:
    """Return `text` with at most `limit` characters."""
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def _message(error: Mapping[str, Any]) -> str:
    # The first part of a location is "body".
    field = ".".join(cut(str(part)) for part in error["loc"][1:] if part != "[key]")
    if error["type"] == "json_invalid":
        return f"the body is not JSON: {error.get('ctx', {}).get('error', error['msg'])}"
    if error["type"] == "value_error":
        return f"{field} {error['ctx']['error']}".strip()
    if not field:
        return "the body must be a JSON object, sent with Content-Type: application/json"
    if error["type"] == "extra_forbidden":
        return f"{field} is not a field that this server knows; leave it out"
    if error["type"] == "missing":
        return f"{field} is required"
    return f"{field}: {error['msg'][:1].lower()}{error['msg'][1:]}"
