"""The way through docs/tuning.md, with its own commands: a real model learns a few conversations and answers."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import openai
import pytest
from fastapi.testclient import TestClient
from mlflow import MlflowClient

from llama_ray.data.dataset.info import read_info
from llama_ray.model.adapter_files import is_adapter
from llama_ray.model.end_of_text import stored_eos_ids
from serve_app.api.api import create_api
from serve_app.registry.messages import ModelVersion
from serve_app.replica.loader import EngineLoader
from tests.e2e.helpers import curve
from tests.serve_app.helpers import FixedFollower, LocalReplicas, local_client, table_of

ROOT = Path(__file__).parents[2]
GUIDE = ROOT / "docs" / "tuning.md"
THINGS = re.findall(
    r"\w+",
    "rope saw kite boat sled tent bell rake hose vase mask coin harp flute stove mirror ladder basket bucket hammer "
    "blanket candle carpet guitar helmet kettle pillow ribbon shovel statue ticket trophy violin wagon whistle anchor",
)


def commands() -> Iterator[list[str]]:
    """Yield the commands of the guide, with the jobs where they are."""
    for block in re.findall(r"```bash\n(.*?)```", GUIDE.read_text(), re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            python, job, *flags = shlex.split(line)
            assert python == "python"
            yield [sys.executable, str(ROOT / job), *flags]


NAMES = [command[-1] for command in commands() if "--register_as" in command]
"""The models that the commands register, which their last flag names."""


@dataclass(frozen=True)
class Tuned:
    """A folder in which the commands of the guide were run."""

    directory: Path
    uri: str
    output: str

    def version(self, name: str) -> Path:
        """Return the files of the first version of a model, as a replica fetches them."""
        ref = f"models:/{name}/1"
        return EngineLoader(tracking_uri=self.uri).fetch(ModelVersion(name, ref, ref)).model


@pytest.fixture(scope="module")
def tuned(smollm2: Path, ray_cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Tuned:
    directory = tmp_path_factory.mktemp("tuning")
    (directory / smollm2.name).symlink_to(smollm2)
    [*records] = re.search(r"```json\n(.*?)```", GUIDE.read_text(), re.DOTALL)[1].splitlines()
    for thing in THINGS:
        question, answer = f"Where is the {thing}?", f"We keep the {thing} in the blue shed."
        records.append(json.dumps({"prompt": question, "completion": answer}))
    (directory / "chats.jsonl").write_text("\n".join(records))
    uri = f"sqlite:///{directory}/mlflow.db"
    environment = os.environ | {
        "RAY_ADDRESS": ray_cluster,
        "MLFLOW_TRACKING_URI": uri,
        "PYTHONPATH": str(ROOT),
    }
    output = ""
    for command in commands():
        done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        output += done.stdout
    return Tuned(directory, uri, output)


def answer(directory: Path, question: str) -> tuple[str, str]:
    """Return the most likely answer of a served model, and why it ended."""
    replicas = LocalReplicas(directory, max_seq_len=256, kv_cache_memory_bytes=2**26)
    api = create_api(lambda: local_client(FixedFollower(table_of(directory)), replicas))
    with TestClient(api) as http:
        client = openai.OpenAI(
            base_url="http://testserver/v1", api_key="none", max_retries=0, http_client=http
        )
        [card] = client.models.list().data
        found = client.chat.completions.create(
            model=card.id, messages=[{"role": "user", "content": question}], temperature=0, max_tokens=20
        )
    replicas.stop()
    return found.choices[0].message.content or "", found.choices[0].finish_reason


def test_conversations_become_rows(tuned: Tuned) -> None:
    info = read_info(tuned.directory / "data" / "chats")
    assert (info.task, info.row_tokens, info.end_of_turn_ids) == ("sft", 128, (2,))
    assert info.sources[0].texts == len(THINGS) + 4 == sum(map(info.documents, info.splits))
    assert "⟧We keep the " in tuned.output


@pytest.mark.parametrize("name", NAMES)
def test_a_tuned_model_answers_what_it_was_not_asked_in_training(tuned: Tuned, name: str) -> None:
    client = MlflowClient(tuned.uri)
    run_id = client.get_model_version(name, "1").run_id
    losses = list(curve(client, run_id, "loss/train").values())
    assert losses[-1] < losses[0] / 10
    [validation] = curve(client, run_id, "loss/validation").values()
    assert validation < losses[0] / 10
    shown = Path(client.download_artifacts(run_id, "examples.txt", str(tuned.directory))).read_text()
    assert "<|im_start|>assistant\n⟧We keep the " in shown
    directory = tuned.version(name)
    if not is_adapter(directory):
        assert stored_eos_ids(directory, 49152) == [2]
    assert answer(directory, "Where is the spoon?") == ("We keep the spoon in the blue shed.", "stop")
