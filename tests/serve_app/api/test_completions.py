"""`/v1/completions` field by field, as the official client sees it: log-probabilities are those of transformers."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import openai
import pytest
import torch
from fastapi.testclient import TestClient
from openai.types import Completion, CompletionChoice
from torch import Tensor
from transformers import LlamaForCausalLM

from llama_ray.data.tokenizing.tokenizer import Tokenizer
from llama_ray.generation.engine import Engine
from serve_app.api.api import create_api
from tests.serve_app.helpers import FixedFollower, LocalReplicas, local_client, table_of

PROMPT = "The quick brown fox jumps over the lazy dog"
EOS = "<|end_of_text|>"


@pytest.fixture(scope="module")
def http(model_dir: Path) -> Iterator[TestClient]:
    replicas, follower = LocalReplicas(model_dir), FixedFollower(table_of(model_dir))
    with TestClient(create_api(lambda: local_client(follower, replicas))) as http:
        yield http
    replicas.stop()


@pytest.fixture(scope="module")
def client(http: TestClient) -> openai.OpenAI:
    return openai.OpenAI(base_url="http://testserver/v1", api_key="none", http_client=http, max_retries=0)


@pytest.fixture(scope="module")
def tokenizer(engine: Engine) -> Tokenizer:
    assert engine.tokenizer is not None
    return engine.tokenizer


@pytest.fixture(scope="module")
def reference(model_dir: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(model_dir)


@torch.inference_mode()
def logprobs_of(reference: LlamaForCausalLM, ids: list[int]) -> Tensor:
    """Return log-probabilities [len(ids) - 1, vocab_size] of what follows each token but the last."""
    return reference(torch.tensor([ids])).logits[0, :-1].float().log_softmax(-1)


def complete(client: openai.OpenAI, prompt: object = PROMPT, **fields: Any) -> Completion:
    """Ask with any fields; the client has types for those of OpenAI only."""
    own = {k: fields.pop(k) for k in ("stream", "stream_options") if k in fields}
    body = {"seed": 1, **fields}
    return cast(
        Completion,
        client.completions.create(model="tiny", prompt=prompt, extra_body=body, **own),  # type: ignore[call-overload]
    )


def extra(choice: CompletionChoice, name: str) -> Any:
    """Return a field that OpenAI's API does not have."""
    return (choice.model_extra or {})[name]


def refusal(http: TestClient, **fields: Any) -> dict[str, Any]:
    response = http.post("/v1/completions", json={"model": "tiny", "prompt": "a", **fields})
    assert response.status_code == 400, response.text
    error: dict[str, Any] = response.json()["error"]
    assert "\n" not in error["message"]
    return error


@pytest.mark.parametrize("max_tokens", [0, 4])
@pytest.mark.parametrize("prompt", [PROMPT, "🙂 漢字"])
def test_an_echo_has_the_log_probabilities_of_the_prompt(
    client: openai.OpenAI, engine: Engine, reference: LlamaForCausalLM, prompt: str, max_tokens: int
) -> None:
    ids = engine.encode(prompt)
    got = complete(client, prompt, max_tokens=max_tokens, echo=True, logprobs=2, return_token_ids=True)
    [choice] = got.choices
    whole = ids + extra(choice, "token_ids")
    assert len(whole) == len(ids) + max_tokens
    assert got.usage is not None
    assert (got.usage.prompt_tokens, got.usage.completion_tokens) == (len(ids), max_tokens)
    assert choice.finish_reason == "length"
    assert choice.text.startswith(prompt)
    assert (choice.text == prompt) == (not max_tokens)
    logprobs, want = choice.logprobs, logprobs_of(reference, whole)
    assert logprobs is not None
    assert logprobs.token_logprobs is not None
    assert logprobs.top_logprobs is not None
    assert logprobs.token_logprobs[0] is logprobs.top_logprobs[0] is None
    own = want.gather(1, torch.tensor(whole[1:])[:, None])[:, 0]
    assert logprobs.token_logprobs[1:] == pytest.approx(own.tolist(), abs=1e-3)
    for top, row in zip(logprobs.top_logprobs[1:], want, strict=True):
        assert sorted(top.values(), reverse=True)[:2] == pytest.approx(row.topk(2).values.tolist(), abs=1e-3)
    assert logprobs.tokens is not None
    assert logprobs.text_offset is not None
    for name, offset in zip(logprobs.tokens, logprobs.text_offset, strict=True):
        assert name.startswith("<|") or name.startswith("token_id:") or choice.text[offset:].startswith(name)


