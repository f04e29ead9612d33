"""The application that Ray Serve runs: `serve run serve_app.app:build model=models:/llama-ray@champion`."""

# No `from __future__ import annotations`: Serve reads the class of build's argument from its annotation.

from dataclasses import asdict, fields, replace
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig

from llama_ray.generation.options import EngineOptions
from llama_ray.storage.paths import existing_ref
from llama_ray.tracking.uri import tracking_uri
from serve_app.api.api import MAX_BODY_BYTES, Api
from serve_app.replica.replica import DEFAULT_OPTIONS, DType, LlamaReplica

_API_CPUS = 0.1
"""A small share: a laptop with two cores has room for a replica and a training worker."""
_API_REQUESTS = 10_000
_API_TARGET = 100.0
"""Streams that one process of the API passes on without delay."""


_MOST = 1_000_000
"""Of replicas, requests, processors and seconds: more is a mistake that Ray would not explain."""


class ServeArgs(BaseModel):
    """Arguments of `build`, `key=value` after `serve run serve_app.app:build` or `args` in a config file."""

    # The URI may hold a password.
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, hide_input_in_errors=True)

    model: str = Field(
        "models:/llama-ray@champion", description="A directory, models:/name/7 or models:/name@alias."
    )
    tracking_uri: str = Field(
        default_factory=tracking_uri, repr=False, description="URI of the MLflow registry."
    )
    dtype: DType | None = Field(None, description="Compute in this type; default: the stored one.")
    engine: EngineOptions = Field(
        DEFAULT_OPTIONS,
        description="Options of each replica's engine; given flat, beside the other arguments: quantization=int8.",
    )
    num_cpus: float = Field(
        1, ge=0, le=_MOST, description="CPUs per replica, and its threads if it computes on the CPU."
    )
    num_gpus: float = Field(0, ge=0, le=_MOST, description="GPUs per replica; 0 computes on the CPU.")
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
        256, ge=-1, le=_MOST, description="Queue limit; beyond it the API returns 429. -1: no limit."
    )
    max_body_bytes: int = Field(
        MAX_BODY_BYTES,
        ge=1,
        le=2**30,
        description="Size of a request's body; the API answers a larger one with 413.",
    )
    graceful_shutdown_timeout_s: float = Field(
        600, gt=0, le=_MOST, description="Seconds to drain before a replica is killed."
    )

    @model_validator(mode="before")
    @classmethod
    def _collect_engine_options(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        """Move the arguments that are engine options into `engine`; refuse true and false for numbers."""
        # The fields that have limits.
        numbers = {field.name for field in fields(EngineOptions) if field.metadata}
        numbers |= {name for name, field in cls.model_fields.items() if field.metadata}
        for name in sorted(numbers & arguments.keys()):
            if isinstance(arguments[name], bool):
                raise ValueError(f"{name} is {arguments[name]}; it must be a number")
        names = {field.name for field in fields(EngineOptions)}
        options = {name: value for name, value in arguments.items() if name in names}
        others = {name: value for name, value in arguments.items() if name not in names}
        return {"engine": asdict(DEFAULT_OPTIONS) | options} | others

    @model_validator(mode="after")
    def _options_fit(self) -> Self:
        if self.engine.draft_model is not None:
            self.engine = replace(self.engine, draft_model=existing_ref(self.engine.draft_model))
        shards = self.engine.tensor_parallel
        if self.num_gpus and shards > 1 and self.num_gpus != shards:
            raise ValueError(f"num_gpus is {self.num_gpus:g} and tensor_parallel {shards}; make them equal")
        return self

    @model_validator(mode="after")
    def _replicas_in_order(self) -> Self:
        if self.max_replicas < self.min_replicas:
            raise ValueError(
                f"max_replicas is {self.max_replicas}; it must be at least min_replicas, {self.min_replicas}"
            )
        return self


def build(args: ServeArgs) -> Application:
    """Return the application: `Api` receives HTTP requests, `LlamaReplica` answers them; both scale with the load."""
    max_num_seqs = args.engine.max_num_seqs
    ongoing = args.max_ongoing_requests or 2 * max_num_seqs
    replicas = serve.deployment(
        ray_actor_options={"num_cpus": args.num_cpus, "num_gpus": args.num_gpus},
        max_ongoing_requests=ongoing,
        max_queued_requests=args.max_queued_requests,
        autoscaling_config=_scaling(args, args.target_ongoing_requests or min(ongoing, 0.75 * max_num_seqs)),
        graceful_shutdown_timeout_s=args.graceful_shutdown_timeout_s,
        # The API logs each request already.
        logging_config={"enable_access_log": False},
    )(LlamaReplica).bind(
        existing_ref(args.model),
        args.tracking_uri,
        device="cuda" if args.num_gpus else "cpu",
        threads=int(args.num_cpus),
        dtype=args.dtype,
        options=args.engine,
    )
    # The API only passes requests on. It accepts all of them, so that /health and a 429 never wait.
    application: Application = serve.deployment(
        ray_actor_options={"num_cpus": _API_CPUS},
        max_ongoing_requests=_API_REQUESTS,
        autoscaling_config=_scaling(args, _API_TARGET),
        graceful_shutdown_timeout_s=args.graceful_shutdown_timeout_s,
    )(serve.ingress()(Api)).bind(replicas, args.max_body_bytes)
    return application


def _scaling(args: ServeArgs, target: float) -> AutoscalingConfig:
    """Scale up soon, because clients wait meanwhile, and down late, because loading a model takes long."""
    return AutoscalingConfig(
        min_replicas=args.min_replicas,
        max_replicas=args.max_replicas,
        target_ongoing_requests=target,
        # Ray's metrics arrive every 10 s.
        look_back_period_s=15,
        upscale_delay_s=5,
        downscale_delay_s=300,
    )
