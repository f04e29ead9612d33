from __future__ import annotations

from pathlib import Path
from typing import Any

import mlflow.pyfunc
import pandas as pd
import pytest
from mlflow.models import Model

from llama_ray.generation.engine import Engine
from llama_ray.generation.sampling.params import SamplingParams
from llama_ray.orchestration import pyfunc_model
from llama_ray.tracking.package import write_model
from tests.small_models import save_small_model

PROMPTS = ["The quick", "fox 🙂"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_model(tmp_path_factory.mktemp("checkpoint"), max_seq_len=128)


@pytest.fixture(scope="module")
def loaded(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("mlflow") / "model"
    write_model(
        path,
        Model(),
        checkpoint=checkpoint,
        python_model=Path(pyfunc_model.__file__),
    )
    return mlflow.pyfunc.load_model(str(path))


@pytest.mark.parametrize(
    "model_input",
    [PROMPTS, pd.DataFrame({"prompt": PROMPTS}), pd.DataFrame({"text": PROMPTS})],
    ids=["list", "column prompt", "only column"],
)
def test_predict_returns_what_the_engine_generates(loaded: Any, checkpoint: Path, model_input: Any) -> None:
    engine = Engine.from_pretrained(checkpoint)
    got = loaded.predict(
        model_input, params={"max_tokens": 12, "temperature": 0.7, "top_k": 30, "top_p": 0.8, "seed": 3}
    )
    params = SamplingParams(max_tokens=12, temperature=0.7, top_k=30, top_p=0.8, seed=3)
    assert got == [c.text for c in engine.generate(PROMPTS, params)]
    assert loaded.predict(model_input, params={"max_tokens": 5, "temperature": 0.0}) == [
        c.text
        for c in engine.generate(PROMPTS, SamplingParams(max_tokens=5, temperature=0, top_k=40, top_p=0.9))
    ]


def test_without_a_seed_answers_vary(loaded: Any) -> None:
    answers = {loaded.predict(PROMPTS[:1], params={"max_tokens": 20})[0] for _ in range(3)}
    assert len(answers) > 1


def test_what_cannot_be_served_says_why(loaded: Any) -> None:
    with pytest.raises(ValueError, match="exceed max_seq_len 128"):
        loaded.predict(PROMPTS, params={"max_tokens": 200})
    with pytest.raises(ValueError, match="top_p is 2"):
        loaded.predict(PROMPTS, params={"top_p": 2.0})
