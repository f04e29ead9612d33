from __future__ import annotations

import math
from pathlib import Path

import pytest
import tokenizers
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM, AutoTokenizer

from llama_ray.data.tokenizing.tokenizer import Tokenizer
from llama_ray.evaluation.bits import measure, ratio, windows
from llama_ray.evaluation.engine_scorer import EngineScorer
from llama_ray.evaluation.evaluate import EvaluationConfig
from llama_ray.evaluation.results import EvaluationError
from llama_ray.evaluation.texts import Corpus
from llama_ray.generation.engine import Engine
from llama_ray.pretrained import save_pretrained
from tests.small_models import random_model, small_config

CORPUS = Corpus("poems", ("Shall I compare thee to a summer's day? " * 9, "Thou art more lovely 🙂", "x"))


def transformers_nats(checkpoint: Path, text: str, context: int, stride: int) -> tuple[float, int]:
    """The sliding window of https://huggingface.co/docs/transformers/perplexity, and the number of tokens."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(checkpoint)(text, return_tensors="pt").input_ids
    total, asked = 0.0, 1
    while asked < ids.shape[1]:
        end = min(asked + (context if asked == 1 else stride), ids.shape[1])
        window = ids[:, max(end - 1 - context, 0) : end]
        with torch.inference_mode():
            logprobs = model(window[:, :-1]).logits[0].log_softmax(-1)
        new = end - asked
        total -= logprobs[-new:].gather(-1, window[0, -new:, None]).sum().item()
        asked = end
    return total, ids.shape[1] - 1


@pytest.mark.parametrize(("context", "stride"), [(128, 64), (32, 32), (20, 1)])
def test_bits_and_perplexity_are_those_of_transformers(
    checkpoint: Path, scorer: EngineScorer, context: int, stride: int
) -> None:
    found = [transformers_nats(checkpoint, text, context, stride) for text in CORPUS.documents]
    nats, tokens = (sum(column) for column in zip(*found, strict=True))
    size = sum(len(text.encode()) for text in CORPUS.documents)
    bits, perplexity = measure(scorer, [CORPUS], context, stride)
    assert bits.value == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    assert perplexity.value == pytest.approx(math.exp(nats / tokens), rel=1e-4)
    assert bits.value == pytest.approx(sum(bits.values) / sum(bits.weights))
    assert bits.samples == 3


@given(st.integers(0, 60), st.integers(1, 20), st.data())
def test_windows_ask_for_each_token_once_after_as_much_as_they_promise(
    tokens: int, context: int, data: st.DataObject
) -> None:
    stride = data.draw(st.integers(1, context))
    asked = []
    for window in windows(range(tokens + 1), context, stride):
        assert len(window.tokens) <= context + 1
        for place in range(window.start, len(window.tokens)):
            token = window.tokens[place]
            asked.append(token)
            assert place >= min(token, context - stride + 1)
    assert asked == list(range(1, tokens + 1))


def test_the_standard_error_is_that_of_a_mean_where_documents_are_equally_long() -> None:
    values = [3.0, 5.0, 4.0, 8.0]
    mean, error = ratio(values, [2.0] * 4)
    assert mean == 2.5
    deviation = math.sqrt(sum((value / 2 - mean) ** 2 for value in values) / 3)
    assert error == pytest.approx(deviation / 2)
    assert ratio([3.0], [2.0]) == (1.5, None)


def test_only_the_tokenizer_keeps_perplexities_from_being_compared(scorer: EngineScorer) -> None:
    bits, perplexity = measure(scorer, [CORPUS], 64, 32)
    other_bits, other_perplexity = measure(scorer, [CORPUS], 64, 64)
    assert bits.fingerprint != other_bits.fingerprint != perplexity.fingerprint
    assert perplexity.fingerprint != other_perplexity.fingerprint


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"context": 129}, "context is 129; it must be from 1 to 128"),
        ({"context": 10, "stride": 11}, "stride is 11; it must be from 1 to context, 10"),
    ],
)
def test_windows_that_the_model_cannot_read_are_refused(fields: dict[str, int], message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        EvaluationConfig(text=("a",), **fields).window(128)  # type: ignore[arg-type]


def test_texts_that_are_asked_for_together_have_their_own_scores(scorer: EngineScorer) -> None:
    other = Corpus("other", ("temperate",))
    together = measure(scorer, [CORPUS, other], 64, 32)
    assert together == [*measure(scorer, [CORPUS], 64, 32), *measure(scorer, [other], 64, 32)]


def test_the_longest_windows_are_taken_where_none_are_given() -> None:
    assert EvaluationConfig(text=("a",)).window(128) == (128, 64)
    assert EvaluationConfig(text=("a",)).window(10**6) == (2048, 1024)


def test_a_tokenizer_that_cannot_write_the_text_gets_no_score(tmp_path: Path) -> None:
    words = WordLevel({"<unk>": 0, "<s>": 1, "the": 2, "fox": 3}, unk_token="<unk>")
    fast = tokenizers.Tokenizer(words)
    fast.pre_tokenizer = Whitespace()
    fast.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<s>", "unk_token": "<unk>"}')
    tokenizer = Tokenizer.load(tmp_path)
    save_pretrained(random_model(small_config(tokenizer.vocab_size)), tokenizer, tmp_path)
    with Engine.from_pretrained(tmp_path, device="cpu", kv_cache_memory_bytes=2**24) as engine:
        scorer = EngineScorer("m", engine)
        assert measure(scorer, [Corpus("known", ("the fox",))], 8, 4)
        with pytest.raises(EvaluationError, match=r"parts of quick \(1 of 3 are unknown\)"):
            measure(scorer, [Corpus("quick", ("the quick fox",))], 8, 4)
