"""The arguments of the application: what it serves, on what, and for how many requests."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from llama_ray.generation.options import EngineOptions
from llama_ray.storage.paths import existing_ref, is_model_ref, model_name
from llama_ray.tracking.registry import parse_ref
from llama_ray.tracking.uri import tracking_uri
from llama_ray.utils.fields import shown
from serve_app.api.api import MAX_BODY_BYTES
from serve_app.registry.messages import ModelSpec
from serve_app.replica.loader import DEFAULT_OPTIONS, DType

_MOST = 1_000_000
"""Of replicas, requests, processors and seconds: more is a mistake that Ray would not explain."""
_ENGINE = frozenset(field.name for field in fields(EngineOptions))


class ModelArgs(BaseModel):
    """What one model needs, the engine's options beside the others: `quantization=int8`."""

    # A draft model's directory or a tracking URI may hold a password.
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, hide_input_in_errors=True)

    model: str = Field(
        "models:/llama-ray@champion",
        description="A directory, a .gguf file, hf://ORG/NAME, models:/name/7, or models:/name@alias to follow.",
    )
    dtype: DType | None = Field(None, description="Compute in this type; default: the stored one.")
    engine: EngineOptions = Field(
        DEFAULT_OPTIONS,
        description="Options of each replica's engine; given flat, beside the other arguments.",
    )
    adapters: dict[str, str] = Field(
        {},
        description="Adapters that clients may ask for, as MODEL:NAME: a directory, models:/name/7 or "
        "models:/name@alias for each name.",
    )
    adapters_from: Literal["registry"] | None = Field(
        None, description="registry: also those that are registered for the version that serves."
    )
    num_cpus: float = Field(
        1, ge=0, le=_MOST, description="CPUs per replica, and its threads if it computes on the CPU."
    )
    num_gpus: float = Field(0, ge=0, le=_MOST, description="GPUs per replica; 0 computes on the CPU.")
    memory_bytes: int | None = Field(
        None,
        ge=1,
        lt=2**63,
        description="The node's memory per replica, which Ray reserves and a replica on the CPU keeps within; default: "
        "what is free.",
    )
    min_replicas: int = Field(1, ge=1, le=_MOST, description="Replicas without load.")
    max_replicas: int = Field(4, ge=1, le=_MOST, description="Replicas under load, at most.")
    target_ongoing_requests: float | None = Field(
        None,
        gt=0,
        le=_MOST,
        description="Target in-flight requests per replica; default 3/4 of max_num_seqs.",
    )
    max_ongoing_requests: int | None = Field(
        None, ge=1, le=_MOST, description="Most in-flight requests per replica; default 2 x max_num_seqs."
    )
    max_queued_requests: int = Field(
        256,
        ge=-1,
        le=_MOST,
        description="Requests that wait for a replica, of all API processes together; the API answers more with 429. "
        "-1: no limit.",
    )
    max_surge_percent: int = Field(
        100,
        ge=0,
        le=100,
        description="New replicas that may start, beside the old ones, when a changed file is deployed, in percent of "
        "those; 0 stops old ones first, for a machine that has no room for both.",
    )
    canary: str | None = Field(
        None, description="Alias of the version that a share of the requests goes to: challenger."
    )
    canary_share: float = Field(0.1, ge=0, le=1, description="Share of the requests that the canary answers.")
    keep_previous_s: float = Field(
        0, ge=0, le=_MOST, description="Seconds for which the version served before stays loaded."
    )
    gate_timeout_s: float = Field(
        60, gt=0, le=_MOST, description="A version that takes longer for its first token does not serve."
    )

    @model_validator(mode="before")
    @classmethod
    def _collect_engine_options(cls, arguments: Any) -> Any:
        """Move the arguments that are engine options into `engine`; refuse true and false for numbers."""
        if not isinstance(arguments, Mapping):
            return arguments
        # The fields that have limits.
        numbers = {field.name for field in fields(EngineOptions) if field.metadata}
        numbers |= {name for name, field in cls.model_fields.items() if field.metadata}
        for name in sorted(numbers & arguments.keys()):
            if isinstance(arguments[name], bool):
                raise ValueError(f"{name} is {arguments[name]}; it must be a number")
        options = {name: value for name, value in arguments.items() if name in _ENGINE}
        others = {name: value for name, value in arguments.items() if name not in _ENGINE}
        if options and "engine" in others:
            raise ValueError(f"engine is given beside {next(iter(options))}; give one of them")
        given = others.get("engine", options)
        if isinstance(given, Mapping):
            others["engine"] = {**asdict(DEFAULT_OPTIONS), **given}
        return others

    @model_validator(mode="after")
    def _references_are_complete(self) -> Self:
        self.model = existing_ref(self.model)
        if self.engine.draft_model is not None:
            self.engine = replace(self.engine, draft_model=existing_ref(self.engine.draft_model))
        if not self.name:
            raise ValueError(f"model is {shown(self.model)}; it must be the directory of one model")
        return self

    @model_validator(mode="after")
    def _adapters_fit(self) -> Self:
        for name in self.adapters:
            if not re.fullmatch(r"[\w.-]+", name):
                raise ValueError(
                    f"adapters has the name {shown(name)}; it must be of letters, digits, -, _ and .; rename it"
                )
        self.adapters = {name: existing_ref(ref) for name, ref in self.adapters.items()}
        if (self.adapters or self.adapters_from) and self.engine.tensor_parallel > 1:
            raise ValueError(
                f"tensor_parallel is {self.engine.tensor_parallel}; it must be 1 for adapters; set it, or merge "
                "them into their model"
            )
        return self

    @model_validator(mode="after")
    def _options_fit(self) -> Self:
        shards = self.engine.tensor_parallel
        if self.num_gpus and shards > 1 and self.num_gpus != shards:
            raise ValueError(f"num_gpus is {self.num_gpus:g} and tensor_parallel {shards}; make them equal")
        _check_order("min_replicas", self.min_replicas, "max_replicas", self.max_replicas)
        if self.max_queued_requests == 0:
            # A request that is on its way to a replica counts, too.
            raise ValueError("max_queued_requests is 0; it must be at least 1, or -1 for no limit")
        return self

    @model_validator(mode="after")
    def _canary_is_another_alias(self) -> Self:
        if self.canary is None:
            return self
        if not re.fullmatch(r"[\w-]+", self.canary):
            raise ValueError(f"canary is {shown(self.canary)}; it must be an alias: letters, digits, - and _")
        followed = parse_ref(self.model).alias if is_model_ref(self.model) else None
        if followed is None:
            raise ValueError(
                f"canary is {shown(self.canary)} and model {shown(self.model)}; a canary needs a model that follows an "
                "alias: models:/NAME@ALIAS"
            )
        if followed == self.canary:
            raise ValueError(f"canary is {shown(self.canary)}, as the alias in model; choose another alias")
        return self

    @property
    def name(self) -> str:
        """What clients ask for: the registered name, or that of the directory."""
        return parse_ref(self.model).name if is_model_ref(self.model) else model_name(self.model)

    @property
    def spec(self) -> ModelSpec:
        """What the follower of the registry needs to know."""
        return ModelSpec(
            self.name,
            self.model,
            canary_alias=self.canary,
            canary_share=self.canary_share,
            keep_previous_s=self.keep_previous_s,
            adapters=tuple(self.adapters.items()),
            finds_adapters=self.adapters_from == "registry",
        )