def test_a_harness_finds_continuations_where_it_looks_for_them(
    client: openai.OpenAI, engine: Engine, reference: LlamaForCausalLM
) -> None:
    # As lm-eval's local-completions: context and continuation as ids, and one token that it ignores.
    context, continuation = engine.encode("The quick brown"), engine.encode(" fox", add_special_tokens=False)
    ids = context + continuation
    answer = complete(client, [ids, ids], max_tokens=1, echo=True, logprobs=1, temperature=0, seed=1234)
    want = logprobs_of(reference, ids)[len(context) - 1 :]
    for choice in answer.choices:
        assert choice.logprobs is not None
        assert choice.logprobs.token_logprobs is not None
        assert choice.logprobs.top_logprobs is not None
        own = choice.logprobs.token_logprobs[len(context) : -1]
        top = choice.logprobs.top_logprobs[len(context) : -1]
        assert own == pytest.approx(
            [row[id].item() for row, id in zip(want, continuation, strict=True)], abs=1e-3
        )
        greedy = [logprob == max(of.values()) for logprob, of in zip(own, top, strict=True)]
        assert greedy == [row.argmax().item() == id for row, id in zip(want, continuation, strict=True)]


@pytest.mark.parametrize("max_tokens", [0, 3])
def test_prompt_logprobs_name_each_token_with_its_rank(
    client: openai.OpenAI, engine: Engine, tokenizer: Tokenizer, reference: LlamaForCausalLM, max_tokens: int
) -> None:
    ids = engine.encode(PROMPT)
    [choice] = complete(client, max_tokens=max_tokens, prompt_logprobs=2).choices
    assert choice.logprobs is None
    first, *entries = extra(choice, "prompt_logprobs")
    assert first is None
    for token, entry, row in zip(ids[1:], entries, logprobs_of(reference, ids), strict=True):
        order = row.argsort(descending=True).tolist()
        assert set(entry) == {str(token), *map(str, order[:2])}
        for id, found in entry.items():
            assert set(found) == {"logprob", "rank", "decoded_token"}
            assert found["logprob"] == pytest.approx(row[int(id)].item(), abs=1e-3)
            assert found["rank"] == order.index(int(id)) + 1
            assert found["decoded_token"] in (tokenizer.decode([int(id)], skip_special=False), None)


def test_a_long_report_is_whole_and_what_follows_it_comes_after_it(
    client: openai.OpenAI, engine: Engine
) -> None:
    ids = [engine.encode(PROMPT)[i % 20] for i in range(1000)]
    choices = complete(client, [ids], max_tokens=3, n=2, prompt_logprobs=5, echo=True, logprobs=2).choices
    alone = complete(client, [ids], max_tokens=3, n=2).choices
    for choice, bare in zip(choices, alone, strict=True):
        assert len(extra(choice, "prompt_logprobs")) == 1000
        assert choice.logprobs is not None
        assert choice.logprobs.token_logprobs is not None
        assert len(choice.logprobs.token_logprobs) == 1003
        assert choice.text.endswith(bare.text)


