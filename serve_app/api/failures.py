"""Whatever fails becomes OpenAI's error object."""

from __future__ import annotations

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from serve_app.api.disconnect import ClientGone
from serve_app.errors import CLIENT_GONE, INTERNAL_ERROR, ApiError, error_response, validation_error


def add_handlers(api: FastAPI) -> None:
    """Have the errors of all routes answered."""
    api.add_exception_handler(ApiError, _on_api_error)
    api.add_exception_handler(RequestValidationError, _on_validation_error)
    api.add_exception_handler(HTTPException, _on_http_exception)
    api.add_exception_handler(ClientGone, _on_client_gone)
    api.add_exception_handler(Exception, _on_bug)


async def _on_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error_response(error)


async def _on_validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return error_response(validation_error(error.errors()))


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}; GET /docs lists the endpoints"
    return error_response(ApiError(error.status_code, message))


async def _on_client_gone(request: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_GONE)


async def _on_bug(request: Request, error: Exception) -> Response:
    # Starlette raises it again after the response, so it is in the log with its traceback.
    return error_response(ApiError(500, INTERNAL_ERROR))
