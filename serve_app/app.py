"""The application that Ray Serve runs: `serve run serve_app.app:build model=models:/llama-ray@champion`."""

# No `from __future__ import annotations`: Serve reads the class of build's argument from its annotation.

import uuid
from dataclasses import replace
from urllib.parse import quote

from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

from llama_ray.storage.paths import is_model_ref
from llama_ray.tracking.registry import parse_ref
from serve_app.api.access import read_keys
from serve_app.api.api import Api, HttpOptions
from serve_app.args import ModelArgs, ServeArgs
from serve_app.registry.follower import RegistryFollower
from serve_app.registry.messages import ModelSpec, Standby
from serve_app.replica.replica import LlamaReplica
from serve_app.routing.admission import QueueLimit
from serve_app.scaling import StandbyPolicy

_FOLLOWER_CPUS, _API_CPUS = 0.01, 0.1
"""Small shares: a laptop with two cores has room for a replica and a training worker."""
_MANY_REQUESTS = 10_000
"""Of a deployment that only passes on: it accepts all of them, so that /health, a 429 or a poll never waits."""
_API_CHECK_S = 10
"""What a check of an API process may take; a body of 8 MiB that is parsed holds its event loop for some seconds."""
_API_TARGET = 100.0
"""Streams that one process of the API passes on without delay."""
_LOOK_BACK_S, _UPSCALE_DELAY_S = 15, 5
"""Of autoscaling. Ray's metrics arrive every 10 s."""
_FAILED_CHECKS = 3
"""After so many of them in a row, Serve replaces a replica."""
_SHORTEST_CHECK_S = 2.0
"""What a call may take on a machine that has too much to do."""


def build(args: ServeArgs) -> Application:
    """Return the application: `Api` receives HTTP requests, the replicas of each model answer them, and
    `RegistryFollower` decides with which version. A model that follows an alias has a standby: a deployment that has no
    replicas until the follower needs them.
    """
    specs = [_spec(args, model) for model in args.served]
    deployed = uuid.uuid4().hex
    follower = _follower(args, specs, deployed)
    replicas: dict[str, Application] = {}
    for model, spec in zip(args.served, specs, strict=True):
        scaling = _scaling(model.min_replicas, model.max_replicas, _target(model))
        replicas[spec.deployment] = _replicas(args, model, spec, follower, spec.deployment, scaling)
        if spec.standby:
            name, scaling = spec.standby.deployment, _standby_scaling(model, deployed)
            replicas[name] = _replicas(args, model, spec, follower, name, scaling)
    application: Application = serve.deployment(
        ray_actor_options={"num_cpus": _API_CPUS},
        max_ongoing_requests=_MANY_REQUESTS,
        autoscaling_config=_scaling(args.min_api_replicas, args.max_api_replicas, _API_TARGET),
        max_surge_percent=100,
        # A process that was killed is replaced with the next check: seconds sooner than by Serve's 10 s.
        health_check_period_s=1,
        health_check_timeout_s=_API_CHECK_S,
        graceful_shutdown_timeout_s=args.graceful_shutdown_timeout_s,
    )(serve.ingress()(Api)).bind(
        follower,
        replicas,
        queue_limits={
            model.name: QueueLimit(_ongoing(model), model.max_queued_requests) for model in args.served
        },
        resume_timeout_s=args.resume_timeout_s,
        http=_http_options(args),
    )
    return application


def _follower(args: ServeArgs, specs: list[ModelSpec], deployed: str) -> Application:
    """One replica, and never two: without surge, the old one ends before the new one starts. Meanwhile the others go
    on as they are.
    """
    application: Application = serve.deployment(
        ray_actor_options={"num_cpus": _FOLLOWER_CPUS},
        num_replicas=1,
        max_ongoing_requests=_MANY_REQUESTS,
        # A poll that is cut off is sent again.
        graceful_shutdown_timeout_s=5,
        logging_config={"enable_access_log": False},
    )(RegistryFollower).bind(
        tuple(specs),
        args.tracking_uri,
        registry_poll_s=args.registry_poll_s,
        stuck_after_s=args.stuck_after_s,
        # Versions that were rejected are tried again when somebody deploys the application.
        deployed=deployed,
    )
    return application


