"""The arguments of the application, and the file that deploys it."""

from __future__ import annotations

import inspect
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError
from ray.serve.schema import ServeDeploySchema

import serve_app.args
from llama_ray.generation.options import EngineOptions
from serve_app.args import ServeArgs
from serve_app.registry.messages import ModelSpec

CONFIG = yaml.safe_load(Path(inspect.getfile(serve_app.args)).with_name("config.yaml").read_text())


def test_strings_from_the_command_line_are_enough(tmp_path: Path) -> None:
    args = ServeArgs.model_validate(
        {"model": str(tmp_path), "num_cpus": "2", "num_gpus": "0.5", "max_num_seqs": "8", "dtype": "bfloat16"}
    )
    assert (args.model, args.num_cpus, args.num_gpus, args.dtype) == (str(tmp_path), 2, 0.5, "bfloat16")
    assert args.engine == EngineOptions(max_num_seqs=8)


def test_the_engines_options_are_given_flat() -> None:
    args = ServeArgs.model_validate(
        {
            "quantization": "int8",
            "kv_cache_memory_bytes": "1000000",
            "prompt_lookup": "true",
            "tensor_parallel": "2",
            "num_gpus": "2",
            "batch_invariant": "true",
        }
    )
    assert args.engine == EngineOptions(
        max_num_seqs=16,
        quantization="int8",
        kv_cache_memory_bytes=1_000_000,
        prompt_lookup=True,
        tensor_parallel=2,
        batch_invariant=True,
    )


@pytest.mark.parametrize(
    ("engine", "expected"),
    [
        ({"quantization": "int8"}, EngineOptions(max_num_seqs=16, quantization="int8")),
        (EngineOptions(max_num_seqs=3), EngineOptions(max_num_seqs=3)),
    ],
)
def test_the_engines_options_may_be_given_as_one(engine: object, expected: EngineOptions) -> None:
    assert ServeArgs.model_validate({"engine": engine}).engine == expected


def test_a_relative_directory_is_one_of_the_callers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    assert ServeArgs(model="model").spec == ModelSpec("model", str(tmp_path / "model"))


def test_several_models_have_arguments_of_their_own() -> None:
    args = ServeArgs.model_validate(
        {
            "models": [
                {"model": "models:/big@champion", "num_gpus": 1, "max_num_seqs": 64, "canary": "challenger"},
                {"model": "models:/small/7", "max_replicas": 2, "keep_previous_s": 60},
            ],
            "registry_poll_s": "2",
        }
    )
    assert [model.spec for model in args.served] == [
        ModelSpec("big", "models:/big@champion", canary_alias="challenger"),
        ModelSpec("small", "models:/small/7", keep_previous_s=60),
    ]
    assert [model.engine.max_num_seqs for model in args.served] == [64, 16]
    assert [(model.num_gpus, model.max_replicas) for model in args.served] == [(1, 4), (0, 2)]
    assert args.registry_poll_s == 2


def test_without_a_list_there_is_one_model() -> None:
    args = ServeArgs.model_validate({"canary": "next", "canary_share": "0.25"})
    assert [model.spec for model in args.served] == [
        ModelSpec("llama-ray", "models:/llama-ray@champion", canary_alias="next", canary_share=0.25)
    ]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"modle": "x"}, "modle"),
        ({"max_num_seqs": "0"}, "max_num_seqs"),
        ({"min_replicas": 3, "max_replicas": 2}, "max_replicas is 2; it must be at least min_replicas, 3"),
        ({"min_api_replicas": 5}, "max_api_replicas is 4; it must be at least min_api_replicas, 5"),
        ({"dtype": "int4"}, "dtype"),
        ({"max_num_seqs": True}, "max_num_seqs is True; it must be a number"),
        ({"max_replicas": True}, "max_replicas is True; it must be a number"),
        ({"max_replicas": 2**64}, "max_replicas"),
        ({"num_cpus": math.inf}, "num_cpus"),
        ({"num_gpus": "nan"}, "num_gpus"),
        ({"graceful_shutdown_timeout_s": "1e400"}, "graceful_shutdown_timeout_s"),
        ({"max_body_bytes": 0}, "max_body_bytes"),
        ({"registry_poll_s": 0}, "registry_poll_s"),
        ({"resume_timeout_s": -1}, "resume_timeout_s"),
        ({"stuck_after_s": 0.5}, "stuck_after_s"),
        ({"gate_timeout_s": 0}, "gate_timeout_s"),
        ({"keep_previous_s": -1}, "keep_previous_s"),
        ({"max_surge_percent": 101}, "max_surge_percent"),
        ({"max_queued_requests": 0}, "max_queued_requests is 0; it must be at least 1, or -1 for no limit"),
        ({"quantization": "int2"}, "quantization"),
        ({"engine": {"max_num_seqs": 4}, "quantization": "int8"}, "engine is given beside quantization"),
        ({"tensor_parallel": 2, "num_gpus": 1}, "num_gpus is 1 and tensor_parallel 2; make them equal"),
        ({"draft_model": "models:/x/1", "prompt_lookup": True}, "prompt_lookup is on; choose one"),
        ({"model": "models:/x"}, "'models:/x' is not a model reference"),
        ({"model": "/"}, "model is '/'; it must be the directory of one model"),
        ({"canary_share": 1.1}, "canary_share"),
        ({"canary_share": "nan"}, "canary_share"),
        ({"canary": "champion"}, "canary is 'champion', as the alias in model; choose another alias"),
        ({"canary": "a b"}, "canary is 'a b'; it must be an alias"),
        ({"model": "models:/x/7", "canary": "next"}, "a canary needs a model that follows an alias"),
        ({"model": "directory", "canary": "next"}, "a canary needs a model that follows an alias"),
        ({"models": []}, "models"),
        ({"models": "models:/x/7"}, "models"),
        ({"models": [{"modle": "x"}]}, "modle"),
        ({"models": [{"tracking_uri": "x"}]}, "tracking_uri"),
        ({"models": [{"min_replicas": True}]}, "min_replicas is True; it must be a number"),
        ({"models": [{"model": "models:/x/1"}, {"model": "models:/x/2"}]}, "models has 2 models named 'x'"),
        ({"models": [{"model": "models:/x/1"}], "model": "y"}, "model is given beside models"),
        ({"models": [{"model": "models:/x/1"}], "max_num_seqs": 4}, "max_num_seqs is given beside models"),
    ],
)
def test_bad_arguments_are_refused_with_the_way_out(args: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ServeArgs.model_validate(args)


def test_a_tracking_uris_password_is_not_shown() -> None:
    args = ServeArgs(tracking_uri="http://user:hunter2@mlflow:5000")
    assert "hunter2" not in repr(args)


def test_config_yaml_passes_serves_own_validation() -> None:
    config = ServeDeploySchema.model_validate(CONFIG)
    [application] = config.applications
    assert (config.http_options.host, config.http_options.port) == ("127.0.0.1", 8000)
    assert application.import_path == "serve_app.app:build"
    assert ServeArgs.model_validate(application.args).model == "models:/llama-ray@champion"
    known = ServeDeploySchema.model_json_schema()["properties"]
    assert set(CONFIG) <= set(known)  # Serve itself ignores a mistyped key
