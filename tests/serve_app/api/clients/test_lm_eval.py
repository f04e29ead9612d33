"""lm-evaluation-harness on tasks in local files: its numbers are those of the model."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import torch
from lm_eval.tasks import TaskManager

from llama_ray.generation.engine import Engine
from llama_ray.pretrained import load_pretrained
from tests.serve_app.api.clients.helpers import KEY, MAX_TOKENS, answer, completion

DOCUMENTS = [
    {"question": "The quick brown", "choices": [" fox", " dog", " Deich"], "gold": 0},
    {"question": "jumps over the lazy", "choices": [" Viktor", " dog"], "gold": 1},
    {"question": "def add(a, b):", "choices": ["\n    return a + b", " jagen", "dog"], "gold": 0},
    {"question": "Zwölf Boxkämpfer", "choices": [" the lazy dog", " jagen"], "gold": 1},
]
COMMON = {
    "dataset_path": "json",
    "test_split": "test",
    "doc_to_text": "{{question}}",
    "metadata": {"version": 1},
}
CHOICES = {
    "task": "local_choices",
    "output_type": "multiple_choice",
    "doc_to_choice": "choices",
    "doc_to_target": "gold",
    "target_delimiter": "",
    "metric_list": [{"metric": "acc"}],
}
TEXTS = {
    "task": "local_texts",
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{question}}{{choices[gold]}}",
    "metric_list": [{"metric": "bits_per_byte"}],
}
ANSWERS = {
    "task": "local_answers",
    "output_type": "generate_until",
    "doc_to_target": "{{choices[gold]}}",
    "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": MAX_TOKENS},
    "metric_list": [{"metric": "exact_match"}],
}


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """A folder with the tasks and their documents."""
    file = tmp_path / "documents.jsonl"
    file.write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS))
    data = {"data_files": {"test": str(file)}, "cache_dir": str(tmp_path / "cache")}
    for task in (CHOICES, TEXTS, ANSWERS):
        # JSON is YAML.
        (tmp_path / f"{task['task']}.yaml").write_text(json.dumps(COMMON | {"dataset_kwargs": data} | task))
    return tmp_path


def evaluate(url: str, model: str, folder: Path, *names: str, **options: Any) -> dict[str, Any]:
    """What the harness finds with one of its models for OpenAI's API."""
    arguments = {"model": "tiny", "base_url": url, "max_retries": 1, "auth_token": KEY}
    found = lm_eval.simple_evaluate(
        model=model,
        model_args=arguments | options.pop("arguments", {}),
        tasks=list(names),
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        bootstrap_iters=0,
        **options,
    )
    assert found is not None
    return found


@pytest.mark.parametrize("arguments", [{}, {"num_concurrent": 3}, {"batch_size": 2}], ids=str)
def test_log_likelihoods_are_the_models(
    endpoint: str, tasks: Path, tuned_dir: Path, arguments: dict[str, int]
) -> None:
    model, tokenizer = load_pretrained(tuned_dir)
    assert tokenizer is not None

    def log_likelihood(context: list[int], text: list[int]) -> tuple[float, bool]:
        with torch.inference_mode():
            rows = model(torch.tensor([context + text]))[0, len(context) - 1 : -1].float().log_softmax(-1)
        return float(rows[range(len(text)), text].sum()), rows.argmax(-1).tolist() == text

    found = evaluate(
        f"{endpoint}/v1/completions",
        "local-completions",
        tasks,
        "local_choices",
        "local_texts",
        # Otherwise the harness takes eos for what precedes a text: it has no bos whose id is 0.
        arguments=arguments | {"custom_prefix_token_id": tokenizer.bos_id},
    )
    hits = 0
    for document, sample in zip(DOCUMENTS, found["samples"]["local_choices"], strict=True):
        question = tokenizer.encode(document["question"])
        whole = [tokenizer.encode(document["question"] + choice) for choice in document["choices"]]
        want = [log_likelihood(ids[: len(question)], ids[len(question) :]) for ids in whole]
        got = [response for [response] in sample["resps"]]
        assert [value for value, _ in got] == pytest.approx([value for value, _ in want], abs=1e-3)
        assert [greedy for _, greedy in got] == [greedy for _, greedy in want]
        hits += max(range(len(want)), key=want.__getitem__) == document["gold"]
    assert found["results"]["local_choices"]["acc,none"] == hits / len(DOCUMENTS)

    texts = [document["question"] + document["choices"][document["gold"]] for document in DOCUMENTS]
    assert tokenizer.bos_id is not None
    bits = -sum(log_likelihood([tokenizer.bos_id], tokenizer.encode(text))[0] for text in texts) / math.log(2)
    per_byte = bits / sum(len(text.encode()) for text in texts)
    assert found["results"]["local_texts"]["bits_per_byte,none"] == pytest.approx(per_byte, abs=1e-3)


@pytest.mark.parametrize("chat", [False, True], ids=["local-completions", "local-chat-completions"])
def test_texts_are_the_models(endpoint: str, tasks: Path, reference: Engine, chat: bool) -> None:
    path, model = (
        ("chat/completions", "local-chat-completions") if chat else ("completions", "local-completions")
    )
    found = evaluate(f"{endpoint}/v1/{path}", model, tasks, "local_answers", apply_chat_template=chat)
    got = [sample["resps"][0][0] for sample in found["samples"]["local_answers"]]
    for document, text in zip(DOCUMENTS, got, strict=True):
        question, stop = document["question"], ("\n\n",)
        if chat:
            want = answer(reference, [{"role": "user", "content": question}], stop=stop)
        else:
            # The harness sends the tokens of the text, without bos.
            want = completion(reference, reference.encode(question, add_special_tokens=False), stop=stop)
        assert text == want.text
