"""A Hugging Face directory, or an adapter, as an MLflow model that `mlflow.pyfunc.load_model` opens."""

from __future__ import annotations

import importlib.metadata
import shutil
import warnings
from pathlib import Path

import mlflow.pyfunc
from mlflow.models import Model, ModelSignature
from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

from llama_ray.tracking.manifest import describe

CHECKPOINT = "checkpoint"
CHECKPOINT_PATH = f"artifacts/{CHECKPOINT}"
"""The Hugging Face directory inside an MLflow model."""
FILES_KEY = "checkpoint_files"
"""Where an MLflow model's metadata has the sizes and checksums of that directory's files."""

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
    """Raise ValueError unless `directory` holds a model, or an adapter, with safetensors and a tokenizer."""
    if not directory.is_dir():
        raise ValueError(f"{directory} is not a directory; give a directory that save_pretrained wrote")
    config = "adapter_config.json" if (directory / "adapter_config.json").is_file() else "config.json"
    missing = [name for name in (config, "tokenizer.json") if not (directory / name).is_file()]
    if not any(directory.glob("*.safetensors")):
        missing.append("*.safetensors")
    if missing:
        raise ValueError(
            f"{directory} has no {' and no '.join(missing)}; give a directory that save_pretrained wrote"
        )


def _requirements() -> list[str]:
    """Return what the model imports, pinned to the installed versions without local suffixes such as +cpu."""
    return [f"{name}=={importlib.metadata.version(name).partition('+')[0]}" for name in _REQUIRED]


def write_model(path: Path, model: Model, *, checkpoint: Path, python_model: Path) -> None:
    """Write `model` into the new directory `path`: MLmodel, environment, code, and links to the checkpoint's files.

    MLflow would copy a checkpoint that it gets as an artifact into its staging directory. Links, which every artifact
    store follows, avoid this second copy of the weights.
    """
    with warnings.catch_warnings():
        # With an example, MLflow would load the model and generate text to infer the signature, which is known.
        warnings.filterwarnings("ignore", message=".*input example was not provided")
        mlflow.pyfunc.save_model(
            path,
            mlflow_model=model,
            python_model=python_model,
            pip_requirements=_requirements(),
        )
    for cache in path.rglob("__pycache__"):
        shutil.rmtree(cache)
    for source in sorted(file for file in checkpoint.rglob("*") if file.is_file()):
        target = path / CHECKPOINT_PATH / source.relative_to(checkpoint)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(source.resolve())
    model.metadata = {FILES_KEY: describe(checkpoint)}
    # save_model has inferred a signature without parameters from the type hints of python_model.
    model.signature = SIGNATURE
    model.flavors["python_function"]["artifacts"] = {
        CHECKPOINT: {"path": CHECKPOINT_PATH, "uri": checkpoint.resolve().as_uri()}
    }
    model.model_size_bytes = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    model.save(str(path / "MLmodel"))
