"""Turn a finished checkpoint into a registered model version that can be served."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

from llama_ray.pretrained import load_pretrained, save_pretrained
from llama_ray.tracking.registry import Policy, PromotionDecision, Version, promote, register
from llama_ray.tracking.runs import Run
from llama_ray.training.config import Precision
from llama_ray.training.precision import DTYPES


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
) -> tuple[Version, PromotionDecision]:
    """Register the model of a training checkpoint under `name`, and promote it to champion if `policy` allows it.

    The version has the weights in the precision of training (bf16 and fp16 take half the bytes of the checkpoint's
    fp32) and no optimizer state.
    """
    model, tokenizer = load_pretrained(checkpoint, dtype=DTYPES[precision])
    with tempfile.TemporaryDirectory() as staging:
        exported = Path(staging, "model")
        save_pretrained(model, tokenizer, exported)
        version = register(
            run,
            name=name,
            checkpoint=exported,
            python_model=Path(__file__).with_name("pyfunc_model.py"),
            validation_loss=validation_loss,
            data_fingerprint=data_fingerprint,
            tags=tags,
            description=description,
        )
    decision = promote(name, version.version, policy=policy, uri=run.uri)
    return version, decision
