"""A training run in a process of its own, so that a test can kill it: `python -m tests.e2e.driver JSON`."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace

import ray

from llama_ray.orchestration.launch import LaunchConfig
from llama_ray.orchestration.trainer import train_on_ray
from llama_ray.storage.attempts import Superseded
from llama_ray.training.errors import TrainingError
from llama_ray.training.hosts.interrupt import Stopped
from tests.e2e.conftest import CONFIG, MODEL

if __name__ == "__main__":
    settings = json.loads(sys.argv[1])
    os.environ["MLFLOW_TRACKING_URI"] = settings["tracking_uri"]
    ray.init(address=settings["address"], log_to_driver=False)
    try:
        outcome = train_on_ray(
            replace(MODEL, **settings["model"]),
            replace(CONFIG, **settings["config"]),
            LaunchConfig(**settings["launch"]),
            settings["data"],
        )
        print("finished", outcome.run_id, flush=True)
    except (Stopped, Superseded, TrainingError) as error:
        print(error, flush=True)
