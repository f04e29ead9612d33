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
from serve_app.api import Api
from serve_app.replica import DEFAULT_OPTIONS, DType, LlamaReplica


class ServeArgs(BaseModel):
    """Arguments of `build`, `key=value` after `serve run serve_app.app:build` or `args` in a config file."""

    model_config = ConfigDict(extra="forbid")

    model: str = Field(
        "models:/llama-ray@champion", description="A directory, models:/name/7 or models:/name@alias."
    )
    tracking_uri: str = Field(default_factory=tracking_uri, description="Of the MLflow registry.")
    dtype: DType | None = Field(None, description="To compute in; the stored one where not given.")
    engine: EngineOptions = Field(
        DEFAULT_OPTIONS,
        description="Options of each replica's engine; given flat, beside the other arguments: quantization=int8.",
    )
    num_cpus: float = Field(1, ge=0, description="For each model replica; its threads on the CPU, too.")
    num_gpus: float = Field(0, ge=0, description="For each model replica; 0 computes on the CPU.")
    min_replicas: int = Field(1, ge=1, description="Model replicas that are always there.")
    max_replicas: int = Field(4, ge=1, description="Model replicas under load.")
    target_ongoing_requests: float | None = Field(
        None,
        gt=0,
        description="A replica's share that scaling aims at; 3/4 of max_num_seqs where not given.",
    )
    max_ongoing_requests: int | None = Field(
        None, ge=1, description="A replica gets so many at once; 2 x max_num_seqs where not given."
    )
    max_queued_requests: int = Field(
        256, ge=-1, description="So many more wait; then 429 is the answer. -1: no limit."
    )
    graceful_shutdown_timeout_s: float = Field(
        600, gt=0, description="A replica that stops may finish its answers for so long."
    )

    @model_validator(mode="before")
    @classmethod
    def _collect_engine_options(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        """Move the arguments that are engine options into `engine`."""
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
    """The application: `Api` takes HTTP requests in, `LlamaReplica` answers them and scales with their number."""
    max_num_seqs = args.engine.max_num_seqs
    ongoing = args.max_ongoing_requests or 2 * max_num_seqs
    replicas = serve.deployment(
        ray_actor_options={"num_cpus": args.num_cpus, "num_gpus": args.num_gpus},
        max_ongoing_requests=ongoing,
        max_queued_requests=args.max_queued_requests,
        autoscaling_config=_scaling(args, args.target_ongoing_requests or min(ongoing, 0.75 * max_num_seqs)),
        graceful_shutdown_timeout_s=args.graceful_shutdown_timeout_s,
        logging_config={"enable_access_log": False},  # the API logs each request already
    )(LlamaReplica).bind(
        existing_ref(args.model),
        args.tracking_uri,
        device="cuda" if args.num_gpus else "cpu",
        threads=int(args.num_cpus),
        dtype=args.dtype,
        options=args.engine,
    )
    # The API only passes things on: it takes whatever comes, so that /health and the answer 429 never have to wait.
    application: Application = serve.deployment(
        ray_actor_options={"num_cpus": _API_CPUS},
        max_ongoing_requests=_API_REQUESTS,
        autoscaling_config=_scaling(args, _API_TARGET),
        graceful_shutdown_timeout_s=args.graceful_shutdown_timeout_s,
    )(serve.ingress()(Api)).bind(replicas)
    return application


_API_CPUS = 0.1  # a small share, so that a laptop with two cores has room for a replica and a training worker
_API_REQUESTS = 10_000
_API_TARGET = 100.0  # streams that one process of the API passes on without delaying them


def _scaling(args: ServeArgs, target: float) -> AutoscalingConfig:
    """Up soon, because an answer takes seconds and those who wait notice; down late, because loading takes long."""
    return AutoscalingConfig(
        min_replicas=args.min_replicas,
        max_replicas=args.max_replicas,
        target_ongoing_requests=target,
        look_back_period_s=15,  # Ray's metrics come each 10 s
        upscale_delay_s=5,
        downscale_delay_s=300,
    )
