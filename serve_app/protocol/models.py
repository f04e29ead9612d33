"""Which names clients can ask for, and the bodies of `GET /v1/models`, `/health` and `/ready`."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel

from llama_ray.utils.redact import redact
from serve_app.errors import ApiError
from serve_app.registry.messages import AdapterVersion, ServedModel, Table, VersionStatus

SCHEME = "models:/"
"""What the exact reference of a registered version begins with; clients may leave it out."""


class ModelCard(BaseModel):
    """An entry of `GET /v1/models`: `root` is the exact version behind `id`, `metadata` what is known about it.

    `created` is 0 and `max_model_len` null for a version that has not been loaded.
    """

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "llama_ray"
    root: str
    parent: str | None = None
    max_model_len: int | None
    metadata: dict[str, str | int | float | list[str] | None]

    @classmethod
    def of(cls, name: str, status: VersionStatus, notice: str | None) -> Self:
        """Return the card of a version by the name `name`."""
        version, info = status.version, status.info
        return cls(
            id=name,
            created=info.created if info else 0,
            root=version.ref,
            max_model_len=info.max_model_len if info else None,
            metadata={
                "version": version.number,
                "aliases": list(status.aliases),
                "state": status.state,
                "reason": status.reason,
                "run_id": version.run_id,
                "validation_loss": version.validation_loss,
                "parameters": info.parameters if info else None,
                "device": info.device if info else None,
                "chat_template": info.chat_template if info else None,
                "replicas": sum(status.ready.values()),
                "notice": notice,
            },
        )

    @classmethod
    def of_adapter(cls, model: ServedModel, adapter: AdapterVersion, base: VersionStatus) -> Self:
        """Return the card of an adapter of the version `base`; `root` is what is loaded, `parent` the version."""
        name, parent = f"{model.spec.name}:{adapter.name}", base.version.ref
        return cls.of(name, base, model.notice).model_copy(
            update={"root": redact(adapter.location), "parent": parent}
        )


class ModelList(BaseModel):
    """The body of `GET /v1/models`."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class Health(BaseModel):
    """The body of `GET /health`: the process answers."""

    status: Literal["ok"] = "ok"


class Version(BaseModel):
    """The body of `GET /version`."""

    version: str


class Ready(BaseModel):
    """The body of `GET /ready`: every model can answer."""

    status: Literal["ready"] = "ready"


def names(model: ServedModel) -> dict[str, VersionStatus]:
    """Return what each name of a model means now: NAME, NAME@ALIAS, and the exact references of all its versions.

    The alias that is followed means the version that serves, and the canary's alias the canary, also while the
    registry says otherwise already: the version that it names there is loading, or was rejected. Before one serves, it
    is that version.
    """
    name, canary_alias = model.spec.name, model.spec.canary_alias
    ref = model.spec.ref.removeprefix(SCHEME)
    alias = ref.partition("@")[2] if ref != model.spec.ref else ""
    current = model.current or _holder(model, alias)
    found = {name: current}
    if alias:
        found[f"{name}@{alias}"] = current
    if canary_alias is not None:
        found[f"{name}@{canary_alias}"] = model.canary or _holder(model, canary_alias)
    for status in model.versions:
        for other in status.aliases if status.answers else ():
            found.setdefault(f"{name}@{other}", status.version.ref)
    by_ref = {status.version.ref: status for status in model.versions}
    return {key: by_ref[ref] for key, ref in found.items() if ref in by_ref} | by_ref


def adapter_base(model: ServedModel, adapter: AdapterVersion) -> VersionStatus | None:
    """Return the version that answers MODEL:ADAPTER: the one that it was trained on, or the current one if that is not
    known. None if neither can.
    """
    for ref in (adapter.base, model.current):
        status = None if ref is None else model.status(ref)
        if status is not None and status.answers and fits(model, adapter, status.version.ref):
            return status
    return None


def fits(model: ServedModel, adapter: AdapterVersion, ref: str) -> bool:
    """Return whether an adapter may be of the version `ref`; what its tag does not tell, its weights will."""
    is_of_a_version = adapter.base is not None and adapter.base.startswith(f"{SCHEME}{model.spec.name}/")
    return not is_of_a_version or adapter.base == ref


def _holder(model: ServedModel, alias: str) -> str | None:
    """Return the version that has `alias` in the registry."""
    return next((status.version.ref for status in model.versions if alias in status.aliases), None)


def cards(table: Table) -> list[ModelCard]:
    """Return a card for each name that can be asked for now, and one for the exact reference of each other version."""
    found = dict[str, ModelCard]()
    for model in table.models:
        for name, status in names(model).items():
            if status.answers or name == status.version.ref:
                found.setdefault(name, ModelCard.of(name, status, model.notice))
        for adapter in model.adapters:
            base = adapter_base(model, adapter)
            if base is not None and adapter.missing is None:
                card = ModelCard.of_adapter(model, adapter, base)
                found.setdefault(card.id, card)
    return list(found.values())


def ready(table: Table | None) -> Ready:
    """Raise ApiError (503) unless a replica of every model can answer; `table` is None before the first came."""
    if table is None:
        missing = ["the follower of the registry has not answered yet"]
    else:
        missing = [reason for model in table.models if (reason := _missing(model))]
    if missing:
        raise ApiError(503, f"not ready: {'; '.join(missing)}", code="not_ready", retry_after_s=5)
    return Ready()


def _missing(model: ServedModel) -> str | None:
    current = model.current and model.status(model.current)
    if current:
        return None if current.is_ready else f"{current.version.ref} has no replica that is ready"
    states = [f"{status.version.ref} is {described(status)}" for status in model.versions]
    return f"{model.spec.name} has no version that serves ({', '.join([*states, *_notice(model)]) or 'none is known'})"


def described(status: VersionStatus) -> str:
    """Return the state of a version with the reason, if there is one."""
    return status.state if status.reason is None else f"{status.state}: {status.reason}"


def _notice(model: ServedModel) -> list[str]:
    return [] if model.notice is None else [model.notice]
