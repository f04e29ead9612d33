"""The arguments of the application, and the file that deploys it."""

from __future__ import annotations

import inspect
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary
from ray.serve.schema import ServeDeploySchema

import serve_app.app
from llama_ray.generation.options import EngineOptions
from serve_app.app import ServeArgs, build

CONFIG = yaml.safe_load(Path(inspect.getfile(serve_app.app)).with_name("config.yaml").read_text())


def deployments(**args: Any) -> tuple[Any, Any]:
    """The API's and the replicas' deployment, as `serve run serve_app.app:build key=value` makes them."""
    application = call_user_app_builder_with_args_if_necessary(build, args)
    api = application._bound_deployment
    replicas, _ = api.init_args
    return api, replicas._bound_deployment


def test_strings_from_the_command_line_are_enough(tmp_path: Path) -> None:
    api, replicas = deployments(
        model=str(tmp_path), num_cpus="2", num_gpus="0.5", max_num_seqs="8", dtype="bfloat16"
    )
    assert (api.name, replicas.name) == ("Api", "LlamaReplica")
    assert replicas.init_args[0] == str(tmp_path)
    assert replicas.init_kwargs["device"] == "cuda"
    assert replicas.init_kwargs["threads"] == 2
    assert replicas.ray_actor_options["num_gpus"] == 0.5
    assert replicas.max_ongoing_requests == 16


def test_the_engines_options_reach_the_replicas(tmp_path: Path) -> None:
    _, replicas = deployments(
        model=str(tmp_path), quantization="int8", kv_cache_memory_bytes="1000000", prompt_lookup="true",
        tensor_parallel="2", num_gpus="2", batch_invariant="true",
    )  # fmt: skip
    assert replicas.init_kwargs["options"] == EngineOptions(
        max_num_seqs=16,
        quantization="int8",
        kv_cache_memory_bytes=1_000_000,
        prompt_lookup=True,
        tensor_parallel=2,
        batch_invariant=True,
    )


def test_a_relative_directory_is_one_of_the_callers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    _, replicas = deployments(model="model")
    assert replicas.init_args[0] == str(tmp_path / "model")


def test_replicas_are_held_to_their_limits() -> None:
    api, replicas = deployments(min_replicas="2", max_replicas="3", max_queued_requests="7")
    scaling = replicas._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas) == (2, 3)
    assert scaling.target_ongoing_requests <= replicas.max_ongoing_requests
    assert replicas.max_queued_requests == 7
    # What a replica turns away, the API must have taken in to answer it.
    assert api.max_ongoing_requests > 3 * replicas.max_ongoing_requests + 7
    assert replicas._deployment_config.graceful_shutdown_timeout_s == 600


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"modle": "x"}, "modle"),
        ({"max_num_seqs": "0"}, "max_num_seqs"),
        ({"min_replicas": 3, "max_replicas": 2}, "max_replicas is 2; it must be at least min_replicas, 3"),
        ({"dtype": "int4"}, "dtype"),
        ({"max_num_seqs": True}, "max_num_seqs is True; it must be a number"),
        ({"max_replicas": True}, "max_replicas is True; it must be a number"),
        ({"max_replicas": 2**64}, "max_replicas"),
        ({"num_cpus": math.inf}, "num_cpus"),
        ({"num_gpus": "nan"}, "num_gpus"),
        ({"graceful_shutdown_timeout_s": "1e400"}, "graceful_shutdown_timeout_s"),
        ({"max_body_bytes": 0}, "max_body_bytes"),
        ({"quantization": "int2"}, "quantization"),
        ({"tensor_parallel": 2, "num_gpus": 1}, "num_gpus is 1 and tensor_parallel 2; make them equal"),
        ({"draft_model": "models:/x/1", "prompt_lookup": True}, "prompt_lookup is on; choose one"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_deployed(args: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        deployments(**args)


def test_config_yaml_passes_serves_own_validation() -> None:
    config = ServeDeploySchema.model_validate(CONFIG)
    [application] = config.applications
    assert (config.http_options.host, config.http_options.port) == ("0.0.0.0", 8000)
    assert application.import_path == "serve_app.app:build"
    assert ServeArgs.model_validate(application.args).model == "models:/llama-ray@champion"
    known = ServeDeploySchema.model_json_schema()["properties"]
    assert set(CONFIG) <= set(known)  # Serve itself ignores a mistyped key
