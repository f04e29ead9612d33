"""Runs our application on a Ray cluster, as `serve run` does: `python -m benchmarks.serving.application`."""

from __future__ import annotations

import json
import sys
from typing import Any

import ray
from ray import serve

from serve_app.app import ServeArgs, build


def main(task: dict[str, Any]) -> None:
    """Deploy the application, and stay until standard input is closed."""
    ray.init(task["address"], log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": task["port"]})
    serve.run(build(ServeArgs(**task["args"])), name="llama-ray", route_prefix="/")
    sys.stdin.read()


if __name__ == "__main__":
    main(json.loads(sys.stdin.readline()))
