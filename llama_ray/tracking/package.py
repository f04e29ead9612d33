"""A checkpoint as an MLflow model: what `mlflow.pyfunc.load_model` needs around a Hugging Face directory."""

from __future__ import annotations

import importlib.metadata
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path

import mlflow.pyfunc
from mlflow.models import Model, ModelSignature
from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

CHECKPOINT = "checkpoint"
CHECKPOINT_PATH = f"artifacts/{CHECKPOINT}"  # of the Hugging Face directory inside the MLflow model

# One unnamed string column, so that a list of strings and a data frame with one column are both accepted.
SIGNATURE = ModelSignature(
    inputs=Schema([ColSpec("string")]),
    outputs=Schema([ColSpec("string")]),
    params=ParamSchema(
        [
            ParamSpec("max_tokens", "long", 100),
            ParamSpec("temperature", "double", 0.8),
            ParamSpec("top_k", "long", 40),
            ParamSpec("top_p", "double", 0.9),
            ParamSpec("seed", "long", None),
        ]
    ),
)

_REQUIRED = ("llama-ray", "torch", "numpy", "tokenizers", "safetensors", "mlflow")


def check_checkpoint(directory: Path) -> None:
    """Raise ValueError unless `directory` looks like a Hugging Face model with safetensors and a tokenizer."""
    if not directory.is_dir():
        raise ValueError(f"{directory} is no directory; give the Hugging Face directory to register")
    missing = [name for name in ("config.json", "tokenizer.json") if not (directory / name).is_file()]
    if not any(directory.glob("*.safetensors")):
        missing.append("*.safetensors")
    if missing:
        raise ValueError(
            f"{directory} holds no {' and no '.join(missing)}; register what save_pretrained wrote"
        )


def requirements() -> list[str]:
    """What the model imports, pinned to the versions that wrote it (without local suffixes such as +cpu)."""
    return [f"{name}=={importlib.metadata.version(name).partition('+')[0]}" for name in _REQUIRED]


def write_model(
    path: Path, model: Model, *, checkpoint: Path, python_model: Path, pip_requirements: Sequence[str]
) -> None:
    """Write `model` into the new directory `path`: MLmodel, environment, code, and links to the checkpoint's files.

    Handed the checkpoint as an artifact, MLflow would copy it into its staging directory first. Links, which
    every artifact store follows, need no second copy of the weights on this disk.
    """
    with warnings.catch_warnings():
        # An example would make MLflow load the model and generate with it, for a signature that we know.
        warnings.filterwarnings("ignore", message=".*input example was not provided")
        mlflow.pyfunc.save_model(
            path,
            mlflow_model=model,
            python_model=python_model,
            pip_requirements=list(pip_requirements),
        )
    for cache in path.rglob("__pycache__"):
        shutil.rmtree(cache)
    for source in sorted(file for file in checkpoint.rglob("*") if file.is_file()):
        target = path / CHECKPOINT_PATH / source.relative_to(checkpoint)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(source.resolve())
    model.signature = (
        SIGNATURE  # save_model reads one off the type hints of python_model, which has no parameters
    )
    model.flavors["python_function"]["artifacts"] = {
        CHECKPOINT: {"path": CHECKPOINT_PATH, "uri": checkpoint.resolve().as_uri()}
    }
    model.model_size_bytes = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    model.save(str(path / "MLmodel"))
