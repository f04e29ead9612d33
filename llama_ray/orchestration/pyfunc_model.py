"""The code of a registered version: `mlflow.pyfunc.load_model` runs this file to get a model that answers prompts."""

from __future__ import annotations

import threading
from typing import Any

import mlflow.models
from mlflow.pyfunc.model import PythonModel, PythonModelContext

from llama_ray.generation.engine import Engine
from llama_ray.generation.sampling.params import SamplingParams


class LlamaPyfunc(PythonModel):
    """Completes prompts with the model in the artifact `checkpoint`, a Hugging Face directory."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load the weights, onto CUDA if it is available."""
        # MLflow's scoring server calls predict from several threads.
        self._one_at_a_time = threading.Lock()
        self._engine = Engine.from_pretrained(context.artifacts["checkpoint"], seed=None)

    def predict(
        self, context: PythonModelContext, model_input: list[str], params: dict[str, Any] | None = None
    ) -> list[str]:
        """Return the completion of each prompt, in order.

        MLflow turns a data frame of one column into a list of strings. `params` may set max_tokens, temperature, top_k,
        top_p and seed. Raises ValueError for an invalid parameter and for a prompt that is too long.
        """
        given = {k: v for k, v in (params or {}).items() if v is not None}
        with self._one_at_a_time:
            return [c.text for c in self._engine.generate(model_input, SamplingParams(**given))]


mlflow.models.set_model(LlamaPyfunc())