def _replicas(
    args: ServeArgs,
    model: ModelArgs,
    spec: ModelSpec,
    follower: Application,
    name: str,
    scaling: AutoscalingConfig,
) -> Application:
    check_s = max(_SHORTEST_CHECK_S, args.stuck_after_s / _FAILED_CHECKS)
    application: Application = serve.deployment(
        name=name,
        ray_actor_options=_resources(model),
        max_ongoing_requests=_ongoing(model),
        # The API counts them, because Serve's limit is one of each API process.
        max_queued_requests=-1,
        autoscaling_config=scaling,
        max_surge_percent=model.max_surge_percent,
        # A process that does not run at all is found after the same time as a step that hangs. A check waits for the
        # event loop only, never for the engine.
        health_check_period_s=min(5, check_s),
        health_check_timeout_s=check_s,
        graceful_shutdown_timeout_s=args.graceful_shutdown_timeout_s,
        # The API logs each request already.
        logging_config={"enable_access_log": False},
    )(LlamaReplica).bind(
        spec,
        follower,
        args.tracking_uri,
        device="cuda" if model.num_gpus else "cpu",
        threads=int(model.num_cpus),
        dtype=model.dtype,
        options=model.engine,
        gate_timeout_s=model.gate_timeout_s,
        memory_bytes=model.memory_bytes,
        stuck_after_s=args.stuck_after_s,
    )
    return application


def _spec(args: ServeArgs, model: ModelArgs) -> ModelSpec:
    # Ray puts the name into paths.
    suffix = "" if len(args.served) == 1 else f"-{quote(model.name, safe='')}"
    follows = is_model_ref(model.model) and parse_ref(model.model).alias is not None
    standby = Standby(f"LlamaStandby{suffix}", model.max_replicas, _needs(model)) if follows else None
    return replace(model.spec, deployment=f"LlamaReplica{suffix}", standby=standby)


def _resources(model: ModelArgs) -> dict[str, float]:
    """Return what Ray reserves on a node for a replica."""
    resources = {"num_cpus": model.num_cpus, "num_gpus": model.num_gpus}
    return resources if model.memory_bytes is None else resources | {"memory": model.memory_bytes}


def _needs(model: ModelArgs) -> str:
    """Return the same for people."""
    numbers = {"CPUs": model.num_cpus, "GPUs": model.num_gpus, "bytes of memory": model.memory_bytes}
    return ", ".join(f"{number:g} {name}" for name, number in numbers.items() if number) or "a process"


def _ongoing(model: ModelArgs) -> int:
    return model.max_ongoing_requests or 2 * model.engine.max_num_seqs


def _target(model: ModelArgs) -> float:
    return model.target_ongoing_requests or min(_ongoing(model), 0.75 * model.engine.max_num_seqs)


def _standby_scaling(model: ModelArgs, deployed: str) -> AutoscalingConfig:
    """No replicas at first, then as many as the follower says, at once, and more under load."""
    return AutoscalingConfig(
        min_replicas=0,
        max_replicas=model.max_replicas,
        target_ongoing_requests=_target(model),
        look_back_period_s=_LOOK_BACK_S,
        upscale_delay_s=_UPSCALE_DELAY_S,
        downscale_delay_s=0,
        policy=AutoscalingPolicy(  # type: ignore[no-untyped-call]
            policy_function=StandbyPolicy, policy_kwargs={"deployed": deployed}
        ),
    )


def _http_options(args: ServeArgs) -> HttpOptions:
    return HttpOptions(
        args.max_body_bytes, read_keys(args.api_keys), args.allow_anonymous, tuple(args.cors_origins)
    )


def _scaling(least: int, most: int, target: float) -> AutoscalingConfig:
    """Scale up soon, because clients wait meanwhile, and down late, because loading a model takes long."""
    return AutoscalingConfig(
        min_replicas=least,
        max_replicas=most,
        target_ongoing_requests=target,
        look_back_period_s=_LOOK_BACK_S,
        upscale_delay_s=_UPSCALE_DELAY_S,
        downscale_delay_s=300,
    )
