"""Which version of which model answers a request."""

from __future__ import annotations

from hashlib import blake2b

from serve_app.errors import ApiError, cut
from serve_app.protocol.models import SCHEME, described, names
from serve_app.registry.messages import ServedModel, Table, VersionStatus

_LISTED = 10
"""Names that a message lists."""
_RETRY_S = 5


def choose(table: Table, model: str, session: str | None, request_id: str) -> tuple[ServedModel, str]:
    """Return the model, and the `ref` of its version, that answers a request for `model`.

    The name of a model means the version that serves or, for the canary's share of the sessions, the canary: the same
    one for a `session` (without one, for the request) in every process, as long as both stay, and a larger share only
    moves sessions to the canary. `NAME@ALIAS` and `models:/NAME/7` mean that version and no other. Raises ApiError: 404
    for what is not served, 503 for what is not ready yet.
    """
    for served in table.models:
        if model == served.spec.name and served.current is not None:
            return served, _shared(served, served.current, session or request_id)
    wanted = model.removeprefix(SCHEME)
    for served in table.models:
        for name, status in names(served).items():
            if name.removeprefix(SCHEME) != wanted:
                continue
            if not status.answers:
                raise _no_answer(model, status)
            return served, status.version.ref
    if any(wanted in (served.spec.name, served.spec.ref.removeprefix(SCHEME)) for served in table.models):
        raise ApiError(
            503, f"{cut(model)} has no version that serves yet", code="not_ready", retry_after_s=_RETRY_S
        )
    raise not_served(table, model)


def _shared(model: ServedModel, current: str, key: str) -> str:
    canary = model.canary and model.status(model.canary)
    if not canary or not canary.is_ready or _position(model.spec.name, key) >= model.spec.canary_share:
        return current
    return canary.version.ref


def _position(name: str, key: str) -> float:
    """Return a number from 0 to below 1 that is uniform over keys, and differs from model to model."""
    # JSON can hold half of a surrogate pair.
    digest = blake2b(f"{name}\0{key}".encode("utf-8", "surrogatepass"), digest_size=6).digest()
    return int.from_bytes(digest) / 2**48


def _no_answer(model: str, status: VersionStatus) -> ApiError:
    ref = status.version.ref
    message = f"{described(status)}" if model == ref else f"{ref}, which is {described(status)}"
    if status.state == "rejected":
        # It stays so: whoever asks again gets the same answer.
        return ApiError(404, f"{cut(model)} is {message}", param="model", code="model_not_found")
    return ApiError(503, f"{cut(model)} is {message}", code="not_ready", retry_after_s=_RETRY_S)


def not_served(table: Table, model: str) -> ApiError:
    """Return the error for a request that asks for what is not served."""
    served = [name for m in table.models for name, status in names(m).items() if status.answers]
    listed = ", ".join(
        [*(repr(cut(name)) for name in served[:_LISTED]), *(["..."] if served[_LISTED:] else [])]
    )
    message = f"model {cut(model)!r} is not served here; ask for {listed or 'it later: no model serves yet'}"
    return ApiError(404, message, param="model", code="model_not_found")
