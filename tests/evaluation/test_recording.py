from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from mlflow import MlflowClient

from llama_ray.evaluation.comparison import compare
from llama_ray.evaluation.recording import record, record_comparison, recorded
from llama_ray.tracking.measurements import read_artifact
from llama_ray.tracking.versions import resolve_version
from tests.evaluation.helpers import add_version, evaluation


@pytest.mark.parametrize("where", ["store", "server"])
def test_an_evaluation_is_a_run_with_its_table_and_belongs_to_the_version(
    where: str, request: pytest.FixtureRequest
) -> None:
    uri: str = request.getfixturevalue(where)
    version = add_version(uri, "measured", step=400)
    found = evaluation(version.uri, bits=1.25)
    run = record(found, tables={"samples": {"prompt": ["a", "b"], "answer": ["c", "d"]}}, uri=uri)

    client = MlflowClient(uri)
    logged = client.get_run(run.run_id)
    assert logged.info.status == "FINISHED"
    assert logged.info.run_name == "evaluation of measured/1"
    assert client.get_experiment(logged.info.experiment_id).name == "trained"
    assert logged.data.metrics["scores/licence/bits_per_byte"] == 1.25
    assert logged.data.metrics["scores/next_line/acc_stderr"] == 0.05
    assert logged.data.params["dtype"] == "float32"
    assert {data.dataset.name for data in logged.inputs.dataset_inputs} == {"licence", "next_line"}
    # What the UI looks for to show a table.
    tables = json.loads(logged.data.tags["mlflow.loggedArtifacts"])
    assert {table["path"] for table in tables} == {"scores.json", "samples.json"}
    rows = json.loads(read_artifact(run.run_id, "scores.json", uri) or "")
    assert rows["columns"][:3] == ["task", "metric", "score"]
    assert rows["data"][0][:3] == ["licence", "bits_per_byte", 1.25]

    [model] = [one.model_id for one in logged.inputs.model_inputs]
    of_model = {metric.key: metric for metric in client.get_logged_model(model).metrics}
    assert of_model["scores/licence/bits_per_byte"].value == 1.25
    assert of_model["scores/licence/bits_per_byte"].step == 400
    assert of_model["scores/licence/bits_per_byte"].dataset_name == "licence"
    tags = resolve_version(version.uri, uri).tags
    assert tags["evaluation.bits_per_byte"] == tags["evaluation.licence.bits_per_byte"] == "1.25"
    assert tags["evaluation.fingerprint"] == found.settings_fingerprint
    assert tags["evaluation.run_id"] == run.run_id


def test_another_evaluation_replaces_the_first_one_of_a_version(store: str) -> None:
    version = add_version(store, "again")
    record(evaluation(version.uri, 1.5), uri=store)
    second = evaluation(version.uri, 1.25)
    second = type(second)(second.model, second.scores[:1], 1.0)
    record(second, uri=store)
    after = resolve_version(version.uri, store)
    assert after.tags["evaluation.bits_per_byte"] == "1.25"
    assert "evaluation.next_line.acc" not in after.tags
    assert after.tags["step"] == "0"
    assert after.description.startswith("Trained on poems.\n\n## Evaluation\n\nScores of `models:/again/1`.")
    assert "| 1.2500 |" in after.description
    assert "| 1.5000 |" not in after.description
    assert recorded(after, store) == second
    # What people have written around it stays.
    description = f"### Evaluation by hand\n\n{after.description}\n\n## Notes\n\nServed since May."
    MlflowClient(store).update_model_version("again", "1", description)
    record(evaluation(version.uri, 1.75), uri=store)
    written = resolve_version(version.uri, store).description
    assert written.startswith("### Evaluation by hand\n\nTrained on poems.\n\n## Evaluation\n\nScores of")
    assert written.endswith("\n\n## Notes\n\nServed since May.")
    assert written.count("| 1.7500 |") == 1
    assert "| 1.2500 |" not in written


def test_an_evaluation_is_read_back_while_its_run_is_there(store: str) -> None:
    version = add_version(store, "kept")
    assert recorded(version, store) is None
    found = evaluation(version.uri, 1.5)
    run = record(found, uri=store)
    version = resolve_version(version.uri, store)
    assert recorded(version, store) == found
    MlflowClient(store).delete_run(run.run_id)
    assert recorded(version, store) is None


def test_no_secret_of_a_uri_is_stored(store: str) -> None:
    model = "s3://KEY:HUSH@bucket"
    one = replace(evaluation(model, 2.0), settings={"text": "book=s3://KEY:HUSH@bucket/book.txt"})
    run = record(one, uri=store)
    record_comparison(run, compare([one, evaluation(f"{model}/other", 1.0)]))
    stored = MlflowClient(store).get_run(run.run_id)
    folder = Path(urlsplit(stored.info.artifact_uri).path)
    texts = [str(stored.to_dictionary()), *(file.read_text() for file in folder.glob("*.[jm]*"))]
    assert len(texts) == 5
    assert not [text for text in texts if "HUSH" in text]


def test_a_directory_is_recorded_in_the_experiment_that_is_asked_for(store: str) -> None:
    run = record(evaluation("/models/run/step_00000100", 2.0), experiment="ours", uri=store)
    logged = MlflowClient(store).get_run(run.run_id)
    assert logged.info.run_name == "evaluation of run/step_00000100"
    assert MlflowClient(store).get_experiment(logged.info.experiment_id).name == "ours"
    assert "1.2500" not in logged.data.tags["mlflow.note.content"]
    assert "2.0000" in logged.data.tags["mlflow.note.content"]