CASES: dict[str, dict[str, Any]] = {
    "scores": {"max_tokens": 0, "echo": True, "logprobs": 1},
    "prompt": {"max_tokens": 0, "prompt_logprobs": 0},
    "nothing": {"max_tokens": 0},
    "echo": {"max_tokens": 9, "echo": True, "n": 2},
    "all": {
        "max_tokens": 9,
        "echo": True,
        "logprobs": 2,
        "prompt_logprobs": 1,
        "n": 2,
        "return_token_ids": True,
    },
    "ids": {"max_tokens": 9, "return_token_ids": True, "return_tokens_as_token_ids": True, "logprobs": 1},
    "stop": {"max_tokens": 60, "stop": ["e", "a"], "include_stop_str_in_output": True},
    "limited": {"max_tokens": 9, "allowed_token_ids": [70, 71, 72], "bad_words": "e", "top_k": -1},
}


@pytest.mark.parametrize("case", CASES)
def test_a_stream_tells_what_a_whole_answer_does(client: openai.OpenAI, case: str) -> None:
    prompts = [PROMPT, "def add("]
    whole = complete(client, prompts, **CASES[case])
    parts: dict[int, list[dict[str, Any]]] = defaultdict(list)
    chunks = cast(Iterator[Completion], complete(client, prompts, stream=True, **CASES[case]))
    for chunk in chunks:
        for choice in chunk.choices:
            parts[choice.index].append(choice.model_dump())
    for choice in whole.choices:
        want = choice.model_dump()
        assert {name: _joined([p[name] for p in parts[choice.index] if name in p]) for name in want} == want


def _joined(values: list[Any]) -> Any:
    given = [value for value in values if value is not None]
    if not given:
        return None
    if isinstance(given[0], dict):
        return {name: _joined([value[name] for value in given]) for name in given[0]}
    if isinstance(given[0], list):
        return [entry for value in given for entry in value]
    return "".join(given) if isinstance(given[0], str) else given[0]


def test_token_ids_are_those_of_prompts_and_texts(
    client: openai.OpenAI, engine: Engine, tokenizer: Tokenizer
) -> None:
    ids = engine.encode("dog")
    answer = complete(
        client, ["dog", "dog"], max_tokens=6, ignore_eos=True, return_token_ids=True, logprobs=0
    )
    for choice in answer.choices:
        assert extra(choice, "prompt_token_ids") == ids
        assert tokenizer.decode(extra(choice, "token_ids")) == choice.text
    named = complete(
        client, "dog", max_tokens=6, ignore_eos=True, return_tokens_as_token_ids=True, logprobs=1
    )
    [choice] = named.choices
    assert choice.logprobs is not None
    assert choice.logprobs.tokens == [f"token_id:{id}" for id in extra(answer.choices[0], "token_ids")]
    assert "token_ids" not in (choice.model_extra or {})


@pytest.mark.parametrize("stream", [False, True])
def test_what_ended_a_text_is_its_stop_reason(
    client: openai.OpenAI, tokenizer: Tokenizer, stream: bool
) -> None:
    def reason(**fields: Any) -> tuple[str | None, Any]:
        answer = complete(client, max_tokens=60, stream=stream, **fields)
        last = list(answer)[-1] if stream else answer
        return last.choices[0].finish_reason, extra(last.choices[0], "stop_reason")

    eos, [e] = tokenizer.eos_id, tokenizer.encode("e")
    assert reason(stop=["never", "e"]) == ("stop", "e")
    assert reason(stop_token_ids=[e], logit_bias={e: 100}) == ("stop", e)
    assert reason(logit_bias={eos: 100}) == ("stop", None)
    assert reason(ignore_eos=True) == ("length", None)


def test_names_of_special_tokens_are_text_unless_they_are_to_be_parsed(
    client: openai.OpenAI, engine: Engine, tokenizer: Tokenizer
) -> None:
    def prompt_ids(**fields: Any) -> list[int]:
        answer = complete(client, f"a{EOS}b", max_tokens=1, return_token_ids=True, **fields)
        return cast(list[int], extra(answer.choices[0], "prompt_token_ids"))

    [a], [b] = tokenizer.encode("a"), tokenizer.encode("b")
    assert prompt_ids() == [tokenizer.bos_id, *tokenizer.encode(f"a{EOS}b")]
    assert tokenizer.eos_id not in prompt_ids()
    assert prompt_ids(add_special_tokens=False) == tokenizer.encode(f"a{EOS}b")
    assert prompt_ids(parse_special=True) == [tokenizer.bos_id, a, tokenizer.eos_id, b]
    assert prompt_ids(parse_special=True, add_special_tokens=False) == [a, tokenizer.eos_id, b]


