"""The commands of docs/tuning.md for preferences, with a tiny model: it learns to prefer the chosen answers."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from mlflow import MlflowClient

from llama_ray.batch_inference.config import BatchError
from llama_ray.batch_inference.references import ensure_references
from llama_ray.data.dataset.files import Place
from llama_ray.data.dataset.locations import open_files
from llama_ray.data.dataset.references import read_references
from llama_ray.pretrained import load_pretrained, save_pretrained
from tests.data.chat_templates import CHATML, tokenizer_with
from tests.e2e.helpers import curve
from tests.small_models import random_model, small_config

ROOT = Path(__file__).parents[2]
GUIDE = ROOT / "docs" / "tuning.md"


@dataclass(frozen=True)
class Preferred:
    """A folder in which the commands were run, with the MLflow store."""

    directory: Path
    uri: str
    output: str

    @property
    def data(self) -> str:
        return str(self.directory / "data" / "pairs")

    @property
    def run_id(self) -> str:
        return str(MlflowClient(self.uri).get_model_version("assistant-dpo", "1").run_id)


@pytest.fixture(scope="module")
def preferred(ray_cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Preferred:
    directory = tmp_path_factory.mktemp("preferences")
    tokenizer = tokenizer_with(directory, CHATML)
    shape = small_config(tokenizer.vocab_size, max_seq_len=512)
    for seed in (1, 2):
        save_pretrained(random_model(shape, seed), tokenizer, directory / f"assistant-{seed}")
    pairs = [
        {"prompt": f"Is it {n}?", "chosen": "fox " * (1 + n % 3), "rejected": "no " * (1 + n % 2)}
        for n in range(60)
    ]
    (directory / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    uri = f"sqlite:///{directory}/mlflow.db"
    environment = os.environ | {
        "RAY_ADDRESS": ray_cluster,
        "MLFLOW_TRACKING_URI": uri,
        "PYTHONPATH": str(ROOT),
    }
    output = ""
    [block] = re.findall(r"```sh\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines():
        _, job, *flags = shlex.split(line.replace("models:/assistant/1", "assistant-1"))
        command = [sys.executable, str(ROOT / job), *flags]
        done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        output += done.stdout
    return Preferred(directory, uri, output)


def test_the_reference_has_the_log_probabilities_of_the_model(preferred: Preferred) -> None:
    files = open_files(preferred.data)
    references = read_references(files)
    assert references is not None
    model, _ = load_pretrained(preferred.directory / "assistant-1")
    starts = [*files.starts("validation", 0).tolist(), files.info.splits["validation"][0].tokens]
    expected = []
    for start, stop in pairwise(starts):
        [span] = files.read("validation", [Place(0, start, stop)])
        ids = torch.from_numpy(span.tokens.astype(np.int64))
        with torch.no_grad():
            log_p = model(ids[None])[0].log_softmax(-1)
        of_next = log_p[:-1].gather(1, ids[1:, None]).squeeze(1)
        assert span.learned is not None
        expected.append(of_next[torch.from_numpy(span.learned[1:].copy())].sum().item())
    found = references.of("validation", 0)
    assert len(found) == len(expected) >= 2
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_the_model_learns_to_prefer(preferred: Preferred) -> None:
    client = MlflowClient(preferred.uri)
    losses = curve(client, preferred.run_id, "loss/train")
    # Before the first update the model is the reference.
    assert losses[1] == pytest.approx(math.log(2), abs=0.02)
    assert losses[20] < 0.3
    margins = curve(client, preferred.run_id, "rewards/margins")
    chosen, rejected = (curve(client, preferred.run_id, f"rewards/{name}") for name in ("chosen", "rejected"))
    assert margins[20] > margins[1] + 1
    assert margins[20] == pytest.approx(chosen[20] - rejected[20], abs=1e-4)
    assert curve(client, preferred.run_id, "rewards/accuracies")[20] == 1
    assert list(curve(client, preferred.run_id, "validation/rewards/accuracies").values())[-1] == 1
    assert "accuracy 100.0%" in preferred.output
    assert "validation/perplexity" not in client.get_run(preferred.run_id).data.metrics


def test_pairs_with_another_reference_are_refused_and_those_with_this_one_taken(preferred: Preferred) -> None:
    file = Path(preferred.data, "reference.safetensors")
    before = file.stat().st_mtime_ns
    ensure_references([preferred.data], str(preferred.directory / "assistant-1"), print)
    assert file.stat().st_mtime_ns == before
    assert not list(Path(preferred.data).glob("reference-work*"))
    with pytest.raises(
        BatchError, match=r"another reference, .*assistant-1; init_from must be that"
    ) as refused:
        ensure_references([preferred.data], str(preferred.directory / "assistant-2"), print)
    assert "\n" not in str(refused.value)
