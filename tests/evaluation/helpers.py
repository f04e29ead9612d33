"""Scores as an evaluation gives them, and registered versions without weights that they can belong to."""

from __future__ import annotations

from mlflow import MlflowClient

from llama_ray.evaluation.results import Evaluation, Score
from llama_ray.tracking.runs import Run
from llama_ray.tracking.versions import Version, from_mlflow


def evaluation(model: str, bits: float, accuracy: float = 0.5, fingerprint: str = "a") -> Evaluation:
    scores = (
        Score("licence", "bits_per_byte", bits, 0.02, 3, False, fingerprint),
        Score("next_line", "acc", accuracy, 0.05, 100, True, fingerprint),
        Score("next_line", "acc_norm", accuracy, 0.05, 100, True, fingerprint),
    )
    return Evaluation(model, scores, 1.5, {"limit": None, "dtype": "float32"})


def add_version(uri: str, name: str, step: int = 0) -> Version:
    """Register a version of `name` with a logged model, as `register` does, but without a checkpoint."""
    client = MlflowClient(uri)
    if not client.search_registered_models(f"name='{name}'"):
        client.create_registered_model(name)
    run = Run.create(experiment="trained", name="training", params={}, tags={}, description="", uri=uri)
    logged = client.create_logged_model(run.experiment_id, name=name, source_run_id=run.run_id)
    created = client.create_model_version(
        name,
        source=f"s3://nowhere/models/{logged.model_id}/artifacts",
        run_id=run.run_id,
        tags={"step": str(step)},
        description="Trained on poems.",
        model_id=logged.model_id,
    )
    return from_mlflow(created)