def test_usage_counts_as_it_goes_and_knows_what_was_cached(client: openai.OpenAI, engine: Engine) -> None:
    prompt = "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich. " * 3
    options = {"include_usage": True, "continuous_usage_stats": True}
    for cached in (False, True):
        chunks = list(cast(Iterator[Completion], complete(
            client, prompt, max_tokens=300, ignore_eos=True, stream=True, stream_options=options
        )))  # fmt: skip
        usages = [chunk.usage for chunk in chunks if chunk.usage is not None]
        assert len(usages) == len(chunks)
        counts = [usage.completion_tokens for usage in usages]
        assert counts == sorted(counts)
        assert counts[0] < counts[-1] == 300
        assert {usage.prompt_tokens for usage in usages} == {len(engine.encode(prompt))}
        details = [usage.prompt_tokens_details for usage in usages]
        assert all(of is not None and of.cached_tokens for of in details) == cached


@pytest.mark.parametrize(
    "format",
    [
        {"type": "json_object"},
        {"type": "json_schema", "json_schema": {"name": "n", "strict": True, "schema": {"const": {"a": 1}}}},
    ],
)
def test_a_response_format_limits_the_text_to_json(client: openai.OpenAI, format: dict[str, Any]) -> None:
    [choice] = complete(client, max_tokens=40, response_format=format, temperature=0.1).choices
    if choice.finish_reason == "stop":
        assert isinstance(json.loads(choice.text), dict)
    assert choice.text.startswith("{")
    plain = complete(client, max_tokens=9).choices[0].text
    assert complete(client, max_tokens=9, response_format={"type": "text"}).choices[0].text == plain


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"logprobs": True}, "logprobs", "logprobs: input should be a valid integer"),
        ({"prompt_logprobs": True}, "prompt_logprobs", "prompt_logprobs: input should be a valid integer"),
        ({"prompt_logprobs": 21}, "prompt_logprobs", "prompt_logprobs is 21; it must be at most 20"),
        ({"top_k": -2}, "top_k", "top_k is -2; it must be at least 0"),
        ({"allowed_token_ids": []}, "allowed_token_ids", "it must be at least one token id"),
        ({"allowed_token_ids": [9999]}, "allowed_token_ids", "allowed_token_ids: token id 9999 is outside"),
        ({"bad_words": [""]}, "bad_words", "it must be a string or several, none of them blank"),
        (
            {"prompt": [[1] * 4000] * 9, "prompt_logprobs": 15, "max_tokens": 0},
            "prompt_logprobs",
            "prompt_logprobs of 36,000 prompt tokens, 16 for each, with n 1 are 576,000; a request may ask for at most",
        ),
        ({"prompt": [9999]}, "prompt", "prompt: token id 9999 is outside the model's vocabulary"),
        ({"logit_bias": {"9999": 1}}, "logit_bias", "logit_bias: token id 9999 is outside"),
        ({"response_format": {"type": "xml"}}, "response_format", "should be 'text', 'json_object' or 'json_schema'"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "needs response_format.json_schema"),
        ({"response_format": {"type": "text", "json_schema": {}}}, "response_format", "takes no response_format"),
        (
            {"response_format": {"type": "json_object"}, "regex": "a"},
            "regex",
            "regex and response_format both limit the text; give one of them",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"$ref": "#"}}}},
            "json_schema",
            "json_schema cannot be enforced",
        ),
    ],
)  # fmt: skip
def test_a_mistake_is_a_line_that_names_its_field(
    http: TestClient, fields: dict[str, Any], param: str, message: str
) -> None:
    error = refusal(http, **fields)
    assert error["param"] == param
    assert message in error["message"]
