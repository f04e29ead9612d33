"""What is counted of the requests, by model and version, for Prometheus."""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import cache
from typing import cast

from ray.serve.metrics import Counter, Histogram

from serve_app.errors import CLIENT_GONE, ApiError
from serve_app.routing.client import Accepted, Events

# Ray annotates tuples of one name, and means all.
_TAGS = cast("tuple[str]", ("model", "version"))
_ERROR_TAGS = cast("tuple[str]", ("model", "version", "status"))
_TTFT_S = [0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60]
_DURATION_S = [0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600]


@dataclass(slots=True)
class Measured:
    """What is known of one request; times are those of `time.monotonic`, in seconds.

    `model` and `version` (the `ref`) are empty until they are chosen. `status` is that of the answer, or of the error
    that ended a stream; 499 if the client left first.
    """

    arrived: float = field(default_factory=time.monotonic)
    model: str = ""
    version: str = ""
    first_token: float | None = None
    tokens: int = 0
    status: int = 200


class RequestMetrics:
    """Counts requests. Inside a Serve replica, its name, deployment and application become tags, too."""

    def __init__(self) -> None:
        self._requests = Counter("llama_ray_requests", "Requests that have ended.", _TAGS)
        self._errors = Counter(
            "llama_ray_request_errors",
            "Requests that ended with an error; status 499 if the client left.",
            _ERROR_TAGS,
        )
        self._tokens = Counter("llama_ray_generated_tokens", "Tokens that were generated.", _TAGS)
        self._ttft = Histogram(
            "llama_ray_time_to_first_token_s", "From a request's arrival to its first token.", _TTFT_S, _TAGS
        )
        self._duration = Histogram(
            "llama_ray_request_duration_s", "From a request's arrival to its end.", _DURATION_S, _TAGS
        )

    async def measured(self, events: Events) -> Events:
        """Yield the events of a request, and count it at its end."""
        request = Measured()
        try:
            async with aclosing(events):
                async for event in events:
                    if isinstance(event, Accepted):
                        request.model, request.version = event.model, event.ref
                    elif tokens := sum(len(delta.token_ids) for delta in event):
                        request.first_token = request.first_token or time.monotonic()
                        request.tokens += tokens
                    yield event
        except ApiError as error:
            request.status = error.status
            raise
        except (GeneratorExit, asyncio.CancelledError):
            request.status = CLIENT_GONE
            raise
        except BaseException:
            request.status = 500
            raise
        finally:
            self.record(request)

    def record(self, request: Measured) -> None:
        """Count a request that ends now."""
        tags = _tags(request.model, request.version)
        self._requests.inc(tags=tags)
        self._duration.observe(time.monotonic() - request.arrived, tags)
        if request.first_token is not None:
            self._ttft.observe(request.first_token - request.arrived, tags)
        if request.tokens:
            self._tokens.inc(request.tokens, tags)
        if request.status >= 400:
            self._errors.inc(tags={**tags, "status": str(request.status)})


@cache
def _tags(model: str, version: str) -> dict[str, str]:
    """Return the tags of a version; there are as many as versions that have served."""
    return {"model": model, "version": version}
