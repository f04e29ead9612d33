"""The variables that Ray must start with, wherever it is started."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from serve_app import environment
from serve_app.errors import ErrorResponse

ROOT = Path(__file__).parents[2]


def test_a_shell_that_reads_the_file_lacks_nothing() -> None:
    shell = subprocess.run(
        ["sh", "-c", f". {environment.FILE} && env -0"], env={}, check=True, capture_output=True, text=True
    )
    environ = dict(line.split("=", 1) for line in shell.stdout.split("\0") if line)
    assert environ.items() >= environment.variables().items()
    assert environment.advice(environ) is None


def test_what_is_missing_is_named_with_the_file_to_source() -> None:
    names = list(environment.variables())
    advice = environment.advice(dict.fromkeys(names[1:], "0"))
    assert advice is not None
    assert f"without {names[0]};" in advice
    assert f"`. {environment.FILE}`" in advice
    assert "\n" not in advice


def test_every_variable_is_one_that_ray_reads() -> None:
    import ray
    from ray.serve._private import constants

    serve = Path(constants.__file__).read_text(encoding="utf-8")
    raylet = (Path(ray.__file__).parent / "core/src/ray/raylet/raylet").read_bytes()
    apart = environment.haproxy_apart(Path("/tmp/x"), 1, 2)
    unknown = [
        name for name in environment.variables() | apart if name not in serve and name.encode() not in raylet
    ]
    assert unknown == []


@pytest.mark.parametrize("commands", ["head_start_ray_commands", "worker_start_ray_commands"])
def test_cluster_yaml_starts_ray_with_them(commands: str) -> None:
    config = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    [start] = [command for command in config[commands] if "ray start" in command]
    assert start.index(". ~/llama_ray/serve_app/serve.env") < start.index("ray start")


def test_haproxys_errors_are_error_objects() -> None:
    lines = environment.variables()["RAY_SERVE_HAPROXY_BALANCE_ALGORITHM"].splitlines()
    bodies = [shlex.split(line)[6] for line in lines if "http-error" in line]
    errors = [ErrorResponse.model_validate_json(body).error for body in bodies]
    assert [(error.type, error.code) for error in errors] == [("server_error", "unavailable")] * 2
