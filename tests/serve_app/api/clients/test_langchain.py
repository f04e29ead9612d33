"""LangChain's classes for OpenAI's API."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any

import httpx
import pydantic
import pytest
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings

from llama_ray.generation.engine import Engine
from tests.serve_app.api.clients.helpers import MAX_TOKENS, MESSAGES, PROMPT, answer, completion

Make = Callable[..., ChatOpenAI]


class Animal(pydantic.BaseModel):
    """An answer that is asked for."""

    quick: bool


@pytest.fixture(params=[False, True], ids=["chat", "responses"])
def make(endpoint: str, request: pytest.FixtureRequest) -> Make:
    """Makes a chat model that uses one of the two APIs for conversations."""
    options: dict[str, Any] = {"base_url": f"{endpoint}/v1", "temperature": 0, "max_retries": 0}
    return partial(ChatOpenAI, model="tiny", use_responses_api=request.param, **options)


def test_a_chat_model_invokes_and_streams(make: Make, reference: Engine) -> None:
    chat, want = make(max_tokens=MAX_TOKENS), answer(reference)
    got = chat.invoke(MESSAGES)
    assert got.text == want.text
    assert got.usage_metadata is not None
    assert got.usage_metadata["output_tokens"] == len(want.token_ids)
    assert "".join(chunk.text for chunk in chat.stream(MESSAGES)) == want.text


def test_a_chat_model_is_awaited(make: Make, reference: Engine) -> None:
    async def ask() -> tuple[str, str]:
        # Of its own, all models would share the connections of whichever event loop came first.
        async with httpx.AsyncClient() as http:
            chat = make(max_tokens=MAX_TOKENS, http_async_client=http)
            whole = await chat.ainvoke(MESSAGES)
            return whole.text, "".join([chunk.text async for chunk in chat.astream(MESSAGES)])

    assert asyncio.run(ask()) == (answer(reference).text,) * 2


def test_a_chat_model_with_structured_output(make: Make) -> None:
    structured = make().with_structured_output(Animal, method="json_schema")
    assert isinstance(structured.invoke(MESSAGES), Animal)


def test_a_model_of_text(endpoint: str, reference: Engine) -> None:
    llm = OpenAI(model="tiny", base_url=f"{endpoint}/v1", temperature=0, max_tokens=MAX_TOKENS)
    want = completion(reference).text
    assert llm.invoke(PROMPT) == want
    assert "".join(llm.stream(PROMPT)) == want
    assert llm.batch([PROMPT, "dog"]) == [want, completion(reference, "dog").text]


def test_embeddings(endpoint: str) -> None:
    # With the check it would fetch OpenAI's own tokenizer.
    embeddings = OpenAIEmbeddings(model="tiny", base_url=f"{endpoint}/v1", check_embedding_ctx_length=False)
    documents = embeddings.embed_documents([PROMPT, "dog"])
    assert documents[1] == pytest.approx(embeddings.embed_query("dog"))
