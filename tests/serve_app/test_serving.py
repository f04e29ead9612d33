"""The application in a real Ray Serve instance, asked by the official client."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from openai.types import Completion as Response

from llama_ray.data.chat.template import PLAIN_STOP, ChatPrompt
from llama_ray.generation.engine import Engine
from llama_ray.generation.sampling.params import SamplingParams
from tests.serve_app.helpers import EMOJI, MAX_SEQ_LEN, expected, stream_text

PROMPTS = ["The quick", "def add(", "Zwölf", "dog", "return a", "jumps over", "a + b", "lazy dog, and"]


def test_an_answer_is_what_the_engine_gives_for_the_same_seed(client: openai.OpenAI, engine: Engine) -> None:
    [want] = expected(engine, "The quick", max_tokens=30, temperature=0.9, top_p=0.8, seed=3, ignore_eos=True)
    got = client.completions.create(
        model="tiny", prompt="The quick", max_tokens=30, temperature=0.9, top_p=0.8, seed=3,
        extra_body={"ignore_eos": True},
    )  # fmt: skip
    assert got.choices[0].text == want.text
    assert got.choices[0].finish_reason == want.finish_reason == "length"
    assert got.usage is not None
    assert got.usage.prompt_tokens == len(want.prompt_token_ids)
    assert got.usage.completion_tokens == 30
    assert got.usage.total_tokens == len(want.prompt_token_ids) + 30
    assert (got.object, got.model) == ("text_completion", "tiny")


def test_requests_without_a_seed_differ(client: openai.OpenAI) -> None:
    texts = {
        client.completions.create(model="tiny", prompt="dog", max_tokens=30).choices[0].text for _ in range(3)
    }
    assert len(texts) == 3


def test_a_stream_joins_to_the_same_text_and_ends_with_the_usage(
    client: openai.OpenAI, engine: Engine
) -> None:
    [want] = expected(engine, "The quick", max_tokens=40, seed=5)
    chunks = list(
        client.completions.create(
            model="tiny",
            prompt="The quick",
            max_tokens=40,
            seed=5,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    *texts, last = chunks
    assert "".join(c.choices[0].text for c in texts) == want.text
    # Tokens that are ready at the same moment come together, and on a busy machine many are.
    assert len(texts) > 1
    assert [c.choices[0].finish_reason for c in texts if c.choices[0].finish_reason] == ["length"]
    assert all(c.usage is None for c in texts)
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens == 40
    assert len({c.id for c in chunks}) == 1


def test_server_sent_events_on_the_wire(served: str) -> None:
    body = {"model": "tiny", "prompt": "dog", "max_tokens": 3, "stream": True, "seed": 1}
    response = httpx.post(f"{served}/v1/completions", json=body)
    assert response.headers["content-type"].startswith("text/event-stream")
    events = response.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(event.startswith("data: ") for event in events[:-1])
    assert "usage" not in json.loads(events[0].removeprefix("data: "))


def test_n_and_several_prompts_are_indexed_prompt_by_prompt(client: openai.OpenAI, engine: Engine) -> None:
    params = {"max_tokens": 12, "seed": 2, "n": 2}
    want = [c.text for p in PROMPTS[:2] for c in expected(engine, p, **params)]
    assert len(set(want)) == 4
    got = client.completions.create(model="tiny", prompt=PROMPTS[:2], **params)  # type: ignore[call-overload]
    assert [c.index for c in got.choices] == [0, 1, 2, 3]
    assert [c.text for c in got.choices] == want
    assert got.usage.completion_tokens == 48

    streamed = dict.fromkeys(range(4), "")
    for chunk in client.completions.create(model="tiny", prompt=PROMPTS[:2], stream=True, **params):  # type: ignore[call-overload]
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
    assert list(streamed.values()) == want


def test_token_ids_as_prompts(client: openai.OpenAI, engine: Engine) -> None:
    ids = engine.encode("The quick")
    [want] = expected(engine, "The quick", max_tokens=8, seed=1)
    one = client.completions.create(model="tiny", prompt=ids, max_tokens=8, seed=1)
    two = client.completions.create(model="tiny", prompt=[ids, ids], max_tokens=8, seed=1)
    assert [c.text for c in (*one.choices, *two.choices)] == [want.text] * 3


def test_a_text_is_scored_without_generating_any(client: openai.OpenAI, engine: Engine) -> None:
    [want] = expected(engine, "The quick brown fox", max_tokens=0, prompt_logprobs=1)
    assert want.prompt_logprobs is not None
    answer = client.completions.create(
        model="tiny", prompt="The quick brown fox", max_tokens=0, echo=True, logprobs=1,
        extra_body={"return_token_ids": True, "prompt_logprobs": 1},
    )  # fmt: skip
    [choice] = answer.choices
    assert (choice.text, choice.finish_reason) == ("The quick brown fox", "length")
    assert choice.logprobs is not None
    logprobs = [entry.logprob for entry in want.prompt_logprobs]
    assert choice.logprobs.token_logprobs == pytest.approx([None, *logprobs])
    extra = choice.model_extra or {}
    assert (extra["prompt_token_ids"], extra["token_ids"]) == (want.prompt_token_ids, [])
    own = zip(want.prompt_token_ids[1:], extra["prompt_logprobs"][1:], strict=True)
    assert [entry[str(id)]["logprob"] for id, entry in own] == pytest.approx(logprobs)
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(want.prompt_token_ids), 0)


def test_a_stop_string_ends_the_text_before_it(client: openai.OpenAI, engine: Engine) -> None:
    [whole] = expected(engine, "The quick", max_tokens=40, seed=4)
    stop = whole.text[10:13]
    before = whole.text[: whole.text.find(stop)]
    got = client.completions.create(model="tiny", prompt="The quick", max_tokens=40, seed=4, stop=[stop])
    assert (got.choices[0].text, got.choices[0].finish_reason) == (before, "stop")
    assert stream_text(client, "The quick", max_tokens=40, seed=4, stop=stop) == before


def test_sampling_parameters_beyond_openais(client: openai.OpenAI, engine: Engine) -> None:
    [greedy] = expected(engine, "dog", max_tokens=20, temperature=0)
    got = client.completions.create(model="tiny", prompt="dog", max_tokens=20, extra_body={"top_k": 1})
    assert got.choices[0].text == greedy.text
    extra = {"min_p": 0.2, "repetition_penalty": 1.3, "ignore_eos": True}
    [want] = expected(engine, "dog", max_tokens=20, seed=6, **extra)
    got = client.completions.create(model="tiny", prompt="dog", max_tokens=20, seed=6, extra_body=extra)
    assert got.choices[0].text == want.text


def test_penalties_and_logit_bias(client: openai.OpenAI, engine: Engine) -> None:
    [plain] = expected(engine, "dog", max_tokens=1, temperature=0)
    got = client.completions.create(
        model="tiny",
        prompt="dog",
        max_tokens=5,
        temperature=0,
        presence_penalty=1.5,
        frequency_penalty=1.0,
        logit_bias={str(plain.token_ids[0]): -100},
    )
    [want] = expected(
        engine,
        "dog",
        max_tokens=5,
        temperature=0,
        presence_penalty=1.5,
        frequency_penalty=1.0,
        logit_bias={plain.token_ids[0]: -100},
    )
    assert got.choices[0].text == want.text
    assert want.token_ids[0] != plain.token_ids[0]


def test_logprobs_are_the_engines_in_openais_layout(client: openai.OpenAI, engine: Engine) -> None:
    assert engine.tokenizer is not None
    prompt = f"dog {EMOJI}"  # the answer's characters are four tokens each
    [want] = expected(engine, prompt, max_tokens=9, temperature=0, logprobs=2)
    got = client.completions.create(model="tiny", prompt=prompt, max_tokens=9, temperature=0, logprobs=2)
    logprobs = got.choices[0].logprobs
    assert logprobs is not None
    assert want.logprobs is not None
    assert logprobs.token_logprobs == pytest.approx([p.logprob for p in want.logprobs])
    assert logprobs.tokens == [f"token_id:{id}" for id in want.token_ids]
    assert logprobs.text_offset == [0, 0, 0, 0, 1, 1, 1, 1, 2]
    assert logprobs.top_logprobs is not None
    assert [len(top) for top in logprobs.top_logprobs] == [2] * 9


def test_streamed_logprobs_are_the_engines(client: openai.OpenAI, engine: Engine) -> None:
    [want] = expected(engine, "dog", max_tokens=20, seed=7, logprobs=0)
    chunks = list(
        client.completions.create(model="tiny", prompt="dog", max_tokens=20, seed=7, logprobs=0, stream=True)
    )
    streamed = [
        p for c in chunks if c.choices[0].logprobs for p in c.choices[0].logprobs.token_logprobs or []
    ]
    assert want.logprobs is not None
    assert streamed == pytest.approx([p.logprob for p in want.logprobs])


def test_echo_puts_the_prompt_first(client: openai.OpenAI, engine: Engine) -> None:
    [want] = expected(engine, "Zwölf", max_tokens=5, seed=1)
    got = client.completions.create(model="tiny", prompt="Zwölf", max_tokens=5, seed=1, echo=True)
    assert got.choices[0].text == "Zwölf" + want.text
    assert got.usage is not None
    assert got.usage.completion_tokens == 5
    ids = engine.encode("Zwölf")
    got = client.completions.create(model="tiny", prompt=ids, max_tokens=5, seed=1, echo=True)
    assert got.choices[0].text == "Zwölf" + want.text


def test_a_stream_holds_no_half_characters(client: openai.OpenAI) -> None:
    chunks = list(
        client.completions.create(model="tiny", prompt=EMOJI, max_tokens=40, temperature=0, stream=True)
    )
    texts = [c.choices[0].text for c in chunks]
    assert "".join(texts) == EMOJI * 10
    assert all(set(text) <= {EMOJI} for text in texts)
    assert len(texts) > 1


def test_parallel_streams_are_what_each_would_be_alone(client: openai.OpenAI, engine: Engine) -> None:
    def stream(number: int) -> str:
        return stream_text(client, PROMPTS[number], max_tokens=60, seed=number)

    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        texts = list(pool.map(stream, range(len(PROMPTS))))
    assert texts == [expected(engine, p, max_tokens=60, seed=i)[0].text for i, p in enumerate(PROMPTS)]


def test_more_requests_than_the_batch_holds_are_all_answered(client: openai.OpenAI) -> None:
    def ask(number: int) -> Response:
        return client.completions.create(model="tiny", prompt=f"{number}", max_tokens=20)

    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(ask, range(20)))
    assert all(a.usage and a.usage.completion_tokens for a in answers)


def test_models(client: openai.OpenAI) -> None:
    # Its adapters follow it.
    model = client.models.list().data[0]
    assert model.id == "tiny"
    extra = model.model_dump()
    assert extra["max_model_len"] == MAX_SEQ_LEN
    assert extra["metadata"]["version"] is None  # from a directory, not from the registry
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="'gpt' is not served here"):
        client.models.retrieve("gpt")


def test_health_playground_and_docs(served: str) -> None:
    assert httpx.get(f"{served}/health").json() == {"status": "ok"}
    page = httpx.get(f"{served}/")
    assert page.headers["content-type"].startswith("text/html")
    assert "<form" in page.text
    assert "<textarea" in page.text
    assert "http://" not in page.text.replace("http://www.w3.org", "")  # nothing from elsewhere
    assert "https://" not in page.text
    assert httpx.get(f"{served}/docs").status_code == 200
    assert "/v1/completions" in httpx.get(f"{served}/openapi.json").json()["paths"]


def test_a_conversation_is_answered_after_a_transcript_where_the_model_has_no_template(
    client: openai.OpenAI, engine: Engine
) -> None:
    prompt = ChatPrompt([{"role": "user", "content": "The quick"}])
    [want] = engine.generate([prompt], SamplingParams(max_tokens=40, seed=5, stop=PLAIN_STOP))
    body: Any = {"model": "tiny", "messages": prompt.messages, "max_completion_tokens": 40, "seed": 5}
    whole = client.chat.completions.create(**body)
    chunks = client.chat.completions.create(**body, stream=True)
    assert whole.choices[0].message.content == want.text
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == want.text
    answer = client.responses.create(
        model="tiny", input="The quick", max_output_tokens=40, extra_body={"seed": 5}
    )
    assert answer.output_text == want.text
    card = client.models.retrieve("tiny")
    assert card.model_extra is not None
    assert card.model_extra["metadata"]["chat_template"] == "plain"
