"""The only tests that import lm_eval, which takes seconds."""

from __future__ import annotations

import os
import socket
from pathlib import Path

os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import pytest

from llama_ray.data.tokenizing.tokenizer import Tokenizer
from llama_ray.evaluation.engine_scorer import EngineScorer
from llama_ray.evaluation.evaluate import EvaluationConfig, Questions, evaluate
from llama_ray.evaluation.harness.run import BUNDLED, bundled_tasks
from llama_ray.evaluation.results import Evaluation, EvaluationError
from llama_ray.generation.engine import Engine
from llama_ray.pretrained import save_pretrained
from tests.small_models import random_model, small_config

LIMIT = 5
pytestmark = pytest.mark.filterwarnings("default")


def evaluated(scorer: EngineScorer, **fields: object) -> Evaluation:
    config = EvaluationConfig(**{"limit": LIMIT, "tasks": tuple(bundled_tasks()), **fields})  # type: ignore[arg-type]
    return evaluate(scorer, Questions.read(config))


@pytest.fixture(scope="module")
def evaluation(checkpoint: Path) -> Evaluation:
    with Engine.from_pretrained(checkpoint, device="cpu", kv_cache_memory_bytes=2**24) as engine:
        return evaluated(EngineScorer(str(checkpoint), engine))


def test_all_scores_are_those_of_lm_evals_own_model(checkpoint: Path, evaluation: Evaluation) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    found = simple_evaluate(
        model="hf",
        model_args={"pretrained": str(checkpoint), "dtype": "float32"},
        device="cpu",
        batch_size=8,
        tasks=bundled_tasks(),
        limit=LIMIT,
        bootstrap_iters=0,
        task_manager=TaskManager(include_path=str(BUNDLED), include_defaults=False),
    )["results"]
    expected = {
        f"{task}/{key.removesuffix(',none')}": value
        for task, metrics in found.items()
        for key, value in metrics.items()
        if key.endswith(",none") and not key.endswith("_stderr,none")
    }
    assert {score.name: score.value for score in evaluation.scores} == pytest.approx(expected, rel=1e-3)
    assert "verse_copy/exact_match" in expected
    assert "verse_next_line/acc_norm" in expected


def test_scores_carry_what_comparing_them_takes(evaluation: Evaluation) -> None:
    accuracy = evaluation.score("verse_next_line/acc")
    assert accuracy is not None
    assert accuracy.samples == len(accuracy.values) == LIMIT
    assert accuracy.value == pytest.approx(sum(accuracy.values) / LIMIT)
    assert accuracy.stderr is not None
    assert accuracy.higher_is_better
    bits = evaluation.score("sonnets/bits_per_byte")
    assert bits is not None
    assert not bits.higher_is_better


def test_only_scores_of_the_same_questions_compare(scorer: EngineScorer, evaluation: Evaluation) -> None:
    tasks = ("verse_next_line",)
    same = evaluated(scorer, tasks=tasks).score("verse_next_line/acc")
    accuracy = evaluation.score("verse_next_line/acc")
    assert same == accuracy
    for other in ({"limit": LIMIT + 1}, {"num_fewshot": 2}, {"apply_chat_template": True}):
        changed = evaluated(scorer, tasks=tasks, **other).score("verse_next_line/acc")
        assert changed is not None
        assert accuracy is not None
        assert not changed.comparable_to(accuracy)


def test_tasks_of_ones_own_are_asked_in_the_chat_template_and_generated(
    tmp_path: Path, scorer: EngineScorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.yaml").write_text(
        (BUNDLED / "verse_copy.yaml").read_text().replace("verse_copy\ncustom", "mine\ncustom")
    )
    (tmp_path / "rows.py").write_text(
        (BUNDLED / "rows.py").read_text().replace("Path(__file__).parent", f"Path({str(BUNDLED)!r})")
    )
    with socket.create_server(("127.0.0.1", 0)) as hub:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{hub.getsockname()[1]}")
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        found = evaluated(
            scorer, tasks=("mine",), include_path=(str(tmp_path),), apply_chat_template=True, limit=2
        )
        # Their data may be on the hub, so it was looked for.
        hub.settimeout(0)
        hub.accept()[0].close()
    assert [score.name for score in found.scores] == ["mine/exact_match"]


def test_the_chat_template_and_its_special_tokens_are_those_of_transformers(tmp_path: Path) -> None:
    from lm_eval.models.huggingface import HFLM

    from llama_ray.evaluation.harness.model import HarnessModel

    template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}" + (
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    from llama_ray.data.tokenizing.training import TrainingOptions

    trained = Tokenizer.train(
        iter(["some words, some more words"] * 5),
        300,
        TrainingOptions(special_tokens=("<|im_start|>", "<|im_end|>")),
    )
    files = trained.files()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "chat_template.jinja").write_text(template)
    tokenizer = Tokenizer.load(tmp_path)
    save_pretrained(random_model(small_config(tokenizer.vocab_size)), tokenizer, tmp_path)
    history = [{"role": "system", "content": "some"}, {"role": "user", "content": "more words"}]
    theirs = HFLM(str(tmp_path), dtype="float32", device="cpu")
    with Engine.from_pretrained(tmp_path, device="cpu") as engine:
        ours = HarnessModel(EngineScorer("m", engine))
        for generation_prompt in (True, False):
            text = ours.apply_chat_template(history, generation_prompt)
            assert text == theirs.apply_chat_template(history, generation_prompt)
            assert ours.tok_encode(text) == theirs.tok_encode(text)
    assert tokenizer.encode_prompt("<|im_start|>", parse_special=True)[0] in ours.tok_encode(text)


def test_a_folder_of_tasks_that_is_not_there_is_refused(scorer: EngineScorer) -> None:
    with pytest.raises(EvaluationError, match="include_path is '/nowhere'"):
        evaluated(scorer, include_path=("/nowhere",))


def test_a_task_of_the_hub_says_so_where_there_is_no_network_and_an_unknown_one_is_none(
    tmp_path: Path, scorer: EngineScorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    # One of the user's own may consist of lm_eval's, and a file may mention names that it does not define.
    (tmp_path / "both.yaml").write_text("group: both\ntask: [verse_copy, arc_easy]\n")
    # One test, because to look through lm_eval's own tasks takes seconds.
    for name in ("arc_easy", "both"):
        with pytest.raises(
            EvaluationError, match="arc_easy are on the Hugging Face hub, which this machine does not reach"
        ) as error:
            evaluated(scorer, tasks=(name,), include_path=(str(tmp_path),))
        assert "\n" not in str(error.value)
    with pytest.raises(EvaluationError, match="no_such_task', which is no task"):
        evaluated(scorer, tasks=("no_such_task",), include_path=(str(tmp_path),))


def test_a_task_that_samples_gets_other_texts_with_another_seed(scorer: EngineScorer) -> None:
    from lm_eval.api.instance import Instance

    from llama_ray.evaluation.harness.model import HarnessModel

    settings = {"do_sample": True, "temperature": 1.0, "max_gen_toks": 8, "until": []}
    requests = [Instance("generate_until", {}, ("Shall I", settings), number) for number in range(2)]
    texts = [HarnessModel(scorer, seed=seed).generate_until(requests) for seed in (1, 1, 2)]
    assert texts[0] == texts[1]
    assert len({*texts[0], *texts[2]}) == 4
