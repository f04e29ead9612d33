"""OpenAI's own client, synchronous and asynchronous, with each of the three APIs for text."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pydantic
import pytest

from llama_ray.generation.engine import Engine
from tests.serve_app.api.clients.helpers import MAX_TOKENS, MESSAGES, PROMPT, answer, completion

APIS = ("completions", "chat", "responses")


def create(client: Any, api: str, **options: Any) -> Any:
    """Ask for a greedy answer by one of the APIs; a coroutine if the client is an asynchronous one."""
    asked: dict[str, Any] = {"model": "tiny", "temperature": 0}
    if api == "completions":
        asked |= {"prompt": PROMPT, "max_tokens": MAX_TOKENS}
        return client.completions.create(**asked | options)
    if api == "chat":
        asked |= {"messages": MESSAGES, "max_completion_tokens": MAX_TOKENS}
        return client.chat.completions.create(**asked | options)
    system, _ = MESSAGES
    asked |= {"instructions": system["content"], "input": PROMPT, "max_output_tokens": MAX_TOKENS}
    return client.responses.create(**asked | options)


def text_of(response: Any) -> str:
    """The text of an answer, or what a chunk or an event of a stream adds to it."""
    if response.object == "response":
        return str(response.output_text)
    [choice] = response.choices or [None]
    if choice is None:
        return ""
    if response.object == "text_completion":
        return str(choice.text)
    return (choice.message if response.object == "chat.completion" else choice.delta).content or ""


def added(event: Any) -> str:
    """What an event of a stream adds to the text."""
    if hasattr(event, "choices"):
        return text_of(event)
    return str(event.delta) if event.type == "response.output_text.delta" else ""


def expected(engine: Engine, api: str) -> str:
    return (completion if api == "completions" else answer)(engine).text


@pytest.mark.parametrize("api", APIS)
def test_a_text_is_the_engines_whole_and_streamed(client: openai.OpenAI, reference: Engine, api: str) -> None:
    want = expected(reference, api)
    assert text_of(create(client, api)) == want
    assert "".join(map(added, create(client, api, stream=True))) == want


@pytest.mark.parametrize("api", APIS)
def test_the_asynchronous_client_gets_the_same(endpoint: str, reference: Engine, api: str) -> None:
    async def ask() -> tuple[str, str]:
        async with openai.AsyncOpenAI(base_url=f"{endpoint}/v1", max_retries=0) as client:
            whole, stream = await asyncio.gather(create(client, api), create(client, api, stream=True))
            return text_of(whole), "".join([added(event) async for event in stream])

    assert asyncio.run(ask()) == (expected(reference, api),) * 2


@pytest.mark.parametrize("api", ["chat", "responses"])
def test_an_answer_has_only_what_the_clients_types_know(endpoint: str, api: str) -> None:
    with openai.OpenAI(base_url=f"{endpoint}/v1", _strict_response_validation=True) as client:
        create(client, api)
        assert list(create(client, api, stream=True))


def test_the_clients_own_collector_of_chat_streams(client: openai.OpenAI, reference: Engine) -> None:
    # The collector takes a text that reaches the limit of tokens for an error.
    stop = answer(reference).text[10:13]
    with client.chat.completions.stream(
        model="tiny",
        messages=MESSAGES,  # type: ignore[arg-type]
        temperature=0,
        max_completion_tokens=MAX_TOKENS,
        stop=stop,
        logprobs=True,
        top_logprobs=2,
        stream_options={"include_usage": True},
    ) as stream:
        stream.until_done()
        got = stream.get_final_completion()
    want = answer(reference, stop=(stop,), logprobs=2)
    [choice] = got.choices
    assert choice.message.content == want.text
    assert choice.finish_reason == want.finish_reason == "stop"
    assert got.usage is not None
    assert got.usage.completion_tokens == len(want.token_ids)
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    assert want.logprobs is not None
    assert [token.logprob for token in choice.logprobs.content] == pytest.approx(
        [token.logprob for token in want.logprobs], abs=1e-4
    )
    assert {len(token.top_logprobs) for token in choice.logprobs.content} == {2}


def test_a_conversation_goes_on_with_the_answer_as_the_client_has_it(
    client: openai.OpenAI, reference: Engine
) -> None:
    first = answer(reference).text
    question = {"role": "user", "content": "dog"}
    want = answer(reference, [*MESSAGES, {"role": "assistant", "content": first}, question]).text
    message = create(client, "chat").choices[0].message
    assert text_of(create(client, "chat", messages=[*MESSAGES, message, question])) == want
    output = create(client, "responses").output
    before = [{"role": "user", "content": PROMPT}]
    assert text_of(create(client, "responses", input=[*before, *output, question])) == want


class Animal(pydantic.BaseModel):
    """An answer that is asked for."""

    quick: bool
    legs: int = pydantic.Field(ge=0, le=9)


def test_an_answer_of_a_pydantic_type(client: openai.OpenAI) -> None:
    chat = client.chat.completions.parse(
        model="tiny",
        messages=MESSAGES,
        response_format=Animal,
        temperature=0,  # type: ignore[arg-type]
    )
    assert isinstance(chat.choices[0].message.parsed, Animal)
    response = client.responses.parse(model="tiny", input=PROMPT, text_format=Animal, temperature=0)
    assert isinstance(response.output_parsed, Animal)


def test_models_and_embeddings(client: openai.OpenAI) -> None:
    assert "tiny" in [model.id for model in client.models.list()]
    assert client.models.retrieve("tiny").id == "tiny"
    # The client asks for base64 by itself.
    got = client.embeddings.create(model="tiny", input=[PROMPT, "dog"])
    assert [len(item.embedding) for item in got.data] == [48, 48]
    as_numbers = client.embeddings.create(model="tiny", input="dog", encoding_format="float")
    assert as_numbers.data[0].embedding == pytest.approx(got.data[1].embedding)


def test_errors_are_the_clients_exceptions(client: openai.OpenAI) -> None:
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="sk-of-somebody-else-0000").models.list()
    with pytest.raises(openai.NotFoundError, match="other"):
        client.chat.completions.create(model="other", messages=MESSAGES)  # type: ignore[call-overload]
    for api in APIS:
        with pytest.raises(openai.BadRequestError) as caught:
            create(client, api, extra_body={"temperature": -1})
        assert caught.value.param == "temperature"
