"""Make a directory with a model, which no training run here has made, a version of the registry."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from llama_ray.model.weights_hash import weights_hash
from llama_ray.pretrained import open_pretrained
from llama_ray.tracking.endings import ended
from llama_ray.tracking.registry import Version, register
from llama_ray.tracking.runs import Run
from llama_ray.tracking.tags import standard_tags
from llama_ray.tracking.versions import version_with_tag

WEIGHTS_HASH = "weights_hash"
"""A version's tag with the digest of its weights, see `llama_ray.model.weights_hash`."""


def register_directory(
    directory: Path,
    *,
    name: str,
    run_name: str,
    experiment: str,
    params: Mapping[str, Any],
    tags: Mapping[str, str],
    description: str,
) -> Version:
    """Register the Hugging Face `directory` as a version of `name`, with an MLflow run of its own.

    `tags` are of the version and of the run. A version that has these weights already is returned, and nothing is
    registered a second time. Raises TrackingError for what MLflow refuses.
    """
    with ExitStack() as stack:
        weights = weights_hash(open_pretrained(directory, stack))
    if existing := version_with_tag(name, WEIGHTS_HASH, weights):
        return existing
    run = Run.create(
        experiment=experiment,
        name=run_name,
        params=dict(params),
        tags=standard_tags(world_size=1, device="cpu") | dict(tags),
        description=description,
    )
    with ended(run):
        return register(
            run,
            name=name,
            checkpoint=directory,
            python_model=Path(__file__).with_name("pyfunc_model.py"),
            # Nobody has measured it.
            validation_loss=float("nan"),
            data_fingerprint="",
            tags={**tags, WEIGHTS_HASH: weights},
            description=description,
        )
