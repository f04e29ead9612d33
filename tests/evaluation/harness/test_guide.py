"""Every command and snippet in docs/evaluation.md does what it says; beside the other tests that import lm_eval."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient

from llama_ray.evaluation.results import Evaluation
from llama_ray.pretrained import save_pretrained
from serve_app.api.api import create_api
from tests.jobs.helpers import run_here
from tests.serve_app.api.clients.listening import listening
from tests.serve_app.helpers import FixedFollower, LocalReplicas, local_client, table_of
from tests.small_models import random_model, small_config, small_tokenizer
from tests.token_data import write_dataset

GUIDE = Path(__file__).parents[3] / "docs" / "evaluation.md"
BOOK = "Shall I compare thee to a summer's day?\n" * 20
pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    tokenizer = small_tokenizer((BOOK,), 300).for_documents()
    found = []
    for seed in (1, 2):
        model = random_model(small_config(tokenizer.vocab_size, max_seq_len=512), seed)
        found.append(tmp_path / f"version-{seed}" / "demo")
        save_pretrained(model, tokenizer, found[-1])
    return found


@pytest.fixture
def endpoint(models: list[Path]) -> Iterator[str]:
    """The second model, behind the HTTP application, where it is called demo."""
    replicas = LocalReplicas(models[1])
    with listening(create_api(lambda: local_client(FixedFollower(table_of(models[1])), replicas))) as url:
        yield f"{url}/v1"
    replicas.stop()


def test_the_guide_runs_from_top_to_bottom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store: str, models: list[Path], endpoint: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    (tmp_path / "book.txt").write_text(BOOK)
    write_dataset(tmp_path / "data" / "mine")
    for model in models:
        registered = run_here("import_checkpoint.py", str(model), "--register_as", "demo")
        assert registered.returncode == 0, registered.stderr
    client = MlflowClient(store)
    client.set_registered_model_alias("demo", "champion", "1")
    blocks = re.findall(r"```(bash|python)\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    outputs = []
    for language, code in blocks:
        if language == "python":
            exec(compile(code, str(GUIDE), "exec"), {})
            continue
        for line in code.strip().splitlines():
            line = line.replace("http://127.0.0.1:8000/v1", endpoint)
            _, script, *flags = shlex.split(line)
            done = run_here(Path(script).name, *flags)
            assert done.returncode == 0, f"{line}: {done.stderr}"
            outputs.append(done.stdout)
    alone, compared, *_, promoted = outputs
    assert "book.txt/bits_per_byte" in alone
    assert "mine/bits_per_byte" in alone
    assert "verse_next_line/acc" in compared
    assert "difference" in compared
    kept = json.loads((tmp_path / "evaluations" / "demo" / "results.json").read_text())
    assert [Evaluation.from_json(json.dumps(each)).model for each in kept] == ["models:/demo/2"]
    values = [float(tags["book.txt.bits_per_byte"]) for tags in map(_tags(client), ("1", "2"))]
    better = values[1] < values[0]
    assert ("\npromoted: " in promoted) == better
    champion = client.get_model_version_by_alias("demo", "champion")
    assert str(champion.version) == ("2" if better else "1")


def _tags(client: MlflowClient):  # type: ignore[no-untyped-def]
    def tags(version: str) -> dict[str, str]:
        found = client.get_model_version("demo", version).tags
        return {name.removeprefix("evaluation."): value for name, value in found.items()}

    return tags
