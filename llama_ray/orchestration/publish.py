"""Turn a finished checkpoint into a registered model version that can be served."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from llama_ray.model.adapter_files import base_of, is_adapter, stored_base_weights
from llama_ray.pretrained import export_adapter, load_pretrained, save_pretrained
from llama_ray.storage import run_directory
from llama_ray.tracking.registry import Policy, PromotionDecision, Version, promote, register
from llama_ray.tracking.runs import Run
from llama_ray.tracking.versions import version_with_tag
from llama_ray.training.config import Precision
from llama_ray.training.precision import DTYPES

_WEIGHTS_TAG = "weights"
"""A version's tag with a fingerprint of its weights."""


def publish(
    run: Run,
    checkpoint: Path,
    *,
    name: str,
    precision: Precision,
    policy: Policy,
    validation_loss: float,
    data_fingerprint: str,
    tags: Mapping[str, str],
    description: str,
    confirm: Callable[[], None] = lambda: None,
) -> tuple[Version, PromotionDecision]:
    """Register the model of a training checkpoint under `name`, and promote it to champion if `policy` allows it.

    The version has the weights in the precision of training (bf16 and fp16 take half the bytes of the checkpoint's
    fp32) and no optimizer state. That of an adapter has the adapter alone, in PEFT's layout, and names its
    base. If a version of `name` has these weights already, nothing is registered a second time. `confirm` is called
    right before the registry changes, and may raise.
    """
    weights = _fingerprint(checkpoint, precision)
    version = version_with_tag(name, _WEIGHTS_TAG, weights, uri=run.uri)
    if version is None:
        version = _register(
            run,
            checkpoint,
            name=name,
            precision=precision,
            validation_loss=validation_loss,
            data_fingerprint=data_fingerprint,
            tags={**tags, **_base_tags(checkpoint), _WEIGHTS_TAG: weights},
            description=description,
            confirm=confirm,
        )
    confirm()
    return version, promote(name, version.version, policy=policy, uri=run.uri)


def _register(
    run: Run,
    checkpoint: Path,
    *,
    name: str,
    precision: Precision,
    validation_loss: float,
    data_fingerprint: str,
    tags: Mapping[str, str],
    description: str,
    confirm: Callable[[], None],
) -> Version:
    with tempfile.TemporaryDirectory() as staging:
        exported = Path(staging, "model")
        if is_adapter(checkpoint):
            export_adapter(checkpoint, exported)
        else:
            save_pretrained(*load_pretrained(checkpoint, dtype=DTYPES[precision]), exported)
        return register(
            run,
            name=name,
            checkpoint=exported,
            python_model=Path(__file__).with_name("pyfunc_model.py"),
            validation_loss=validation_loss,
            data_fingerprint=data_fingerprint,
            tags=tags,
            description=description,
            confirm=confirm,
        )


def _base_tags(checkpoint: Path) -> dict[str, str]:
    """Return the tags that name the model which an adapter belongs to, and its weights; {} for a whole model."""
    if not is_adapter(checkpoint):
        return {}
    return {"base": base_of(checkpoint), "base_weights": str(stored_base_weights(checkpoint))}


def _fingerprint(checkpoint: Path, precision: Precision) -> str:
    """Return a digest of the weights that a version made from `checkpoint` has."""
    files = (run_directory.read_marker(str(checkpoint)) or {"files": {}})["files"]
    digests = {
        name: record["sha256"] for name, record in files.items() if name.startswith(("model-rank", "adapter"))
    }
    return hashlib.sha256(json.dumps([precision, digests], sort_keys=True).encode()).hexdigest()
