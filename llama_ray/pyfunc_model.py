"""The code of a registered version: MLflow runs this file to make `mlflow.pyfunc.load_model` answer prompts."""

from __future__ import annotations

import threading
from typing import Any

import mlflow.models
from mlflow.pyfunc.model import PythonModel, PythonModelContext

from llama_ray.generation.engine import Engine
from llama_ray.generation.sampling import SamplingParams


class LlamaPyfunc(PythonModel):
    """Completes prompts with the model in the artifact `checkpoint`, a Hugging Face directory."""

    def load_context(self, context: PythonModelContext) -> None:
        """Read the weights; CUDA is used where there is one."""
        self._one_at_a_time = threading.Lock()  # MLflow's scoring server calls predict from several threads
        self._engine = Engine.from_pretrained(context.artifacts["checkpoint"], seed=None)

    # MLflow warns of every type of input that is not a list it can check; the signature says what comes in.
    def predict(  # type: ignore[no-untyped-def]
        self, context: PythonModelContext, model_input, params: dict[str, Any] | None = None
    ) -> list[str]:
        """Prompts -> completions, in order.

        `model_input` is a list of strings, or a data frame with a column `prompt` or one column only. `params` may
        hold max_tokens, temperature, top_k, top_p and seed. Raises ValueError for what cannot be served.
        """
        given = {k: v for k, v in (params or {}).items() if v is not None}
        with self._one_at_a_time:
            return [c.text for c in self._engine.generate(_prompts(model_input), SamplingParams(**given))]


def _prompts(model_input: Any) -> list[str]:
    if not hasattr(model_input, "columns"):
        return [str(p) for p in model_input]
    names = list(model_input.columns)
    if "prompt" not in names and len(names) != 1:
        raise ValueError(f"the input's columns are {names}; put the prompts into one called prompt")
    return [str(p) for p in model_input["prompt" if "prompt" in names else names[0]]]


mlflow.models.set_model(LlamaPyfunc())
