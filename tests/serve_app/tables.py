"""Tables that a follower of the registry would send."""

from __future__ import annotations

from serve_app.registry.messages import (
    EngineInfo,
    ModelSpec,
    ModelVersion,
    ServedModel,
    Table,
    VersionState,
    VersionStatus,
)

INFO = EngineInfo(created=1_700_000_000, max_model_len=4096, parameters=134_000_000, device="cpu", loss=2.5)


def version(
    number: int, state: VersionState, *aliases: str, name: str = "llama", reason: str | None = None
) -> VersionStatus:
    """A version of the model; those that can answer are loaded by two replicas."""
    ref = f"models:/{name}/{number}"
    loaded = state in ("serving", "canary", "previous")
    return VersionStatus(
        ModelVersion(name, ref, ref, number, run_id=f"run{number}", validation_loss=number / 2),
        state,
        aliases,
        reason,
        {"LlamaReplica": 2} if loaded else {},
        INFO if loaded else None,
    )


def served(*versions: VersionStatus, share: float = 0.1, notice: str | None = None) -> ServedModel:
    """The model `llama`, which follows `champion` and has `challenger` for a canary."""
    spec = ModelSpec("llama", "models:/llama@champion", canary_alias="challenger", canary_share=share)
    refs = {status.state: status.version.ref for status in versions}
    return ServedModel(spec, refs.get("serving"), refs.get("canary"), versions, notice)


def directory(name: str = "tiny") -> ServedModel:
    """A model in a directory."""
    status = VersionStatus(
        ModelVersion(name, name, f"/models/{name}"), "serving", ready={"LlamaReplica": 1}, info=INFO
    )
    return ServedModel(ModelSpec(name, f"/models/{name}"), name, None, (status,))


def table(*models: ServedModel) -> Table:
    """A table of these models."""
    return Table(1, models)
