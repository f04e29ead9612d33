"""Which deployments the arguments make."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary
from ray.serve._private.build_app import build_app

from llama_ray.generation.options import EngineOptions
from serve_app.app import build
from serve_app.registry.messages import ModelSpec, Standby


def deployments(**args: Any) -> dict[str, Any]:
    """The deployments by name, as `serve run serve_app.app:build key=value` makes them."""
    application = call_user_app_builder_with_args_if_necessary(build, args)
    built = build_app(application, name="llama-ray", default_runtime_env=None)
    assert built.ingress_deployment_name == "Api"
    return {deployment.name: deployment for deployment in built.deployments}


def test_one_model_is_three_deployments(tmp_path: Path) -> None:
    made = deployments(model=str(tmp_path), num_cpus="2", num_gpus="0.5", max_num_seqs="8", dtype="bfloat16")
    assert set(made) == {"Api", "LlamaReplica", "RegistryFollower"}
    replicas = made["LlamaReplica"]
    assert replicas.init_args[0] == ModelSpec(tmp_path.name, str(tmp_path))
    assert replicas.init_args[1].deployment_name == "RegistryFollower"
    assert replicas.init_kwargs["device"] == "cuda"
    assert replicas.init_kwargs["threads"] == 2
    assert replicas.init_kwargs["dtype"] == "bfloat16"
    assert replicas.init_kwargs["options"] == EngineOptions(max_num_seqs=8)
    assert replicas.ray_actor_options["num_gpus"] == 0.5
    assert replicas.max_ongoing_requests == 16


def test_each_of_several_models_has_replicas_of_its_own() -> None:
    made = deployments(
        models=[
            {"model": "models:/big@champion", "num_gpus": 1, "max_queued_requests": 5},
            {"model": "models:/a name+ü/7", "max_replicas": 2},
        ]
    )
    big, other = "LlamaReplica-big", "LlamaReplica-a%20name%2B%C3%BC"
    # Only a model that follows an alias needs one.
    standby = "LlamaStandby-big"
    assert set(made) == {"Api", "RegistryFollower", big, standby, other}
    assert made["LlamaReplica-big"].ray_actor_options["num_gpus"] == 1
    assert made["LlamaReplica-a%20name%2B%C3%BC"]._deployment_config.autoscaling_config.max_replicas == 2
    follower, replicas = made["Api"].init_args
    assert follower.deployment_name == "RegistryFollower"
    assert {name: handle.deployment_name for name, handle in replicas.items()} == {
        name: name for name in (big, standby, other)
    }
    limits = made["Api"].init_kwargs["queue_limits"]
    assert {name: limit.max_queued for name, limit in limits.items()} == {"big": 5, "a name+ü": 256}
    assert {name: limit.max_ongoing for name, limit in limits.items()} == {"big": 32, "a name+ü": 32}
    specs = made["RegistryFollower"].init_args[0]
    assert {spec.name: (spec.deployment, spec.standby) for spec in specs} == {
        "big": (big, Standby(standby, 4, "1 CPUs, 1 GPUs")),
        "a name+ü": (other, None),
    }


def test_a_standby_is_like_the_replicas_but_has_none_at_first() -> None:
    made = deployments(num_cpus="2", memory_bytes="1000", min_replicas="2", max_replicas="3")
    replicas, standby = made["LlamaReplica"], made["LlamaStandby"]
    for attribute in ("init_kwargs", "ray_actor_options", "max_ongoing_requests"):
        assert getattr(standby, attribute) == getattr(replicas, attribute)
    assert standby.ray_actor_options["memory"] == standby.init_kwargs["memory_bytes"] == 1000
    scaling = standby._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.initial_replicas, scaling.max_replicas) == (0, None, 3)
    # Serve's controller has none of our packages: it gets the policy by value.
    assert scaling.policy.get_policy().__name__ == "StandbyPolicy"


def test_replicas_are_held_to_their_limits() -> None:
    made = deployments(min_replicas="2", max_replicas="3", max_queued_requests="7", max_api_replicas="2")
    api, replicas = made["Api"], made["LlamaReplica"]
    scaling = replicas._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas) == (2, 3)
    assert scaling.target_ongoing_requests <= replicas.max_ongoing_requests
    # The API counts, for all its processes together; what it turns away, it must have taken in to answer it.
    assert replicas.max_queued_requests == -1
    assert api.max_ongoing_requests > 3 * replicas.max_ongoing_requests + 7
    assert api._deployment_config.autoscaling_config.max_replicas == 2
    assert replicas._deployment_config.graceful_shutdown_timeout_s == 600


def test_there_is_never_a_second_follower_and_new_replicas_start_before_old_ones_end() -> None:
    made = deployments()
    follower = made["RegistryFollower"]
    assert (follower.num_replicas, follower._deployment_config.max_surge_percent) == (1, 0)
    assert follower.ray_actor_options["num_cpus"] <= 0.1
    for name in ("Api", "LlamaReplica"):
        assert made[name]._deployment_config.max_surge_percent == 100
    assert deployments(max_surge_percent="0")["LlamaReplica"]._deployment_config.max_surge_percent == 0


@pytest.mark.parametrize(("stuck_after_s", "timeout_s"), [(60, 20), (1, 2)])
def test_a_process_that_does_not_run_is_found_like_a_step_that_hangs(
    stuck_after_s: float, timeout_s: float
) -> None:
    config = deployments(stuck_after_s=stuck_after_s)["LlamaReplica"]._deployment_config
    assert config.health_check_timeout_s == timeout_s
    assert config.health_check_period_s <= timeout_s


def test_bad_arguments_are_refused_before_anything_is_deployed() -> None:
    with pytest.raises(ValidationError, match="canary needs a model that follows an alias"):
        deployments(model="models:/x/7", canary="challenger")
