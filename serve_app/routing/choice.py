"""Which version of which model answers a request."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from typing import NamedTuple

from serve_app.errors import ApiError, cut
from serve_app.protocol.models import SCHEME, adapter_base, described, fits, names
from serve_app.registry.messages import AdapterVersion, ServedModel, Table, VersionStatus

_LISTED = 10
"""Names that a message lists."""
_RETRY_S = 5


class Choice(NamedTuple):
    """What answers a request: the version `ref` of a model, with `adapter` if one was asked for."""

    model: ServedModel
    ref: str
    adapter: AdapterVersion | None = None


def choose(table: Table, model: str, session: str | None, request_id: str) -> Choice:
    """Return what answers a request for `model`.

    The name of a model means the version that serves or, for the canary's share of the sessions, the canary: the same
    one for a `session` (without one, for the request) in every process, as long as both stay, and a larger share only
    moves sessions to the canary. `NAME@ALIAS` and `models:/NAME/7` mean that version and no other. `NAME:ADAPTER` means
    an adapter of what serves, or of the version that it was trained on, if that is still loaded; never the canary.
    Raises ApiError: 404 for what is not served, 503 for what is not ready yet.
    """
    for served in table.models:
        if model == served.spec.name and served.current is not None:
            return Choice(served, _shared(served, served.current, session or request_id))
    if (found := _status(table, model)) is not None:
        served, status = found
        if not status.answers:
            raise _no_answer(model, status)
        return Choice(served, status.version.ref)
    base, _, name = model.rpartition(":")
    # Otherwise it is a reference, models:/NAME/7.
    asks_for_adapter = bool(base) and not name.startswith("/")
    if asks_for_adapter and (found := _status(table, base)) is not None:
        return _with_adapter(*found, base, name)
    wanted = (base if asks_for_adapter else model).removeprefix(SCHEME)
    if any(wanted in (served.spec.name, served.spec.ref.removeprefix(SCHEME)) for served in table.models):
        raise ApiError(
            503, f"{cut(model)} has no version that serves yet", code="not_ready", retry_after_s=_RETRY_S
        )
    raise not_served(table, model)


def _status(table: Table, model: str) -> tuple[ServedModel, VersionStatus] | None:
    """Return the version that has the name `model`."""
    wanted = model.removeprefix(SCHEME)
    for served in table.models:
        for name, status in names(served).items():
            if name.removeprefix(SCHEME) == wanted:
                return served, status
    return None


def _with_adapter(served: ServedModel, status: VersionStatus, base: str, name: str) -> Choice:
    """Return the choice for the adapter `name` of what is called `base`, which is the version of `status`."""
    # While versions change there may be one for each of them.
    adapters = [adapter for adapter in served.adapters if adapter.name == name]
    there = [adapter for adapter in adapters if adapter.missing is None]
    for adapter in there:
        of = adapter_base(served, adapter) if base == served.spec.name else status
        if of is not None and of.answers and fits(served, adapter, of.version.ref):
            return Choice(served, of.version.ref, adapter)
    if not status.answers:
        raise _no_answer(base, status)
    if not there:
        raise _no_adapter(served, base, name, next(iter(adapters), None))
    raise _not_found(
        f"the adapter {cut(name)!r} was trained on {there[0].base}, and {cut(base)} is {status.version.ref}; "
        "ask for an adapter of that version"
    )


def _no_adapter(served: ServedModel, base: str, name: str, adapter: AdapterVersion | None) -> ApiError:
    if adapter is not None:
        return _not_found(f"the adapter {cut(name)!r} of {cut(base)} is not there: {adapter.missing}")
    there = [f"{served.spec.name}:{adapter.name}" for adapter in served.adapters if adapter.missing is None]
    listed = f"ask for {_listed(there)}" if there else "it has none"
    return _not_found(f"{cut(base)} has no adapter {cut(name)!r} here; {listed}")


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
        return _not_found(f"{cut(model)} is {message}")
    return ApiError(503, f"{cut(model)} is {message}", code="not_ready", retry_after_s=_RETRY_S)


def not_served(table: Table, model: str) -> ApiError:
    """Return the error for a request that asks for what is not served."""
    served = [name for m in table.models for name, status in names(m).items() if status.answers]
    listed = _listed(served) or "it later: no model serves yet"
    return _not_found(f"model {cut(model)!r} is not served here; ask for {listed}")


def _listed(there: Sequence[str]) -> str:
    return ", ".join([*(repr(cut(name)) for name in there[:_LISTED]), *(["..."] if there[_LISTED:] else [])])


def _not_found(message: str) -> ApiError:
    return ApiError(404, message, param="model", code="model_not_found")