class ServeArgs(ModelArgs):
    """Arguments of `build`, `key=value` after `serve run serve_app.app:build` or `args` in a config file.

    They describe one model, or list several as `models`, each with arguments of its own.
    """

    models: list[ModelArgs] | None = Field(
        None, min_length=1, description="Several models; each has the arguments that one would have."
    )
    tracking_uri: str = Field(
        default_factory=tracking_uri, repr=False, description="URI of the MLflow registry."
    )
    registry_poll_s: float = Field(
        5, gt=0, le=_MOST, description="Seconds between two looks at the registry's aliases."
    )
    resume_timeout_s: float = Field(
        120,
        ge=0,
        le=_MOST,
        description="Seconds for which a request whose replica was lost waits for another one.",
    )
    stuck_after_s: float = Field(
        60,
        ge=1,
        le=_MOST,
        description="A replica whose step has not ended after so many seconds is replaced.",
    )
    min_api_replicas: int = Field(1, ge=1, le=_MOST, description="API processes without load.")
    max_api_replicas: int = Field(4, ge=1, le=_MOST, description="API processes under load, at most.")
    max_body_bytes: int = Field(
        MAX_BODY_BYTES,
        ge=1,
        le=2**30,
        description="Size of a request's body; the API answers a larger one with 413.",
    )
    api_keys: str | None = Field(
        None,
        description="File with a line for each key that may use the API, its name and SHA-256; LLAMA_RAY_API_KEYS may "
        "hold keys, too. Without any, no key is asked for.",
    )
    allow_anonymous: bool = Field(
        False, description="Listen on a public address, too, although no key is asked for."
    )
    cors_origins: list[str] = Field(
        [], description="Origins whose pages may use the API from a browser: https://chat.example; * is any."
    )
    graceful_shutdown_timeout_s: float = Field(
        600, gt=0, le=_MOST, description="Seconds to drain before a replica is killed."
    )

    @model_validator(mode="before")
    @classmethod
    def _one_or_several(cls, arguments: Any) -> Any:
        if not isinstance(arguments, Mapping) or arguments.get("models") is None:
            return arguments
        flat = [name for name in arguments if name in ModelArgs.model_fields or name in _ENGINE]
        if flat:
            raise ValueError(f"{flat[0]} is given beside models; give each of the models its own {flat[0]}")
        return arguments

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        names = [model.name for model in self.served]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(
                    f"models has {names.count(name)} models named {shown(name)}; serve each name once"
                )
        _check_order("min_api_replicas", self.min_api_replicas, "max_api_replicas", self.max_api_replicas)
        return self

    @property
    def served(self) -> Sequence[ModelArgs]:
        """The arguments of each model."""
        return self.models or [self]


def _check_order(low_name: str, low: int, high_name: str, high: int) -> None:
    if high < low:
        raise ValueError(f"{high_name} is {high}; it must be at least {low_name}, {low}")
