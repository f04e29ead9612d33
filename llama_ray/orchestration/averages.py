"""Make an average of models a version of the registry."""

from __future__ import annotations

import tempfile
from pathlib import Path

from llama_ray.exporting.averages import AverageConfig, Log, write_average
from llama_ray.orchestration.registering import register_directory
from llama_ray.orchestration.report import describe_average
from llama_ray.tracking.registry import Version, check_name


def register_average(config: AverageConfig, name: str, experiment: str, log: Log) -> Version:
    """Register the average of the models of `config` as a version of `name`, which names its parents in a tag.

    Raises ValueError as `write_average` does, and TrackingError for what MLflow refuses.
    """
    check_name(name)
    with tempfile.TemporaryDirectory() as staging:
        directory = Path(staging, "model")
        average = write_average(config, directory, log)
        return register_directory(
            directory,
            name=name,
            run_name=f"average-{name}",
            experiment=experiment,
            params={"parents": average.parents, "shares": average.shares, "model": average.model.to_dict()},
            tags={"parents": ", ".join(average.parents)},
            description=describe_average(average.model, average.parents, average.shares),
        )
